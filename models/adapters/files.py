"""PEFT's adapter format, adapter_config.json and adapter_model.safetensors: written, and read as files of strangers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...errors import (
    ArgumentError,
    ConfigError,
    MissingWeightsError,
    NotFoundError,
    ShapeMismatchError,
    UnexpectedWeightsError,
    UnsafeFormatError,
    nearest,
)
from ...loading.atomic import Contents, replace_contents
from ...loading.checkpoint import Checkpoint
from ...loading.files import Files
from ...loading.header import TensorEntry, read_header
from ...loading.parallel_agree import together
from ...loading.parallel_save import first_writes
from ...loading.parallel_shard import let_go
from ...loading.parallel_slices import chunk
from ...loading.source import Source
from ...loading.strict_json import read_json_file
from ...loading.writer import check_writable, sync, write_safetensors
from .attach import attach, check_head, lora_layers, outer_modules, set_adapter
from .config import LoraConfig
from .layer import features, is_adaptable
from .source import CONFIG

if TYPE_CHECKING:
    from ...loading.parallel_mesh import Layout
    from ..causal_lm import CausalLM

WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MOST_CONFIG = 1 << 20
_SHOWN = 4


def save_adapter(model: CausalLM, directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """See `AdapterMethods.save_adapter`."""
    name = adapter_name if adapter_name is not None else model.active_adapter
    if name is None or name not in model.adapters:
        held = ", ".join(model.adapters) or "none"
        raise ArgumentError(f"there is no adapter {name!r} to save (the model has {held})")
    config = model.adapters[name]
    if model.layout is not None:
        let_go(model)
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.scaling}
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        for side, matrices in (("A", layer.lora_A), ("B", layer.lora_B)):
            key = f"base_model.model.{path}.lora_{side}.weight"
            tensors[key] = matrices[name].weight.detach()  # type: ignore[operator]
    values = config.to_dict(in_out=any(layer.in_out for layer in layers.values()))
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = model.name_or_path or None
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"

    def write_all(tensors: Mapping[str, Tensor]) -> None:
        def write(staging: Path) -> Sequence[Sequence[str]]:
            (staging / CONFIG).write_text(text, encoding="utf-8")
            sync(write_safetensors(staging / WEIGHTS, tensors, {"format": "pt"}))
            return [[WEIGHTS], [CONFIG]]

        for key, tensor in tensors.items():
            check_writable(key, tensor)
        replace_contents(directory, Contents(write, lambda old: old == _PICKLE))

    if model.layout is None:
        write_all(tensors)
    else:
        first_writes(model.layout, tensors, write_all)


def read_config(source: Source) -> LoraConfig:
    """The checked configuration of the adapter at ``source``; NotFoundError, PathError or ConfigError."""
    path = source.require(CONFIG)
    values = read_json_file(path, limit=_MOST_CONFIG, error=ConfigError, what="an adapter's configuration")
    try:
        return LoraConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{CONFIG} of {source.describe()}: {error}") from error


def load_adapter(model: CausalLM, source: Source, adapter_name: str = "default", is_trainable: bool = False) -> None:
    """See `AdapterMethods.load_adapter`. Everything is checked before the model changes."""
    with together(model.layout) as agreement:
        config = read_config(source)
        checkpoint = _open(source)
        pairs = _pairs(checkpoint)
        _check(model, config, source, pairs)
        targets = [name for name, _ in outer_modules(model) if name in pairs]
        values = _read(checkpoint, pairs, model.layout)
        attach(model, config, adapter_name, targets, agreement)
        layers = lora_layers(model)
        for name in targets:
            for side, matrices in (("A", layers[name].lora_A), ("B", layers[name].lora_B)):
                weight: Any = matrices[adapter_name].weight
                mine = weight.detach() if model.layout is None else weight.detach().to_local()
                mine.copy_(values[name, side])
        set_adapter(model, adapter_name, trainable=is_trainable)


def _open(source: Source) -> Checkpoint:
    path = source.find(WEIGHTS)
    if path is not None:
        return Checkpoint.from_headers(source.name, [read_header(path)])
    if source.find(_PICKLE) is not None:
        raise UnsafeFormatError(
            f"{source.describe()} holds its adapter as {_PICKLE}, a pickle, which can run code when opened and is not "
            "read; save it again as safetensors (PEFT's default)"
        )
    raise NotFoundError(f"{source.describe()} has a {CONFIG} but no {WEIGHTS}")


def _read(
    checkpoint: Checkpoint, pairs: dict[str, dict[str, TensorEntry]], layout: Layout | None
) -> dict[tuple[str, str], Tensor]:
    """The matrices in memory, or this rank's rows of them, by layer and side; IntegrityError or ReadError for a file
    that has changed or fails."""
    found = {}
    with Files(checkpoint, mapped=False) as files:
        for name, pair in pairs.items():
            for side, entry in pair.items():
                rows, width = entry.shape
                begin, end = (0, rows) if layout is None else chunk(rows, layout.fsdp_size, layout.fsdp_rank)
                found[name, side] = files.flat(entry, begin * width, end * width).view(end - begin, width)
    return found


def _pairs(checkpoint: Checkpoint) -> dict[str, dict[str, TensorEntry]]:
    """{layer: {"A": tensor, "B": tensor}}."""
    pairs: dict[str, dict[str, TensorEntry]] = {}
    strange = []
    for key, entry in checkpoint.entries.items():
        found = _KEY.fullmatch(key)
        if found is None or not entry.dtype.is_floating_point:
            strange.append(key)
        else:
            pairs.setdefault(found[1], {})[found[2]] = entry
    if strange:
        raise UnexpectedWeightsError(
            f"the adapter {checkpoint.name!r} holds {len(strange)} tensor(s) that are no LoRA matrices: "
            f"{', '.join(map(repr, strange[:_SHOWN]))}; such an adapter loads with PEFT"
        )
    if not pairs:
        raise MissingWeightsError(f"the adapter {checkpoint.name!r} holds no tensors")
    return pairs


def _check(model: CausalLM, config: LoraConfig, source: Source, pairs: dict[str, dict[str, TensorEntry]]) -> None:
    """Raise unless each pair fits its layer."""
    modules = dict(outer_modules(model))
    for name, pair in pairs.items():
        module = modules.get(name)
        if module is None or not is_adaptable(module):
            raise UnexpectedWeightsError(
                f"the adapter of {source.describe()} is for a layer {name!r}, which {type(model).__name__} "
                f"has not{nearest(name, [n for n, m in modules.items() if is_adaptable(m)])}; is it another model's?"
            )
        wide, high = features(module)
        for side, shape in (("A", (config.r, wide)), ("B", (high, config.r))):
            if side not in pair:
                raise MissingWeightsError(f"the adapter of {source.describe()} has no lora_{side} for {name!r}")
            if pair[side].shape != shape:
                raise ShapeMismatchError(
                    f"lora_{side} of {name!r} in {source.describe()} has shape {pair[side].shape}, "
                    f"the model needs {shape} (rank {config.r})"
                )
    check_head(model, list(pairs))
