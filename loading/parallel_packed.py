"""Packed layers over a device mesh: each rank quantizes its share of the numbers, and holds its share of the codes.

What FSDP gathers before a layer runs are codes and scales, as they are: an eighth of what 32-bit weights would be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ParallelError
from ..quant.packed import PackedLinear
from ..quant.shares import as_floats, share_out
from .moves import Move, Packing
from .parallel_mesh import Layout
from .parallel_slices import chunk, part_of
from .plan import Plan

if TYPE_CHECKING:
    from ..quant.shares import Part, Share
    from .tree import Slot


def share_out_packed(model: nn.Module) -> dict[str, torch.dtype]:
    """Make parameters on meta of all that is shared out of packed layers; the dtypes, by name, of those that are held
    under another. ParallelError for layers that cannot be."""
    dtypes: dict[str, torch.dtype] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        if not layer.shared_out:
            raise ParallelError(
                f"{path} is a {type(layer).__name__}, whose codes cannot be spread over a device mesh; those of "
                "BitsAndBytesConfig (4 bits, or int8) can. Or load without device_mesh"
            )
        share_out(layer)
        for attribute in layer.shared_out:
            tensor = layer._parameters.get(attribute)
            if tensor is not None and not tensor.is_floating_point():
                dtypes[f"{path}.{layer.checkpoint_names.get(attribute, attribute)}"] = tensor.dtype
    return dtypes


def hold_as_floats(plan: Plan) -> None:
    """Put what will be sharded of the packed layers, on meta, in place, in the shapes that the files say."""
    shapes = {move.target: move.entry.shape for move in plan.moves if move.packing is None}
    for name, slot in _shared(plan):
        blank = torch.empty(shapes.get(name, tuple(slot.tensor.shape)), dtype=slot.tensor.dtype, device="meta")
        slot.put(nn.Parameter(as_floats(blank), requires_grad=False))


def localize_packed(plan: Plan, layout: Layout) -> Plan:
    """The plan of what this rank quantizes: its part of each tensor, and room for what it makes of that."""
    moves, weights = [], dict(plan.tree.weights)
    for move in plan.moves:
        if move.packing is not None:
            part = _part(move, plan, layout)
            names = {attribute: move.packing.makes[attribute] for attribute in part.makes}
            for attribute, tensor in part.makes.items():
                weights[names[attribute]] = weights[names[attribute]]._replace(tensor=tensor)
            entry = part_of(move.entry, part.shape, part.bounds)
            recipe = move.packing.recipe._replace(shape=entry.shape, makes=tuple(part.makes), run=part.run)
            move = move._replace(entry=entry, packing=Packing(recipe, names, _bytes(move, plan, layout)))
        moves.append(move)
    return replace(plan, moves=tuple(moves), tree=plan.tree._replace(weights=weights))


def complete(plan: Plan, tensors: dict[str, torch.Tensor], layout: Layout) -> None:
    """Add to what this rank has quantized by the whole ``plan`` what takes all ranks; all of them call it."""
    for move in plan.moves:
        if move.packing is None:
            continue
        layer: Any = plan.tree.weights[move.target].module
        names = move.packing.makes
        parts = {attribute: tensors.pop(name) for attribute, name in names.items() if name in tensors}
        gather = partial(_gather, layout=layout)
        for attribute, tensor in layer.completed(parts, _share(layout), gather).items():
            place = move.device if attribute not in layer.stay_on_cpu else torch.device("cpu")
            tensors[names[attribute]] = tensor.to(place)


def _shared(plan: Plan) -> Iterator[tuple[str, Slot]]:
    for name, slot in plan.tree.weights.items():
        if slot.is_packed and slot.is_parameter:
            yield name, slot


def _share(layout: Layout) -> Share:
    return lambda size: chunk(size, layout.fsdp_size, layout.fsdp_rank)


def _part(move: Move, plan: Plan, layout: Layout) -> Part:
    layer: Any = plan.tree.weights[move.target].module
    return layer.part_of(_share(layout))


def _bytes(move: Move, plan: Plan, layout: Layout) -> int:
    """Bytes of this rank's share of what is made."""
    assert move.packing is not None
    total, share = 0, _share(layout)
    for name in move.packing.makes.values():
        slot = plan.tree.weights[name]
        shape = tuple(slot.tensor.shape)
        if slot.is_parameter:
            begin, end = share(shape[0])
            shape = (end - begin, *shape[1:])
        total += math.prod(shape) * slot.tensor.dtype.itemsize
    return total


def _gather(mine: torch.Tensor, size: int, layout: Layout) -> torch.Tensor:
    """The whole of a tensor, of ``size`` rows, from all ranks' chunks."""
    assert layout.fsdp is not None
    step = -(-size // layout.fsdp_size)
    padded = mine.new_zeros(step, *mine.shape[1:])
    padded[: mine.shape[0]] = mine
    parts = [torch.empty_like(padded) for _ in range(layout.fsdp_size)]
    dist.all_gather(parts, padded, group=layout.fsdp.get_group(layout.fsdp.ndim - 1))
    return torch.cat(parts)[:size]
