"""Pairs of models, ours and transformers', with one configuration and the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from hypothesis import strategies as st
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers, the peer, is not installed (extra: test)")

VOCAB = 61
PEER_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "gpt2": transformers.GPT2Config,
}
PEER_MODELS = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
}
ACTIVATIONS = ("gelu_new", "gelu", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh", "quick_gelu",
               "gelu_python", "gelu_accurate", "mish", "leaky_relu", "relu2", "relu6", "hardswish", "sigmoid",
               "linear", "gelu_python_tanh")  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Case:
    """The contents of a config.json and a seed for the weights."""

    kind: str
    values: dict[str, Any]
    seed: int

    def configs(self) -> tuple[Any, Any]:
        """(ours, the peer's), both read from the same JSON values."""
        values = {name: value for name, value in self.values.items() if name != "model_type"}
        return tiny.CONFIGS[self.kind].from_dict(self.values), PEER_CONFIGS[self.kind].from_dict(dict(values))

    def pair(self, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        """(our model, the peer's), in evaluation mode, with equal weights."""
        config, peer_config = self.configs()
        peer = PEER_MODELS[self.kind]._from_config(peer_config, dtype=dtype, attn_implementation=implementation).eval()
        tiny.randomize(peer, self.seed)
        mine = tiny.MODELS[self.kind].from_config(config, dtype=dtype, attn_implementation=implementation).eval()
        mine.load_state_dict(peer.state_dict(), strict=True)
        return mine, peer


def _number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.integers(0, 20).map(lambda n: round(low + (high - low) * n / 20, 4))


@st.composite
def rope(draw: st.DrawFn, kind: str, half: int, longest: int) -> dict[str, Any]:
    """A rope_parameters entry of one type, without theta."""
    entry: dict[str, Any] = {"rope_type": kind}
    optional = draw(st.sets(st.sampled_from(range(6))))
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        entry["factor"] = draw(_number(1.0, 8.0))
    if kind in ("yarn", "longrope", "llama3") and 0 in optional:
        entry["original_max_position_embeddings"] = draw(st.integers(6, longest))
    if kind in ("yarn", "longrope") and 1 in optional:
        entry["attention_factor"] = draw(_number(0.5, 1.5))
    if kind == "llama3":
        entry["low_freq_factor"] = draw(_number(0.5, 2.0))
        entry["high_freq_factor"] = entry["low_freq_factor"] + draw(_number(0.5, 4.0))
    if kind == "yarn":
        if 2 in optional:
            entry |= {"beta_fast": draw(_number(4, 40)), "beta_slow": draw(_number(0.5, 3))}
        if 3 in optional:
            entry |= {"mscale": draw(_number(0.5, 1.5)), "mscale_all_dim": draw(_number(0.5, 1.5))}
        if 4 in optional:
            entry["truncate"] = draw(st.booleans())
    if kind == "longrope":
        entry["short_factor"] = [draw(_number(1.0, 2.0)) for _ in range(half)]
        entry["long_factor"] = [draw(_number(1.0, 8.0)) for _ in range(half)]
        if 5 in optional:
            entry["factor"] = draw(_number(1.0, 8.0))
    return entry


@st.composite
def llama_values(draw: st.DrawFn, kind: str = "llama", rope_type: str | None = None) -> dict[str, Any]:
    """Contents of a Llama's or Mistral's config.json, any option, old or new spelling."""
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    heads = kv_heads * draw(st.sampled_from((1, 2, 3)))
    half = draw(st.integers(2, 6))
    longest = draw(st.sampled_from((16, 32, 64)))
    own_width = draw(st.booleans())
    values: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": heads * (draw(st.integers(2, 8)) if own_width else half * 2),  # the peer wants a multiple
        "intermediate_size": draw(st.integers(8, 64)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": longest,
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)) if draw(st.booleans()) else "silu",
        "rms_norm_eps": draw(st.sampled_from((1e-5, 1e-6))),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 0,
        "eos_token_id": draw(st.sampled_from((1, [1, 2]))),
        "pad_token_id": draw(st.sampled_from((None, 0, 5))),
    }
    if own_width:
        values["head_dim"] = half * 2
    if kind == "llama":
        if heads == kv_heads and draw(st.booleans()):
            del values["num_key_value_heads"]
        values |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    else:
        values["sliding_window"] = draw(st.sampled_from((None, 1, 3, 8, 4096)))
    entry = draw(rope(rope_type or draw(st.sampled_from(ROPE_TYPES)), half, longest))
    theta = draw(st.sampled_from((10000.0, 500000.0, 100.0)))
    if draw(st.booleans()):
        values["rope_parameters"] = {**entry, "rope_theta": theta}
    else:
        values["rope_theta"] = theta
        old = dict(entry)
        if draw(st.booleans()):
            old["type"] = old.pop("rope_type")
        values["rope_scaling"] = None if entry == {"rope_type": "default"} else old
    return values


@st.composite
def gpt2_values(draw: st.DrawFn) -> dict[str, Any]:
    """Contents of a GPT-2's config.json, any option."""
    heads = draw(st.integers(1, 4))
    return {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": heads * draw(st.integers(3, 12)),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_positions": 64,
        "n_inner": draw(st.sampled_from((None, 7, 33))),
        "activation_function": draw(st.sampled_from(ACTIVATIONS)),
        "layer_norm_epsilon": draw(st.sampled_from((1e-5, 1e-3))),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "reorder_and_upcast_attn": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def cases(kind: str, rope_type: str | None = None) -> st.SearchStrategy[Case]:
    """Configurations of one architecture over every option it has."""
    values = gpt2_values() if kind == "gpt2" else llama_values(kind, rope_type)
    return st.builds(Case, st.just(kind), values, st.integers(0, 1 << 16))


def relative(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest magnitude of the peer's (or ``floor``, if that is larger)."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert torch.isfinite(ours).all()
    if not ours.numel():
        return 0.0
    return float((ours - theirs).abs().max() / max(float(theirs.abs().max()), floor, 1e-30))


def tokens(seed: int, batch: int, length: int) -> Tensor:
    """(batch, length) token ids."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, by name."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative difference of a parameter's gradient.

    Gradients that vanish, or nearly, are measured against a tenth of the largest: against less, a tolerance of 1e-5
    would be one unit in the last place of fp32, which the peer's own two backends do not keep.
    """
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    return max(relative(ours[name], theirs[name], floor=0.1 * largest) for name in theirs)
