"""A rank's part of each tensor of a checkpoint: rows are a range of the file, columns a step through it.

A weight is cut for tensor parallelism first, along the dimension its style says, then for FSDP along its first
dimension; both in equal steps, the last ones shorter or empty, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from .header import TensorEntry
from .moves import Move
from .parallel_mesh import Layout
from .plan import Plan
from .values import Values

if TYPE_CHECKING:
    from .files import Files

_WORTH_SKIPPING = 1 << 12  # bytes between two pieces of a file, from which on reading them costs more than a call


class Cut(NamedTuple):
    """How tensor parallelism cuts a weight: along ``dim``, which holds ``parts`` matrices side by side (the query, key
    and value of one projection), each of them cut by itself."""

    dim: int
    parts: int = 1

    def viewed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which ``parts`` have a dimension of their own, in front of the one that is cut."""
        if self.parts == 1:
            return shape
        return (*shape[: self.dim], self.parts, shape[self.dim] // self.parts, *shape[self.dim + 1 :])

    @property
    def viewed_dim(self) -> int:
        """The dimension that is cut, in the viewed shape."""
        return self.dim if self.parts == 1 else self.dim + 1


def chunk(size: int, count: int, index: int) -> tuple[int, int]:
    """Begin and end of one of ``count`` chunks of ``size``, in steps that are rounded up."""
    step = -(-size // count)
    begin = min(index * step, size)
    return begin, min(begin + step, size)


def region(shape: tuple[int, ...], cut: Cut | None, layout: Layout) -> tuple[tuple[int, int], ...]:
    """This rank's (begin, end) in each dimension of a weight, in the shape its cut views it in."""
    viewed = shape if cut is None else cut.viewed(shape)
    bounds = [(0, size) for size in viewed]
    if cut is not None:
        bounds[cut.viewed_dim] = chunk(viewed[cut.viewed_dim], layout.tp_size, layout.tp_rank)
    if layout.fsdp is not None and bounds:
        begin, end = bounds[0]
        first, last = chunk(end - begin, layout.fsdp_size, layout.fsdp_rank)
        bounds[0] = begin + first, begin + last
    return tuple(bounds)


def localize(plan: Plan, cuts: Mapping[str, Cut], layout: Layout) -> Plan:
    """The plan of what this rank reads: each parameter's move with its part of the tensor; buffers are whole.

    What is quantized is left as it is: see `parallel_packed.localize_packed`.
    """
    moves = []
    for move in plan.moves:
        if plan.tree.weights[move.target].is_parameter and move.packing is None:
            viewed = move.entry.shape if (cut := cuts.get(move.target)) is None else cut.viewed(move.entry.shape)
            move = _part_of(move, viewed, region(move.entry.shape, cut, layout))
        moves.append(move)
    return replace(plan, moves=tuple(moves))


def _part_of(move: Move, shape: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> Move:
    entry = part_of(move.entry, shape, bounds)
    if move.transform in ("map", "copy"):
        mapped = entry.values is None and move.device.type == "cpu" and entry.offset % entry.dtype.itemsize == 0
        move = move._replace(transform="map" if mapped else "copy")
    return move._replace(entry=entry)


def part_of(entry: TensorEntry, shape: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> TensorEntry:
    """The entry of a part of a tensor seen in ``shape``: a range of its file where it is one."""
    local = tuple(end - begin for begin, end in bounds)
    nbytes = math.prod(local) * entry.dtype.itemsize
    if local == shape:
        return entry._replace(shape=local)
    cut_at = next((dim for dim in range(len(shape) - 1, 0, -1) if local[dim] != shape[dim]), 0)
    block = _Block(
        rows=tuple(bound * math.prod(shape[1:cut_at]) for bound in bounds[0]) if cut_at else (0, 1),
        columns=tuple(bound * math.prod(shape[cut_at + 1 :]) for bound in bounds[cut_at]),
        width=math.prod(shape[cut_at:]),
    )
    if entry.values is None and not cut_at:
        offset = entry.offset + block.columns[0] * entry.dtype.itemsize
        return entry._replace(shape=local, offset=offset, nbytes=nbytes)
    return entry._replace(shape=local, offset=-1, nbytes=nbytes, values=PartOf(entry, block, nbytes))


class _Block(NamedTuple):
    """Rows and columns of a matrix of rows of ``width`` elements."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    width: int


class PartOf(Values):
    """A block of a tensor that is stored whole."""

    def __init__(self, whole: TensorEntry, block: _Block, stored: int) -> None:
        self.whole, self.block, self.stored = whole, block, stored
        self.grain = max(1, block.columns[1] - block.columns[0])

    def ready(self, entry: TensorEntry, files: Files) -> torch.Tensor:
        return self.part(entry, files, 0, math.prod(entry.shape)).view(entry.shape)

    def part(self, entry: TensorEntry, files: Files, begin: int, end: int) -> torch.Tensor:
        taken, block = self.grain, self.block
        if end <= begin:
            return torch.empty(0, dtype=entry.dtype, device="cpu")
        first, last = begin // taken, -(-end // taken)  # rows of the block
        start = (block.rows[0] + first) * block.width + block.columns[0]
        skipped = (block.width - taken) * entry.dtype.itemsize
        if self.whole.values is None and not files.maps(self.whole) and skipped >= _WORTH_SKIPPING:
            rows = torch.empty(last - first, taken, dtype=entry.dtype, device="cpu")
            for number, row in enumerate(rows):
                files.read(self.whole, start + number * block.width, row)
        else:
            span = (last - first - 1) * block.width + taken
            if self.whole.values is None:
                found = files.bring(self.whole, start, start + span)
            else:
                found = files.flat(self.whole, start, start + span)
            # copied, for the pages it lies in are let go; what lies between the pieces is not touched
            rows = found.as_strided((last - first, taken), (block.width * found.stride(0), found.stride(0))).clone()
            files.leave(found, self.whole)
        return rows.view(-1)[begin - first * taken : end - first * taken]
