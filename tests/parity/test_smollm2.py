"""Real weights: SmolLM2-135M-Instruct, the same files through loadstone and through transformers."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import smollm2
import torch
from parity.peers import relative, transformers
from safetensors import safe_open

from loadstone import AutoModelForCausalLM, LlamaForCausalLM

_REASON = smollm2.why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_REASON is not None, reason=_REASON or "")]

# Relative to the largest logit. An absolute 1e-4 is below the peer's own noise: its sdpa and eager differ by 1.6e-4 on
# the third text, whose logits reach 44, and both libraries are about 1e-4 from float64 there.
TOLERANCE = 1e-5
TEXTS = (
    "Gravity is the force by which a planet or other body draws objects toward its center.",
    "The quick brown fox jumps over the lazy dog. 1234567890 times, in 1999!",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
)


@pytest.fixture(scope="module")
def directory() -> Path:
    return smollm2.smollm2_directory()


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def models(directory: Path) -> tuple[Any, Any]:
    """(ours, the peer's), in fp32."""
    mine = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return mine, peer


def prompt(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(text).ids])


def exact_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The architecture written out in float64, with neither library's forward: the truth both are measured against."""
    config, weights = model.config, {name: t.double() for name, t in model.state_dict().items()}
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    seq = ids.shape[1]
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = torch.arange(seq, dtype=torch.float64)[:, None] / config.rope_theta**exponents
    cos, sin = (torch.cat((table, table), -1) for table in (angles.cos(), angles.sin()))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1) * sin

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weights[f"{name}.weight"]

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T

    def split(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(1, seq, count, width).transpose(1, 2)

    hidden = weights["model.embed_tokens.weight"][ids]
    future = torch.full((seq, seq), -torch.inf, dtype=torch.float64).triu(1)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        x = norm(hidden, f"{at}.input_layernorm")
        query = rotate(split(project(x, f"{at}.self_attn.q_proj"), heads))
        key = rotate(split(project(x, f"{at}.self_attn.k_proj"), groups)).repeat_interleave(heads // groups, 1)
        value = split(project(x, f"{at}.self_attn.v_proj"), groups).repeat_interleave(heads // groups, 1)
        attended = (query @ key.transpose(2, 3) / width**0.5 + future).softmax(-1) @ value
        hidden = hidden + project(attended.transpose(1, 2).reshape(1, seq, -1), f"{at}.self_attn.o_proj")
        x = norm(hidden, f"{at}.post_attention_layernorm")
        gated = torch.nn.functional.silu(project(x, f"{at}.mlp.gate_proj")) * project(x, f"{at}.mlp.up_proj")
        hidden = hidden + project(gated, f"{at}.mlp.down_proj")
    return project(norm(hidden, "model.norm"), "lm_head")


def chat(question: str) -> str:
    """One turn in the form the model was tuned on."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_tokenizer_round_trip(tokenizer: Any) -> None:
    for text in (*TEXTS, "Füße, naïve café, 日本語, 🦙"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    english = tokenizer.encode(TEXTS[0])
    assert "Ġforce" in english.tokens
    assert len(english.ids) < len(TEXTS[0].split()) * 1.5  # words, not letters: the merges work
    assert len(tokenizer.encode("1999").ids) == 4  # each digit a token
    assert tokenizer.encode("<|im_start|>").ids == [1]


def test_weights_are_mapped_bit_for_bit(directory: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 134515008
    assert model.load_report.bytes_mapped == model.load_report.bytes_total == 2 * 134515008
    with safe_open(directory / "model.safetensors", "pt") as file:
        state = model.state_dict()
        assert all(torch.equal(state[name], file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits(models: tuple[Any, Any], tokenizer: Any, implementation: str) -> None:
    mine, peer = models
    for model in models:
        model.set_attn_implementation(implementation)
    for text in TEXTS:
        ids = prompt(tokenizer, text)
        with torch.no_grad():
            ours, theirs = mine(ids, labels=ids), peer(ids, labels=ids)
            truth = exact_logits(mine, ids)
        assert relative(ours.logits, theirs.logits) <= TOLERANCE
        assert relative(ours.logits.double(), truth) <= TOLERANCE
        assert abs(float(ours.loss) - float(theirs.loss)) <= 1e-5
        assert 0.5 < float(ours.loss) < 4.5  # English under a language model; shuffled rows would give ten or more


def test_padded_batch(models: tuple[Any, Any], tokenizer: Any) -> None:
    mine, peer = models
    rows = [tokenizer.encode(text).ids for text in TEXTS]
    longest = max(map(len, rows))
    ids = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = mine(ids, attention_mask=mask, position_ids=positions).logits
        theirs = peer(ids, attention_mask=mask, position_ids=positions).logits
        alone = mine(torch.tensor([rows[0]])).logits
    kept = mask.bool()
    assert relative(ours[kept], theirs[kept]) <= TOLERANCE
    assert relative(ours[0][kept[0]], alone[0]) <= TOLERANCE


@pytest.mark.parametrize("text", [TEXTS[0], chat("What is the capital of France?")])
def test_greedy_tokens(models: tuple[Any, Any], tokenizer: Any, text: str) -> None:
    mine, peer = models
    ids = prompt(tokenizer, text)
    limits = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False}
    ours = mine.generate(ids, **limits)
    theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), **limits)
    assert ours.tolist() == theirs.tolist()
    assert ours.shape == (1, ids.shape[1] + 48)


def test_it_speaks_english(models: tuple[Any, Any], tokenizer: Any) -> None:
    mine, _ = models

    def answer(question: str, new: int) -> str:
        ids = prompt(tokenizer, chat(question))
        out = mine.generate(ids, max_new_tokens=new, do_sample=False)
        assert out.shape[1] < ids.shape[1] + new  # it ends its turn by itself
        return tokenizer.decode(out[0, ids.shape[1] :].tolist())

    assert "Paris" in answer("What is the capital of France?", 40)
    text = answer("Write two sentences about the sea.", 160)
    plain = sum(c in string.ascii_letters + " .,'\n" for c in text) / len(text)
    assert plain > 0.95
    words = [word.strip(".,").lower() for word in text.split()]
    assert len(words) >= 10
    assert {"the", "sea"} <= set(words) or {"the", "ocean"} <= set(words)
