"""Tensors of GGUF files as entries of a checkpoint: plain numbers lie there as they are, blocks are decoded on the way.

Blocks are decoded by the package gguf, some rows at a time, straight into the weight, its cast, or what quantizes it.
The package's own reader is not used: it believes the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import FormatError, MissingDependencyError, MissingWeightsError, NotFoundError
from .checkpoint import Checkpoint
from .gguf_header import GGUFHeader, GGUFTensor, Kind, read_gguf_header
from .header import FileStamp, TensorEntry
from .source import Source, what_is_there
from .values import Values

if TYPE_CHECKING:
    from .files import Files

_PLAIN: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class RowOrder(NamedTuple):
    """Row ``i`` of a weight is row ``rows[i]`` of the file's tensor; rows move only inside groups of ``group``."""

    rows: torch.Tensor
    group: int


class Blocks(Values):
    """Numbers in blocks of ``kind``, ``stored`` bytes from ``begin`` on, their rows in another ``order`` or not."""

    def __init__(self, tensor: GGUFTensor, order: RowOrder | None = None) -> None:
        self.kind, self.begin, self.stored, self.order = tensor.kind, tensor.begin, tensor.nbytes, order
        self.form = tensor.kind.name if tensor.kind.name not in _PLAIN else None
        self.columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        self.grain = self.kind.block if order is None else order.group * self.columns

    def ready(self, entry: TensorEntry, files: Files) -> torch.Tensor:
        return self.part(entry, files, 0, entry.nbytes // entry.dtype.itemsize).view(entry.shape)

    def part(self, entry: TensorEntry, files: Files, begin: int, end: int) -> torch.Tensor:
        if end <= begin:
            return torch.empty(0, dtype=entry.dtype, device="cpu")
        if self.order is None:
            first = begin // self.kind.block * self.kind.block
            return self._decoded(entry, files, first, end)[begin - first : end - first]
        rows = self.order.rows[begin // self.columns : -(-end // self.columns)]
        low, high = int(rows.min()), int(rows.max()) + 1
        lying = self._decoded(entry, files, low * self.columns, high * self.columns).view(-1, self.columns)
        first = begin // self.columns * self.columns
        return lying[rows - low].view(-1)[begin - first : end - first]

    def _decoded(self, entry: TensorEntry, files: Files, begin: int, end: int) -> torch.Tensor:
        """Elements of the file's tensor from the first of a block on, as the file has them ordered."""
        block, size = self.kind.block, self.kind.nbytes
        first, last = begin // block, -(-end // block)
        octets = torch.empty((last - first) * size, dtype=torch.uint8, device="cpu")
        files.reader.into(octets, entry.file, self.begin + first * size)
        plain = _PLAIN.get(self.kind.name)
        numbers = octets.view(plain) if plain is not None else decode(octets, self.kind)
        return numbers[begin - first * block : end - first * block]


def decode(octets: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The numbers, float32, of blocks, uint8, of a kind: one-dimensional both.

    Raises MissingDependencyError without the package gguf, FormatError for a kind that it cannot decode.
    """
    quants = _package()
    import numpy  # gguf needs it too

    try:
        known = quants.GGMLQuantizationType[kind.name]
        with numpy.errstate(all="ignore"):  # blocks of any bytes have values; not all of them are numbers
            numbers = quants.dequantize(octets.numpy().reshape(1, -1), known)
    except (KeyError, NotImplementedError):
        raise FormatError(
            f"the installed package gguf cannot decode {kind.name}; upgrade it (pip install -U gguf)"
        ) from None
    return torch.from_numpy(numbers.reshape(-1))


@lru_cache(maxsize=1)
def _package() -> Any:
    try:
        from gguf import quants
    except ImportError as error:
        raise MissingDependencyError(
            "the weights of this GGUF file are in blocks, which the package gguf decodes, and it is not installed: "
            "pip install 'loadstone[gguf]'"
        ) from error
    return quants


def gguf_headers(source: Source, filename: str) -> list[GGUFHeader]:
    """The headers of a GGUF file of a source, or of all its shards (``...-00001-of-00003.gguf``), in order.

    Raises NotFoundError, MissingWeightsError (shards), and FormatError, also for shards that do not belong together.
    """
    path = source.find(filename)
    if path is None:
        names = [name for name in source.listing() if name.endswith(".gguf")] or source.listing()
        raise NotFoundError(f"{source.describe()} has no file {filename!r} ({what_is_there(names)})")
    first = _header_of(path, FileStamp.of(path.stat()))
    count = first.fields.get("split.count", 1)
    if type(count) is not int or count < 2:
        return [first]
    match = _SHARD.fullmatch(filename)
    if match is None or int(match[3]) != count:
        raise FormatError(
            f"{path} is one of {count} files, but its name does not say which: ...-00001-of-{count:05d}.gguf"
        )
    names = [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, count + 1)]
    headers = [_header_of(path, FileStamp.of(path.stat())) for path in source.fetch(names)]
    for number, header in enumerate(headers):
        if header.fields.get("split.count") != count or header.fields.get("split.no") != number:
            raise FormatError(f"{header.file} is not number {number + 1} of {count} files, as its name says")
    total = headers[0].fields.get("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if total is not None and total != found:
        raise MissingWeightsError(f"{path}: the {count} files should hold {total} tensors and hold {found}")
    return headers


@lru_cache(maxsize=64)
def _header_of(path: Any, stamp: FileStamp) -> GGUFHeader:
    """One header, remembered while its file stays the same: configuration and weights both ask for it."""
    return read_gguf_header(path)


def gguf_entry(header: GGUFHeader, tensor: GGUFTensor, name: str, order: RowOrder | None = None) -> TensorEntry:
    """A tensor as an entry under a name of the model's, its rows in the model's order.

    Raises FormatError for an order of other rows than it has.
    """
    if order is not None and len(order.rows) != tensor.shape[0]:
        raise FormatError(
            f"{header.file}: tensor {tensor.name!r} has {tensor.shape[0]} rows, its heads make {len(order.rows)}"
        )
    if order is not None and len(tensor.shape) == 1 and tensor.kind.block > 1:
        raise FormatError(f"{header.file}: tensor {tensor.name!r} is a vector in blocks of {tensor.kind.name}")
    dtype = _PLAIN.get(tensor.kind.name)
    if dtype is not None and order is None and tensor.begin % dtype.itemsize == 0:
        return TensorEntry(name, dtype, tensor.shape, header.file, tensor.begin, tensor.nbytes)
    made = dtype or torch.float32
    return TensorEntry(name, made, tensor.shape, header.file, -1, tensor.numel * made.itemsize, Blocks(tensor, order))


def gguf_checkpoint(name: str, headers: Sequence[GGUFHeader], entries: Mapping[str, TensorEntry]) -> Checkpoint:
    """The checkpoint of these entries, in the order of their files.

    Raises, before any weight is read, what decoding them would: MissingDependencyError, FormatError.
    """
    kinds = {entry.values.kind for entry in entries.values() if isinstance(entry.values, Blocks)}
    for kind in kinds:
        if kind.name not in _PLAIN:
            decode(torch.zeros(kind.nbytes, dtype=torch.uint8, device="cpu"), kind)
    return Checkpoint(
        name=name,
        files=tuple(header.file for header in headers),
        entries=dict(entries),
        metadata={},
        total_bytes=sum(entry.nbytes if entry.values is None else entry.values.stored for entry in entries.values()),
        stamps={header.file: header.stamp for header in headers},
    )


def small_tensor(header: GGUFHeader, tensor: GGUFTensor) -> list[float]:
    """The numbers of a small plain vector (F32, F16, BF16), read at once.

    Raises FormatError for one that is large or in blocks.
    """
    dtype = _PLAIN.get(tensor.kind.name)
    if dtype is None or len(tensor.shape) != 1 or tensor.nbytes > 1 << 20:
        raise FormatError(f"{header.file}: tensor {tensor.name!r} should be a short vector of plain numbers")
    from .regular import open_regular

    with open_regular(header.file) as file:
        raw = bytearray(file.read(tensor.begin, tensor.nbytes))
    return torch.frombuffer(raw, dtype=dtype).double().tolist()
