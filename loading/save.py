"""Saving a state dict as a Hub-style safetensors checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..errors import CheckpointError, PathError
from .atomic import Contents, replace_contents, sync_directory
from .source import check_filename
from .writer import check_writable, laid_out, start_sync, sync, tensor_bytes, write_safetensors

CONFIG_NAME = "config.json"
_OPEN_FILES = 8
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_SIZE = re.compile(r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*([A-Za-z]*)\s*")
_VARIANT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def save_checkpoint(
    directory: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    *,
    texts: Mapping[str, str | bytes],
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    tied: Collection[str] = (),
    values: Callable[[str], torch.Tensor] | None = None,
) -> list[str]:
    """Save weights and text files (config.json, ...) to ``directory`` in one step; the names of the files written.

    texts: by name, folders by '/'.
    One ``model.safetensors``, or shards of at most ``max_shard_size`` bytes and an index. Names in ``tied`` are left
    out when another name holds the very same memory. Old weights of the same variant are removed, all else stays.
    A crash or a full disk leaves the old checkpoint whole, also when the tensors are mapped from its files. Needs
    memory for one tensor at most. Raises CheckpointError (meta tensors, undeclared sharing, bad size), PathError,
    and OSError as the system gives it.
    values: gives each tensor when its turn comes, in the order of `written_order`; those of ``state_dict`` then only
    say dtypes and shapes, and nothing is tied.
    """
    names = WeightNames(variant)
    limit = parse_size(max_shard_size)
    for name in texts:
        check_filename(name)
        if names.is_weights(name):
            raise PathError(f"{name!r} cannot be saved as a text file beside the weights of a checkpoint")
    kept = dict(state_dict)
    if values is None:
        for name, tensor in state_dict.items():
            check_writable(name, tensor)
        kept = without_ties(state_dict, tied)
    shards = plan_shards(kept, limit)
    weights = dict(zip(names.files(len(shards)), shards, strict=True))

    def write(staging: Path) -> list[list[str]]:
        _write_weights(staging, weights, values)
        last: dict[str, str] = {}
        if len(weights) > 1:
            last[names.index] = index_text(weights)
        write_texts(staging, {**texts, **last})
        # The config is the last of all: without one there is no checkpoint yet.
        parts = list(weights) if last else []
        whole = list(last) or list(weights)
        return [parts, [name for name in texts if name != CONFIG_NAME], whole, [n for n in texts if n == CONFIG_NAME]]

    written = {*weights, *([names.index] if len(weights) > 1 else [])}
    return replace_contents(directory, Contents(write, lambda name: names.is_weights(name) and name not in written))


def write_texts(directory: Path, texts: Mapping[str, str | bytes]) -> None:
    """Write new files, in UTF-8, and bring them to the disk."""
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
            sync(file)
        if path.parent != directory:
            sync_directory(path.parent)


class WeightNames:
    """File names of one variant's weights: ``model.safetensors``, ``model.fp16-00001-of-00002.safetensors``, ..."""

    def __init__(self, variant: str | None = None) -> None:
        if variant is not None and (not isinstance(variant, str) or not _VARIANT.fullmatch(variant)):
            raise PathError(f"variant={variant!r} cannot be part of a file name; use letters, digits, '_', '-' and '.'")
        self.stem = "model" if variant is None else f"model.{variant}"
        self.single = f"{self.stem}.safetensors"
        self.index = "model.safetensors.index.json" if variant is None else f"model.safetensors.index.{variant}.json"
        self._shard = re.compile(re.escape(self.stem) + r"-\d{5,}-of-\d{5,}\.safetensors")

    def files(self, count: int) -> list[str]:
        if count == 1:
            return [self.single]
        return [f"{self.stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    def is_weights(self, name: str) -> bool:
        """Whether a file of this name is part of this variant's weights."""
        return name in (self.single, self.index) or self._shard.fullmatch(name) is not None


def parse_size(size: int | str) -> int:
    """Bytes of ``5_000_000``, ``"5MB"`` or ``"5MiB"``; CheckpointError if it is not a positive size."""
    number = 0
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match and match[2].upper() in _UNITS:
            number = int(float(match[1]) * _UNITS[match[2].upper()])
    elif isinstance(size, int) and not isinstance(size, bool):
        number = size
    if number <= 0:
        raise CheckpointError(f"max_shard_size={size!r} is not a positive size; give bytes or a text such as '5GB'")
    return number


def plan_shards(tensors: Mapping[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    """Tensors in order, cut into shards of at most ``limit`` bytes; a larger tensor has a shard of its own."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        count = tensor_bytes(tensor)
        if shards[-1] and size + count > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += count
    return shards


def without_ties(state_dict: Mapping[str, torch.Tensor], tied: Collection[str]) -> dict[str, torch.Tensor]:
    """The state dict less the tied names whose memory another name holds; CheckpointError for undeclared sharing."""
    groups: dict[tuple[torch.device, int], list[str]] = {}
    for name, tensor in state_dict.items():
        if tensor_bytes(tensor):
            groups.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(name)
    dropped: set[str] = set()
    for names in groups.values():
        if len(names) > 1:
            dropped |= _shared(state_dict, names, tied)
    return {name: tensor for name, tensor in state_dict.items() if name not in dropped}


def _shared(state_dict: Mapping[str, torch.Tensor], names: list[str], tied: Collection[str]) -> set[str]:
    """Which of the names in one storage to drop. Disjoint parts are kept, each with its own bytes."""
    same: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        tensor = state_dict[name]
        steps = [step for count, step in zip(tensor.shape, tensor.stride(), strict=True) if count > 1]
        key = (tensor.dtype, tensor.shape, *steps, tensor.storage_offset())
        same.setdefault(key, []).append(name)
    dropped: set[str] = set()
    for equal in same.values():
        kept = [name for name in equal if name not in tied] or equal[:1]
        if len(kept) > 1:
            raise _sharing(kept)
        dropped |= set(equal) - set(kept)
    end, last = -1, ""
    for start, stop, name in sorted((*_extent(state_dict[name]), name) for name in names if name not in dropped):
        if start < end:
            raise _sharing([last, name])
        end, last = stop, name
    return dropped


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte in the storage, and the one after the last."""
    span = 1 + sum((int(count) - 1) * int(step) for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + span * tensor.element_size()


def _sharing(names: Sequence[str]) -> CheckpointError:
    listed = ", ".join(repr(name) for name in names)
    return CheckpointError(
        f"tensors {listed} share memory, and a checkpoint cannot hold that; "
        "declare them tied in the model's class, or clone() all but one before saving"
    )


def written_order(tensors: Mapping[str, torch.Tensor], max_shard_size: int | str) -> list[str]:
    """Names in the order in which `save_checkpoint` writes tensors of these dtypes and shapes."""
    return [name for shard in plan_shards(tensors, parse_size(max_shard_size)) for name, _ in laid_out(shard)]


def _write_weights(
    staging: Path,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    values: Callable[[str], torch.Tensor] | None,
) -> None:
    """Write all shards; a thread brings to the disk what is written already."""
    with ThreadPoolExecutor(1) as pool:
        syncs: deque[Future[None]] = deque()
        for name, tensors in weights.items():
            if len(syncs) == _OPEN_FILES:
                syncs.popleft().result()
            file = write_safetensors(
                staging / name, tensors, {"format": "pt"}, lambda file: pool.submit(start_sync, file), values
            )
            syncs.append(pool.submit(sync, file))
        for done in syncs:
            done.result()


def index_text(weights: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """The index of shards, by file name; tensors may be on meta."""
    tensors = [tensor for shard in weights.values() for tensor in shard.values()]
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in tensors),
        "total_size": sum(tensor_bytes(tensor) for tensor in tensors),
    }
    weight_map = {name: file for file, shard in weights.items() for name in shard}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
