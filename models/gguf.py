"""Llama and Mistral models in GGUF files: the configuration that the metadata means, and the names of the tensors.

llama.cpp has one architecture, "llama", for both families. Notable: it rotates neighbouring pairs of a head's elements
where the Hub's models rotate halves, so rows of the query and key weights come in another order; the frequency bands
of Llama 3.1 are a tensor of divisors (``rope_freqs.weight``); a head that is not there is the embedding.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import ConfigError, FormatError, UnsupportedModelError
from ..loading.checkpoint import Checkpoint
from ..loading.gguf import RowOrder, gguf_checkpoint, gguf_entry, gguf_headers, small_tensor
from ..loading.gguf_header import Array, GGUFHeader, GGUFTensor
from ..loading.source import Source
from .configuration import PreTrainedConfig
from .fields import dtype_name
from .llama import LlamaConfig
from .rope import RotaryEmbedding

logger = logging.getLogger("loadstone.models")

ARCHITECTURE = "llama"
_ROPE_DIVISORS = "rope_freqs.weight"
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "attention.causal", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.finetuned", "expert_count", "expert_used_count", "tensor_data_layout",
}  # fmt: skip


def read_gguf_config(source: Source, filename: str, wanted: type[PreTrainedConfig] | None = None) -> dict[str, Any]:
    """What config.json would hold for the model of a GGUF file of ``source``.

    wanted: the class that is to be made of it, if the caller chose one; else its model_type is "mistral" for a file
    that says so (by a sliding window, or its name), "llama" for others. The dtype is that of the largest tensor,
    float32 if that is in blocks. Raises UnsupportedModelError for another architecture, ConfigError for metadata that
    is missing, contradicts itself or asks for what Llama has not, and what `gguf_headers` raises.
    """
    headers = gguf_headers(source, filename)
    return _Metadata(headers).config(wanted)


def gguf_weights(source: Source, filename: str) -> Checkpoint:
    """The tensors of a GGUF file of ``source`` under the names and with the rows that the Hub's models have.

    Raises what `read_gguf_config` raises, and MissingDependencyError where blocks are to be decoded without the package
    gguf. No weight byte is read.
    """
    headers = gguf_headers(source, filename)
    facts = _Metadata(headers)
    entries = {}
    for header in headers:
        for tensor in header.tensors.values():
            if tensor.name == _ROPE_DIVISORS:
                continue  # it is in the configuration
            name = hub_name(tensor.name)
            if name in entries:
                raise FormatError(f"{header.file}: tensor {tensor.name!r} is in another of the files too")
            entries[name] = gguf_entry(header, tensor, name, _order(name, facts))
    return gguf_checkpoint(f"{source.name}/{filename}", headers, entries)


def hub_name(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``; an unknown name stays as it is."""
    if match := _BLOCK.fullmatch(name):
        part = _INSIDE.get(match[2])
        return f"model.layers.{int(match[1])}.{part}.{match[3]}" if part else name
    stem, _, kind = name.rpartition(".")
    return f"{_OUTSIDE[stem]}.{kind}" if stem in _OUTSIDE and kind == "weight" else name


def halves_of_pairs(heads: int, size: int) -> RowOrder:
    """The order in which rows of ``heads`` heads, each of ``size`` rows in pairs, have the pairs' halves apart."""
    rows = torch.arange(heads * size, device="cpu").view(heads, size // 2, 2).transpose(1, 2).reshape(-1)
    return RowOrder(rows, size)


def _order(name: str, facts: _Metadata) -> RowOrder | None:
    stem = name.rpartition(".")[0]
    if stem.endswith("self_attn.q_proj"):
        return halves_of_pairs(facts.heads, facts.head_dim)
    if stem.endswith("self_attn.k_proj"):
        return halves_of_pairs(facts.key_heads, facts.head_dim)
    return None


class _Metadata:
    """The metadata of a file of architecture "llama"."""

    def __init__(self, headers: Sequence[GGUFHeader]) -> None:
        self.file = headers[0].file
        self.fields: Mapping[str, Any] = headers[0].fields
        self.headers = headers
        self.tensors: dict[str, GGUFTensor] = {name: t for header in headers for name, t in header.tensors.items()}
        architecture = self.fields.get("general.architecture")
        if architecture != ARCHITECTURE:
            shown = repr(architecture)[:60] if isinstance(architecture, str) else "none"
            raise UnsupportedModelError(
                f"{self.file} is of the GGUF architecture {shown}; {ARCHITECTURE!r} is read, that of Llama and "
                "Mistral models"
            )
        if self.fields.get("llama.expert_count", 0) != 0:
            raise UnsupportedModelError(f"{self.file} is a mixture of experts (llama.expert_count), which is not read")
        if self.fields.get("llama.tensor_data_layout", "") not in ("", "Meta AI original pth"):
            raise UnsupportedModelError(
                f"{self.file} has its tensors in a layout of its own (llama.tensor_data_layout)"
            )
        self.width = self.integer("embedding_length")
        self.heads = self.integer("attention.head_count")
        self.key_heads = self.integer("attention.head_count_kv", self.heads)
        rotated = self.integer("rope.dimension_count", 0)
        self.head_dim = self.integer("attention.key_length", rotated or self.width // self.heads)
        if (rotated or self.head_dim) != self.head_dim or self.head_dim % 2:
            raise ConfigError(
                f"{self.file}: llama.rope.dimension_count is {rotated}, heads have {self.head_dim} elements; models "
                "that rotate a part of each head are not read"
            )
        if self.integer("attention.value_length", self.head_dim) != self.head_dim:
            raise ConfigError(f"{self.file}: llama.attention.value_length differs from the keys' {self.head_dim}")
        if self.fields.get("llama.attention.causal", True) is not True:
            raise UnsupportedModelError(f"{self.file} is no causal model (llama.attention.causal)")

    def integer(self, key: str, default: int | None = None) -> int:
        """A number from 1 to 2^31; of an array by layer, which must not differ, its element."""
        value = self.fields.get(f"llama.{key}")
        if isinstance(value, Array) and value.values and len(set(value.values)) == 1:
            value = value.values[0]
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ConfigError(f"{self.file}: llama.{key} must be a number from 1, {_shown(value)}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number, as its shortest decimal."""
        value = self.fields.get(f"llama.{key}")
        if value is None and default is not None:
            return default
        if type(value) is not float or not 0 < value < 1e18:
            raise ConfigError(f"{self.file}: llama.{key} must be a positive number, {_shown(value)}")
        return shortest(value)

    def config(self, wanted: type[PreTrainedConfig] | None) -> dict[str, Any]:
        self._warn_of_others()
        layers, longest = self.integer("block_count"), self.integer("context_length")
        there = {int(match[1]) for name in self.tensors if (match := _BLOCK.fullmatch(name))}
        if there != set(range(layers)) if layers <= len(there) + 1 else True:
            raise ConfigError(f"{self.file}: llama.block_count is {layers}, its tensors are of {len(there)} layers")
        kind = self._model_type(wanted)
        embedding = self.tensors.get("token_embd.weight")
        largest = max(self.tensors.values(), key=lambda tensor: tensor.numel)
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(largest.kind.name, torch.float32)
        values: dict[str, Any] = {
            "model_type": kind,
            "dtype": dtype_name(dtype),
            "vocab_size": self.integer("vocab_size", embedding.shape[0] if embedding is not None else None),
            "hidden_size": self.width,
            "intermediate_size": self.integer("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": longest,
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "rope_parameters": self._rope(longest),
        }
        window = self.fields.get("llama.attention.sliding_window")
        if kind == "mistral":
            values["sliding_window"] = self.integer("attention.sliding_window") if window else None
        elif window:
            raise ConfigError(f"{self.file} has a sliding attention window of {window}, which {kind!r} has not")
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            token = self.fields.get(f"tokenizer.ggml.{key}_token_id")
            values[name] = token if type(token) is int and 0 <= token < values["vocab_size"] else None
        return values

    def _model_type(self, wanted: type[PreTrainedConfig] | None) -> str:
        if wanted is not None and issubclass(wanted, LlamaConfig):
            return wanted.model_type
        said = " ".join(str(self.fields.get(f"general.{key}", ""))[:200] for key in ("name", "basename")).lower()
        biased = any(name.endswith(".bias") for name in self.tensors)
        window = bool(self.fields.get("llama.attention.sliding_window"))
        return "mistral" if window or (re.search(r"\bmistral", said) and not biased) else "llama"

    def _rope(self, longest: int) -> dict[str, Any]:
        theta = self.real("rope.freq_base", 10000.0)
        scaling = self.fields.get("llama.rope.scaling.type", "none")
        factor = self.fields.get("llama.rope.scaling.factor")
        if factor is None and "llama.rope.scale_linear" in self.fields:  # how older files say it
            factor, scaling = self.fields["llama.rope.scale_linear"], "linear"
        if self.fields.get("llama.rope.scaling.attn_factor", 1.0) != 1.0:
            raise ConfigError(f"{self.file}: llama.rope.scaling.attn_factor is not read")
        if (divisors := self.tensors.get(_ROPE_DIVISORS)) is not None:
            header = next(header for header in self.headers if _ROPE_DIVISORS in header.tensors)
            return self._bands(small_tensor(header, divisors), theta, longest)
        if scaling == "none" or (scaling == "linear" and factor in (None, 0.0, 1.0)):
            return {"rope_type": "default", "rope_theta": theta}
        if scaling == "linear":
            key = "rope.scaling.factor" if "llama.rope.scaling.factor" in self.fields else "rope.scale_linear"
            return {"rope_type": "linear", "rope_theta": theta, "factor": self.real(key)}
        if scaling == "yarn":
            original = self.integer("rope.scaling.original_context_length")
            return {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": self.real("rope.scaling.factor"),
                "original_max_position_embeddings": original,
            }
        raise ConfigError(f"{self.file}: llama.rope.scaling.type {_shown(scaling)}; none, linear and yarn are read")

    def _bands(self, divisors: list[float], theta: float, longest: int) -> dict[str, Any]:
        """The parameters that divide the frequencies so: Llama 3.1's if they do, else the divisors themselves."""
        if len(divisors) != self.head_dim // 2 or not all(0 < divisor < 1e18 for divisor in divisors):
            raise ConfigError(f"{self.file}: {_ROPE_DIVISORS} must be {self.head_dim // 2} positive numbers")
        plain = RotaryEmbedding({"rope_type": "default", "rope_theta": theta}, self.head_dim, longest).frequencies()[0]
        divided = plain / torch.tensor(divisors, dtype=torch.float32, device="cpu")
        llama3 = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": shortest(max(divisors)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if torch.allclose(RotaryEmbedding(llama3, self.head_dim, longest).frequencies()[0], divided, rtol=1e-5, atol=0):
            return llama3
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": max(longest, 2),
        }

    def _warn_of_others(self) -> None:
        others = [key for key in self.fields if key.startswith("llama.") and key.removeprefix("llama.") not in _READ]
        if others:
            logger.warning(
                "%s: metadata that is not read: %s; if it changes what the model computes, the result is another",
                self.file,
                ", ".join(others[:12]),
            )


def shortest(value: float) -> float:
    """The shortest decimal that is the same number in single precision: 9.999999747378752e-06 → 1e-05."""
    single = struct.pack("<f", value)
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == single:
            return short
    return value


def _shown(value: Any) -> str:
    return (
        "it is missing"
        if value is None
        else f"not {value!r:.60}"
        if isinstance(value, (int, float, str))
        else "not a list"
    )
