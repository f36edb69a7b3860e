"""Reader of ``model.safetensors.index.json``: which shard holds which tensor."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError, PathError, UnsafeFormatError
from .source import check_filename
from .strict_json import read_json_file

MAX_INDEX = 64 << 20
MAX_SHARDS = 1 << 14  # each is a file to open, or a request


class Index(NamedTuple):
    """``weight_map`` (tensor name to shard name), the shards in order, the rest of the metadata as it was."""

    file: Path
    weight_map: dict[str, str]
    shards: tuple[str, ...]
    metadata: dict[str, Any]

    @property
    def total_size(self) -> int | None:
        """Bytes of all tensors as the index claims; None if it does not say."""
        size = self.metadata.get("total_size")
        if isinstance(size, float) and size.is_integer():  # some converters wrote 1e9
            size = int(size)
        return size if type(size) is int else None


def read_index(file: str | os.PathLike[str], *, ending: str = ".safetensors") -> Index:
    """Read and check an index of shards whose names have this ending.

    Raises FormatError (not JSON, wrong types, over 64 MiB, over 16384 shards), PathError (a shard outside the
    checkpoint) or UnsafeFormatError (a shard of another ending). A missing ``metadata`` is fine.
    """
    path = Path(file)
    content = read_json_file(path, limit=MAX_INDEX, error=FormatError, what="an index")
    if type(content) is not dict:
        raise FormatError(f"{path}: an index must be a JSON object, not {_kind(content)}")
    weight_map = content.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        found = "is missing" if weight_map is None else f"is {_kind(weight_map)}" if weight_map != {} else "is empty"
        raise FormatError(f"{path}: 'weight_map' {found}; it must map tensor names to shard names")
    for name, shard in weight_map.items():
        if type(shard) is not str:
            raise FormatError(f"{path}: weight_map[{name!r}] must be a file name, not {_kind(shard)}")
    shards = tuple(sorted(set(weight_map.values())))
    if len(shards) > MAX_SHARDS:
        raise FormatError(f"{path}: weight_map names {len(shards)} shards; {MAX_SHARDS} are the most")
    for shard in shards:
        _check_shard(shard, path, ending)
    metadata = content.get("metadata")
    return Index(path, weight_map, shards, metadata if type(metadata) is dict else {})


def _check_shard(shard: str, path: Path, ending: str) -> None:
    try:
        check_filename(shard)
    except PathError as error:
        raise PathError(
            f"{path}: weight_map names the shard {reprlib.repr(shard)}, which is not inside the checkpoint"
        ) from error
    if not shard.endswith(ending):
        reason = ", as other formats can run code" if ending == ".safetensors" else ""
        raise UnsafeFormatError(f"{path}: weight_map names {shard!r}; only {ending} shards are read{reason}")


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        int: "a number",
        float: "a number",
        bool: "a boolean",
    }
    return names.get(type(value), "null")
