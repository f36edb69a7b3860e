"""GGUF files of tiny models, written by the package gguf: with each of its types, and with anything in the metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# Rows of 256 elements, so that the blocks of all types fit.
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
QUANTIZED_BY_GGUF = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
OTHERS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """``model.layers.1.mlp.up_proj.weight`` → ``blk.1.ffn_up.weight``."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[part]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows as llama.cpp has them: the two halves of each head interleaved."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def metadata(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for a configuration, as {key: value} below ``llama.``."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }


def blocks_of(weight: torch.Tensor, kind: str) -> Any:
    """A matrix, or any matrix of its shape where gguf cannot encode, as gguf's array of bytes or numbers."""
    import gguf
    import numpy

    number = gguf.GGMLQuantizationType[kind]
    values = weight.detach().float().numpy()
    if kind in QUANTIZED_BY_GGUF:
        return gguf.quants.quantize(values, number)
    shape = gguf.quants.quant_shape_to_byte_shape(values.shape, number)
    octets = numpy.random.default_rng(weight.numel()).integers(0, 256, shape, dtype=numpy.uint8)
    octets[..., 1::2] &= 0x3B  # half-precision numbers in there stay small: no infinities
    return octets


def tensors_of(model: Any, kind: str) -> dict[str, tuple[Any, str]]:
    """Name to (array, type) of a model's tensors: vectors are F32, as converters leave them."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        if name in model.active_ties():
            continue
        part = name.split(".")[-2]
        weight = paired(tensor, heads[part]) if part in heads else tensor
        if weight.dim() == 1:
            found[gguf_name(name)] = (weight.detach().float().numpy(), "F32")
        else:
            found[gguf_name(name)] = (blocks_of(weight, kind), kind)
    return found


def write(
    path: Path,
    tensors: dict[str, tuple[Any, str]],
    fields: dict[str, Any],
    architecture: str = "llama",
    general: dict[str, Any] | None = None,
) -> Path:
    """A file of these tensors; ``fields`` below the architecture's name, ``general`` as they are."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.data_alignment = (general or {}).get("general.alignment", writer.data_alignment)
    named = {f"{architecture}.{key}": value for key, value in fields.items()} | (general or {})
    for key, value in named.items():
        add: Any = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save(model: Any, path: Path, kind: str = "F32", general: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A model's weights in a type of gguf; ``fields`` (with _ for .) override metadata, None leaves one out."""
    values = metadata(model.config) | {key.replace("__", "."): value for key, value in fields.items()}
    values = {key: value for key, value in values.items() if value is not None}
    return write(path, tensors_of(model, kind), values, general=general)


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """All tensors as gguf's own reader and decoder have them, float32, under the file's names."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(
            [int(size) for size in reversed(tensor.shape)]
        )
        for tensor in reader.tensors
    }
