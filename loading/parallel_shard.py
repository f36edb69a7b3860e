"""A model on meta becomes one of distributed tensors: cut for tensor parallelism, then wrapped for FSDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ParallelError
from .parallel_mesh import Layout
from .parallel_slices import Cut, chunk
from .tree import Tree


def check_divides(tree: Tree, cuts: Mapping[str, Cut], layout: Layout) -> None:
    """ParallelError naming every weight that cannot be shared out evenly over the tp ranks."""
    size, uneven = layout.tp_size, []
    for name, cut in cuts.items():
        shape = tuple(tree.weights[name].tensor.shape)
        if cut.dim >= len(shape) or shape[cut.dim] % (cut.parts * size):
            parts = f" ({cut.parts} matrices side by side)" if cut.parts > 1 else ""
            uneven.append(f"{name!r} of shape {shape} along dimension {cut.dim}{parts}")
    if uneven:
        raise ParallelError(
            f"tp={size} cannot share out evenly: {', '.join(uneven[:6])}"
            f"{f' and {len(uneven) - 6} more' if len(uneven) > 6 else ''}; use another tp size, or keep these modules "
            "whole with parallel=ParallelConfig(tp_plan={'name': None})"
        )


def cut_on_meta(tree: Tree, cuts: Mapping[str, Cut], ties: Mapping[str, str], layout: Layout) -> None:
    """Make every parameter a distributed tensor over the tp ranks, on meta; tied ones one and the same."""
    from torch.distributed.tensor import Replicate, Shard

    made: dict[str, nn.Parameter] = {}
    for name, slot in tree.weights.items():
        if not slot.is_parameter:
            continue
        source = ties.get(name)
        if source in made:
            slot.put(made[source])
            continue
        cut, shape = cuts.get(name), tuple(slot.tensor.shape)
        placement: Any = Replicate()
        local = shape
        if cut is not None:
            shape, dim = cut.viewed(shape), cut.viewed_dim
            begin, end = chunk(shape[dim], layout.tp_size, layout.tp_rank)
            local = (*shape[:dim], end - begin, *shape[dim + 1 :])
            placement = Shard(dim)
        part = torch.empty(local, dtype=slot.tensor.dtype, device="meta")
        tensor = distributed(part, layout.tp, (placement,), shape)
        made[source or name] = parameter = nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad)
        slot.put(parameter)


def wrap_for_fsdp(model: nn.Module, units: Sequence[str], layout: Layout) -> None:
    """``fully_shard`` each unit and then what is left; parameters become shards along their first dimension."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    config, own = layout.config, type(model)
    options: dict[str, Any] = {"mesh": layout.fsdp, "mp_policy": config.mixed_precision or MixedPrecisionPolicy()}
    if config.reshard_after_forward is not None:
        options["reshard_after_forward"] = config.reshard_after_forward
    for module in (*map(model.get_submodule, units), model):
        wrapped: Any = fully_shard(module, **options)
        if layout.device.type == "cpu":  # gloo's own average is the sum in older versions of torch
            wrapped.set_force_sum_reduction_for_comms(True)
    made: Any = type(model)
    if own not in made.__bases__:  # the class that another library sees in its place would be a base of the new one
        model.__class__ = type(made.__name__, (FSDPModule, own), {"__deepcopy__": made.__deepcopy__})


def distributed(local: torch.Tensor, mesh: Any, placements: Any, shape: Sequence[int]) -> torch.Tensor:
    """The distributed tensor of which ``local`` is this rank's part; no rank is asked."""
    from torch.distributed.tensor import DTensor

    whole = torch.Size(shape)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole, stride=stride)


def filled(blank: nn.Parameter, local: torch.Tensor, name: str) -> nn.Parameter:
    """The parameter that ``blank``, on meta, becomes with this rank's values."""
    held: Any = blank
    if not hasattr(held, "to_local"):  # only layers are shared out, whole
        return nn.Parameter(local, requires_grad=blank.requires_grad)
    expected = tuple(held.to_local().shape)
    if tuple(local.shape) != expected:
        raise ParallelError(f"{name!r}: torch holds a part of shape {expected} here, {tuple(local.shape)} was read")
    tensor = distributed(local, held.device_mesh, held.placements, held.shape)
    return nn.Parameter(tensor, requires_grad=blank.requires_grad)
