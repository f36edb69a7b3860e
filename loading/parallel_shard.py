"""A model on meta becomes one of distributed tensors: cut for tensor parallelism, then wrapped for FSDP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ParallelError
from .parallel_mesh import Layout
from .parallel_slices import Cut, chunk
from .tree import Tree

if TYPE_CHECKING:
    from .parallel_agree import Agreement


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
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

    config, own = layout.config, type(model)
    options: dict[str, Any] = {"mp_policy": config.mixed_precision or MixedPrecisionPolicy()}
    if config.reshard_after_forward is not None:
        options["reshard_after_forward"] = config.reshard_after_forward
    for module in (*map(model.get_submodule, units), model):
        shard(module, layout, **options)
    made: Any = type(model)
    if own not in made.__bases__:  # the class that another library sees in its place would be a base of the new one
        model.__class__ = type(made.__name__, (FSDPModule, own), {"__deepcopy__": made.__deepcopy__})


def shard(module: nn.Module, layout: Layout, **options: Any) -> None:
    """``fully_shard`` a module over the layout's ranks; options as of that."""
    from torch.distributed.fsdp import fully_shard

    wrapped: Any = fully_shard(module, mesh=layout.fsdp, **options)
    if layout.device.type == "cpu":  # gloo's own average is the sum in older versions of torch
        wrapped.set_force_sum_reduction_for_comms(True)
    layout.spread.update(module.modules())


def let_go(model: nn.Module) -> None:
    """Make every parameter a share again; what a forward left gathered is freed."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def drawn_alike(agreement: Agreement | None, layout: Layout | None) -> Iterator[None]:
    """Within, all ranks draw the numbers that the first one would; afterwards the others go on as if they had not.
    None: nothing to do."""
    if agreement is None or layout is None:
        yield
        return
    sources: list[Any] = [torch]
    if layout.device.type != "cpu":
        sources.append(torch.get_device_module(layout.device))
    mine = [source.get_rng_state() for source in sources]
    told = agreement.meet(states=mine)
    first = min(told)
    for source, state in zip(sources, told[first]["states"], strict=True):
        source.set_rng_state(state)
    try:
        yield
    finally:
        if dist.get_rank() != first:
            for source, state in zip(sources, mine, strict=True):
                source.set_rng_state(state)


def distributed(local: torch.Tensor, mesh: Any, placements: Any, shape: Sequence[int]) -> torch.Tensor:
    """The distributed tensor of which ``local`` is this rank's part; no rank is asked."""
    from torch.distributed.tensor import DTensor

    whole = torch.Size(shape)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole, stride=stride)


def whole_tensor(tensor: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The whole of a distributed tensor; all its ranks call it. dtype: seen as this one, of the same size."""
    local = tensor.to_local()
    if dtype is None or dtype == local.dtype:
        return tensor.full_tensor()
    seen = distributed(local.view(dtype), tensor.device_mesh, tensor.placements, tensor.shape)
    return seen.full_tensor()  # type: ignore[attr-defined]


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
