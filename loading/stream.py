"""A plan executed: weights mapped, cast or copied to where the plan says, file by file, in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import ArgumentError, IntegrityError
from .arena import allocate
from .checkpoint import Checkpoint
from .files import Files
from .filesystem import far_file_system, free_memory
from .fill import PIECE, fill
from .moves import Move
from .plan import Plan
from .workers import Watch

logger = logging.getLogger("loadstone.loading")


class Way(NamedTuple):
    """Whether files are mapped; if not, why, and whether the reason is that they lie far away."""

    mapped: bool = True
    reason: str | None = None
    far: bool = False

    @property
    def direct(self) -> bool:
        """Whether what the page cache does not have is read past it: a second copy there would be of no use."""
        return not self.mapped and not self.far


MAPPED = Way()


class Streamed(NamedTuple):
    """Loaded tensors by model name, the ties that the bytes confirmed, and what it took, in bytes of the files;
    ``bytes_packed``: of what was made of those that were quantized."""

    tensors: dict[str, torch.Tensor]
    tied: dict[str, str]
    bytes_mapped: int
    bytes_copied: int
    bytes_quantized: int = 0
    bytes_packed: int = 0


def choose_way(plan: Plan, disable_mmap: bool | None) -> Way:
    """As ``disable_mmap`` says; None: files over a network or in FUSE are read from end to end, others mapped.

    What would not fit the free memory if it were read stays mapped, with a warning.
    """
    if disable_mmap is not None:
        if not isinstance(disable_mmap, bool):
            raise ArgumentError(f"disable_mmap= is True, False or None (chosen by itself), not {disable_mmap!r}")
        return Way(False, "disable_mmap=True") if disable_mmap else MAPPED
    in_files = [move for move in plan.moves if move.transform != "none" and move.entry.values is None]
    kind = far_file_system({move.entry.file: None for move in in_files})
    if kind is None:
        return MAPPED
    needed = sum(move.nbytes for move in in_files if move.transform == "map")
    free = free_memory()
    if free is not None and needed > free:
        logger.warning(
            "%s: its files lie on a file system (%s) that is best read from end to end, but their %.1f GB do not fit "
            "the %.1f GB of free memory; they are mapped, and what is touched is read then",
            plan.name, kind, needed / 1e9, free / 1e9,
        )  # fmt: skip
        return MAPPED
    return Way(False, f"a mapping on {kind} would be read page by page", far=True)


def stream(plan: Plan, checkpoint: Checkpoint, watch: Watch | None = None, way: Way = MAPPED) -> Streamed:
    """Execute a plan; ``watch`` is called with the bytes of each piece that is read, cast, copied or quantized.

    Same dtype on the CPU is a private copy-on-write mapping: nothing is read, and writing to the tensor never reaches
    the file; if ``way`` is not to map, it is read into memory of its own. Raises IntegrityError if a file changed since
    its header was read, ReadError if the system cannot read it; no thread and no open file is left.
    """
    with Files(checkpoint, mapped=way.mapped, direct=way.direct) as files:
        tied = confirm_ties(plan, files)
        moves = [move for move in plan.moves if move.target not in tied and move.entry.values is None]
        groups = _grouped(moves, way)
        tensors = _fresh(groups.filled, files, watch, way)
        made = _made([move for move in plan.moves if move.target not in tied and move.entry.values], files, watch)
        tensors.update(made.tensors)
        if groups.packed:
            from .quantize import quantize_on_cpu

            tensors.update(quantize_on_cpu(groups.packed, plan.tree, files, watch))
        if groups.away:
            from .accelerator import send

            tensors.update(send(groups.away, files, watch))
        tensors.update((move.target, files.view(move.entry)) for move in files.in_order(groups.mapped))
    changed = checkpoint.changed_files()
    if changed:
        raise IntegrityError(
            f"{', '.join(str(path) for path in changed)} changed while being loaded; "
            "load again when nothing writes there (saving beside it and renaming is safe)"
        )
    quantized = sum(move.entry.nbytes for move in moves if move.transform == "quantize")
    mapped = sum(move.entry.nbytes for move in groups.mapped)
    copied = sum(move.entry.nbytes for move in moves if move.transform != "none") - mapped - quantized
    return Streamed(
        tensors,
        {**plan.tied, **tied},
        mapped + made.bytes_mapped,
        copied + made.bytes_copied,
        quantized + made.bytes_quantized,
        plan.bytes_quantized()[1],
    )


def _made(moves: Sequence[Move], files: Files, watch: Watch | None) -> Streamed:
    """What does not lie in the files as it is."""
    if not moves:
        return Streamed({}, {}, 0, 0)
    from .bring import bring

    return bring(moves, files, watch)


class _Groups(NamedTuple):
    """Moves by what becomes of their bytes: mapped, filled into CPU memory, packed there, or sent to a device."""

    mapped: list[Move]
    filled: list[Move]
    packed: list[Move]
    away: list[Move]


def _grouped(moves: Sequence[Move], way: Way) -> _Groups:
    groups = _Groups([], [], [], [])
    for move in moves:
        if move.transform == "disk":
            groups.mapped.append(move)
        elif move.transform == "map":
            (groups.mapped if way.mapped else groups.filled).append(move)
        elif move.transform == "quantize":
            (groups.packed if move.device.type == "cpu" else groups.away).append(move)
        elif move.transform != "none":
            (groups.filled if move.device.type == "cpu" else groups.away).append(move)
    return groups


def _fresh(moves: Sequence[Move], files: Files, watch: Watch | None, way: Way) -> dict[str, torch.Tensor]:
    if not moves:
        return {}
    starts = [files.into_page(move.entry) if move.dtype == move.entry.dtype else 0 for move in moves]
    fresh = allocate([(move.entry.shape, move.dtype) for move in moves], starts)
    room = {move.target: tensor for move, tensor in zip(moves, fresh, strict=True)}
    fill(moves, room, files, watch, waiting=way.far)
    return room


def confirm_ties(plan: Plan, files: Files) -> dict[str, str]:
    """Ties whose two weights are equal in the checkpoint; their targets need not be loaded."""
    if not plan.compare:
        return {}
    moves = {move.target: move for move in plan.moves}
    tied: dict[str, str] = {}
    for target, source in plan.compare.items():
        one, other = moves[target], moves[source]
        if one.transform == "none" or _equal(one, other, files):
            tied[target] = source
        else:
            logger.warning(
                "%s: the model ties %r to %r, but the checkpoint holds different values for them; they are loaded as "
                "they are and not tied. Set tie_word_embeddings=False in the config if that is meant.",
                plan.name,
                target,
                source,
            )
    return tied


def _equal(one: Move, other: Move, files: Files) -> bool:
    """Whether two weights will be equal once loaded; pages are read as needed and let go."""
    if one.entry.shape != other.entry.shape or one.dtype != other.dtype:
        return False
    if one.entry.values is not None or other.entry.values is not None:
        from .bring import equal

        return equal(one, other, files)
    count = one.entry.nbytes // one.entry.dtype.itemsize
    step = PIECE // one.dtype.itemsize
    for begin in range(0, count, step):
        left = files.bring(one.entry, begin, min(begin + step, count))
        right = files.bring(other.entry, begin, min(begin + step, count))
        same = left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
        if not same and not torch.equal(left.to(one.dtype), right.to(one.dtype)):
            return False
        files.leave(left, one.entry)
        files.leave(right, other.entry)
    return True
