"""Packed layers while loading: what a file holds of them is checked, and floating-point tensors become codes.

Each tensor is quantized by one thread as it comes from its file, while the system reads those that follow: besides the
codes there is, for each thread, one tensor at most that had to be cast or transposed, and what its method works with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import QuantizationError
from .arena import Populator, allocate
from .checkpoint import Checkpoint
from .files import Files
from .header import TensorEntry
from .moves import Move
from .plan import Plan
from .tree import Tree
from .workers import Watch, run_all, threads_for

_WORTH_A_THREAD = 4 << 20  # bytes
_TOGETHER = 4  # tensors at a time, for the memory that each needs


def check_packed(
    plan: Plan, checkpoint: Checkpoint, *, mapped: bool = True, turn: tuple[int, int] | None = None
) -> None:
    """QuantizationError for packed layers whose tensors in the checkpoint do not fit each other.

    Reads what the layers name in ``read_first``: scales and descriptions, not the codes. turn: which of how many ranks
    this is, that each check some of the layers; None: all.
    """
    first, step = turn or (0, 1)
    mine = dict(list(plan.tree.packed.items())[first::step])
    found: dict[int, dict[str, torch.Tensor]] = {id(layer): {} for layer in mine.values()}
    with Files(checkpoint, mapped=mapped) as files:
        for move in plan.moves:
            slot = plan.tree.weights[move.target]
            layer: Any = slot.module
            if slot.is_packed and move.packing is None and id(layer) in found:
                if slot.attribute in layer.read_first:
                    part = source_of(move.entry, files)
                else:
                    part = torch.empty(move.entry.shape, dtype=move.entry.dtype, device="meta")
                found[id(layer)][slot.attribute] = part
    for name, layer in mine.items():
        parts = found[id(layer)]
        if parts:
            try:
                layer.check_parts(parts)
            except QuantizationError as error:
                raise QuantizationError(f"{checkpoint.name}: quantized layer {name!r}: {error}") from error


def source_of(entry: TensorEntry, files: Files) -> torch.Tensor:
    """A checkpoint's tensor, in its shape, on the CPU; a view of the file where that aligns it."""
    return files.flat(entry, 0, entry.nbytes // entry.dtype.itemsize).view(entry.shape)


def make_codes(move: Move, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the layer's recipe makes of a tensor on its device, by name of weight."""
    packing = move.packing
    assert packing is not None
    recipe = packing.recipe
    try:
        made = recipe.run(tensor.to(recipe.dtype))
    except QuantizationError as error:
        raise QuantizationError(f"tensor {move.entry.name!r} in {move.entry.file.name}: {error}") from error
    if made.keys() != packing.makes.keys():
        raise QuantizationError(
            f"the recipe for {move.target!r} made {sorted(made)}, where it says it makes {sorted(packing.makes)}"
        )
    return {packing.makes[attribute]: part for attribute, part in made.items()}


def quantize_on_cpu(moves: Sequence[Move], tree: Tree, files: Files, watch: Watch | None) -> dict[str, torch.Tensor]:
    """The tensors that all moves make, by a few threads.

    They are copied to memory of their own: left where they were made, among what was freed since, they would keep the
    system from having that back.
    """
    tensors: dict[str, torch.Tensor] = {}
    names = [name for move in moves for name in (move.packing.makes.values() if move.packing is not None else ())]
    held = [tree.weights[name].tensor for name in names]
    room = dict(zip(names, allocate([(tensor.shape, tensor.dtype) for tensor in held]), strict=True))
    populate = Populator()

    def jobs() -> Iterator[Move]:
        for move in files.in_order(moves):
            files.ahead(move.entry)
            yield move

    def do(move: Move) -> int:
        entry = move.entry
        source = files.bring(entry, 0, entry.nbytes // entry.dtype.itemsize)
        for name, part in make_codes(move, source.view(entry.shape)).items():
            place = room[name]
            if place.shape == part.shape and place.dtype == part.dtype:
                populate(place)
                part = place.copy_(part)
            tensors[name] = part
        files.leave(source, entry)
        return entry.nbytes

    work = sum(move.entry.nbytes for move in moves)
    threads = threads_for(min(_TOGETHER, len(moves), -(-work // _WORTH_A_THREAD)))
    run_all(jobs(), do, threads=threads, watch=watch, abandon=files.abandon)
    return tensors
