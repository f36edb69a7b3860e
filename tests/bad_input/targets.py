"""What is fuzzed: each target puts bytes where a stranger's would be, reads them as a user does, and checks what came.

A target returns whether the bytes were accepted. Whatever it raises but LoadstoneError is a fault, as is a model that
is accepted and not right: compared with the readers of safetensors and torch.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf_files
import tiny
import torch
from bad_input.inputs import good, good_sharded, put
from safetensors.torch import load, load_file, save

from loadstone import AutoModelForCausalLM, GenerationConfig, LoraConfig
from loadstone.errors import LoadstoneError
from loadstone.loading.checkpoint import open_checkpoint
from loadstone.loading.files import Files
from loadstone.loading.header import read_header
from loadstone.loading.source import resolve_source
from loadstone.models.tokenizer import load_tokenizer

SINGLE, INDEX, GGUF = "model.safetensors", "model.safetensors.index.json", "model.gguf"
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "lora_dropout": 0.0, "bias": "none"}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Target:
    """``prepare`` fills a directory once; ``file`` is what is spoilt; ``seeds`` are good or nearly good contents."""

    prepare: Callable[[Path], object]
    file: str
    seeds: Callable[[], list[bytes]]
    mutate: str  # a method of Mutator
    run: Callable[[Path], bool]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = (each.detach().contiguous().reshape(-1) for each in (one, other))
    return one.dtype == other.dtype and bool(one.view(torch.uint8).equal(other.view(torch.uint8)))


def right(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Every weight is the file's, or reported as missing, mismatched or tied; nothing is on meta; it computes."""
    report = model.load_report
    excused = {*report.missing, *(one[0] for one in report.mismatched), *report.tied}
    for name, tensor in model.state_dict().items():
        assert not tensor.is_meta, name
        if name in excused or (name.startswith("lm_head") and report.tied):
            continue
        held = weights.get(name, weights.get(name.removeprefix("transformer.")))
        assert held is not None, f"{name} is in no file and not reported"
        assert _equal(tensor, held.to(tensor.dtype)), f"{name} is not what the file holds"
    with torch.no_grad():
        logits = model(torch.tensor([[0, 0, 0]])).logits
    assert logits.shape[:2] == (1, 3)


def header(place: Path) -> bool:
    """Accepted only if safetensors accepts it, with the same tensors to the bit."""
    read = read_header(place / SINGLE)
    theirs = load((place / SINGLE).read_bytes())
    assert theirs.keys() == read.entries.keys()
    checkpoint = open_checkpoint(resolve_source(place))
    files = Files(checkpoint)
    for name, entry in checkpoint.entries.items():
        assert tuple(theirs[name].shape) == entry.shape
        assert _equal(files.flat(entry, 0, theirs[name].numel()), theirs[name].reshape(-1)), name
    return True


def model(place: Path) -> bool:
    """A whole load of one file of weights."""
    loaded = AutoModelForCausalLM.from_pretrained(place, progress=False)
    right(loaded, load_file(place / SINGLE))
    return True


def sharded(place: Path) -> bool:
    """A whole load of shards."""
    loaded = AutoModelForCausalLM.from_pretrained(place, progress=False)
    weights: dict[str, torch.Tensor] = {}
    for path in place.glob("*.safetensors"):
        weights.update(load_file(path))
    right(loaded, weights)
    return True


def generation(place: Path) -> bool:
    """Read, written, read again: equal; and used, unless it asks for a lot."""
    config = GenerationConfig.from_pretrained(place)
    config.save_pretrained(place / "again")
    assert GenerationConfig.from_pretrained(place / "again") == config
    if max(config.num_beams or 1, config.num_return_sequences or 1) <= 4:
        tokens = _generator().generate(torch.tensor([[1, 2]]), generation_config=config, max_new_tokens=2, max_time=1.0)
        assert len(tokens) > 0
    return True


@lru_cache(maxsize=1)
def _generator() -> Any:
    return tiny.model("llama")


def adapter(place: Path) -> bool:
    """On a model that is as it was after an error."""
    base = tiny.model("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    try:
        base.load_adapter(place)
    except LoadstoneError:
        after = base.state_dict()
        assert after.keys() == before.keys()
        assert all(_equal(after[name], tensor) for name, tensor in before.items())
        raise
    held = load((place / "adapter_model.safetensors").read_bytes())
    after = base.state_dict()
    loaded = {name: tensor for name, tensor in after.items() if "lora_" in name}
    assert len(loaded) == len(held)
    for name, tensor in held.items():
        ours = name.removeprefix("base_model.model.").removesuffix(".weight") + ".default.weight"
        assert _equal(after[ours], tensor.to(after[ours].dtype)), name
    return True


def quantized(place: Path) -> bool:
    """A packed checkpoint whose configuration is spoilt: read as it was packed, or not at all."""
    loaded = AutoModelForCausalLM.from_pretrained(place, progress=False)
    held = load_file(place / SINGLE)
    for name, tensor in loaded.state_dict().items():
        assert not tensor.is_meta
        assert name in held, name
        assert _equal(tensor, held[name]) or tensor.dtype != held[name].dtype, name
    with torch.no_grad():
        assert loaded(torch.tensor([[0, 0, 0]])).logits.shape[:2] == (1, 3)
    return True


def tokenizer(place: Path) -> bool:
    """Text goes in and comes out as numbers, and the other way round, or a typed error."""
    found = load_tokenizer(resolve_source(place))
    try:
        ids = found.encode("low lower\n\U0001f600")
    except LoadstoneError:
        return True  # a tokenizer that cannot tokenize this, and says so
    assert all(type(token) is int for token in ids)
    assert isinstance(found.decode(ids), str)
    return True


def _tokenizers() -> list[bytes]:
    words = {"[UNK]": 0, "low": 1, "er": 2, "l": 3, "o": 4, "w": 5, "lo": 6, " ": 7}
    shared = {"version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
              "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": {"type": "Fuse"},
              "added_tokens": [{"id": 8, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
                                "normalized": False, "special": True}]}  # fmt: skip
    level = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    pairs = {"type": "BPE", "vocab": words, "merges": ["l o", "lo w"], "dropout": None, "unk_token": "[UNK]"}
    octets = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return [json.dumps({**shared, "model": level}).encode(), json.dumps({**shared, "model": pairs}).encode(),
            json.dumps({**shared, "model": pairs, "pre_tokenizer": octets, "decoder": octets}).encode()]  # fmt: skip


def gguf(place: Path) -> bool:
    """The values are those of gguf's own reader, for all tensors whose rows stay in their order."""
    loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=GGUF, progress=False)
    theirs = gguf_files.decoded(place / GGUF)
    missing = {*loaded.load_report.missing, *loaded.load_report.tied}
    for name, tensor in loaded.state_dict().items():
        assert not tensor.is_meta
        if name not in missing and name.split(".")[-2] not in ("q_proj", "k_proj"):
            held = theirs[gguf_files.gguf_name(name)]
            assert _equal(tensor, held.to(tensor.dtype)), name
    with torch.no_grad():
        assert loaded(torch.tensor([[0, 0, 0]])).logits.shape[:2] == (1, 3)
    return True


@lru_cache(maxsize=1)
def _ggufs() -> list[bytes]:
    small = tiny.model("llama", intermediate_size=64, num_hidden_layers=1)
    with tempfile.TemporaryDirectory() as place:
        return [gguf_files.save(small, Path(place) / kind, kind).read_bytes() for kind in ("F32", "Q8_0")]


def pickled(place: Path) -> bool:
    """The tensors are those of torch's own restricted reader, where that takes the file: of a zip archive's two
    descriptions of each record it needs both, ours the one at the end."""
    loaded = AutoModelForCausalLM.from_pretrained(place, use_safetensors=False, progress=False)
    try:
        theirs = torch.load(place / "pytorch_model.bin", weights_only=True, map_location="cpu")
    except RuntimeError:
        theirs = load(good()[SINGLE])
    right(loaded, {name: tensor for name, tensor in theirs.items() if isinstance(tensor, torch.Tensor)})
    return True


@lru_cache(maxsize=1)
def _pickles() -> list[bytes]:
    tensors = load(good()[SINGLE])
    found = []
    for legacy in (False, True):
        buffer = io.BytesIO()
        torch.save(tensors, buffer, _use_new_zipfile_serialization=not legacy)
        found.append(buffer.getvalue())
    return found


@lru_cache(maxsize=1)
def _matrices() -> bytes:
    return save({f"{LAYER}.lora_A.weight": torch.ones(3, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 3)})


def _packed(place: Path) -> None:
    """What `quantize` writes of the small Llama."""
    from loadstone import LlamaForCausalLM
    from loadstone.models.transcode import quantize_checkpoint

    source = put(place.parent / "plain", good())
    quantize_checkpoint(LlamaForCausalLM, resolve_source(source), place, NF4)


def _configs() -> list[bytes]:
    seeds = [json.dumps(tiny.values(kind)).encode() for kind in tiny.KINDS]
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    long = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
    more = {"rope_parameters": rope, "eos_token_id": [2, 3], "tie_word_embeddings": False, "dtype": "float32"}
    return [*seeds, json.dumps(tiny.values("llama", **more)).encode(),
            json.dumps(tiny.values("llama", rope_parameters=long, attn_implementation="eager")).encode()]  # fmt: skip


def _quantization_configs() -> list[bytes]:
    found = [good()["config.json"]]
    for method in (
        NF4,
        {**NF4, "bnb_4bit_use_double_quant": True},
        GPTQ,
        AWQ,
        {"quant_method": "weight_only", "bits": 8},
    ):
        found.append(json.dumps(tiny.values("llama", quantization_config=method, dtype="float32")).encode())
    return found


def _generations() -> list[bytes]:
    many = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "eos_token_id": [2], "pad_token_id": 0,
            "num_beams": 2, "repetition_penalty": 1.1, "bad_words_ids": [[3, 4]], "suppress_tokens": [5],
            "cache_implementation": "static", "no_repeat_ngram_size": 2, "early_stopping": True,
            "begin_suppress_tokens": [6], "forced_eos_token_id": 2, "min_new_tokens": 1, "min_p": 0.1}  # fmt: skip
    return [b"{}", b'{"max_new_tokens": 2}', json.dumps(many).encode(), json.dumps({**many, "num_beams": 1}).encode()]


TARGETS: dict[str, Target] = {
    "header": Target(
        lambda place: put(place, {}), SINGLE, lambda: [good()[SINGLE], save({"a": torch.ones(2)})], "header", header
    ),
    "weights": Target(lambda place: put(place, good()), SINGLE, lambda: [good()[SINGLE]], "header", model),
    "index": Target(lambda place: put(place, good_sharded()), INDEX, lambda: [good_sharded()[INDEX]], "text", sharded),
    "config": Target(lambda place: put(place, good()), "config.json", _configs, "text", model),
    "generation": Target(lambda place: put(place, {}), "generation_config.json", _generations, "text", generation),
    "quantization": Target(_packed, "config.json", _quantization_configs, "text", quantized),
    "adapter": Target(
        lambda place: put(place, {"adapter_model.safetensors": _matrices()}),
        "adapter_config.json",
        lambda: [json.dumps(LORA).encode(), json.dumps(LoraConfig(target_modules=".*q_proj").to_dict()).encode()],
        "text",
        adapter,
    ),
    "matrices": Target(
        lambda place: put(place, {"adapter_config.json": json.dumps(LORA).encode()}),
        "adapter_model.safetensors",
        lambda: [_matrices()],
        "header",
        adapter,
    ),
    "tokenizer": Target(lambda place: put(place, {}), "tokenizer.json", _tokenizers, "text", tokenizer),
    "gguf": Target(lambda place: put(place, {}), GGUF, _ggufs, "front", gguf),
    "pickle": Target(
        lambda place: put(place, {"config.json": good()["config.json"]}),
        "pytorch_model.bin",
        _pickles,
        "front",
        pickled,
    ),
}
