"""Saving a model that is spread over a device mesh: one weight at a time is gathered, and the first rank writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ParallelError
from .parallel_agree import Agreement, together
from .parallel_mesh import Layout
from .parallel_shard import whole_tensor
from .save import save_checkpoint, written_order


def save_spread(
    directory: str | os.PathLike[str],
    model: nn.Module,
    layout: Layout,
    *,
    texts: Mapping[str, str | bytes],
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
) -> None:
    """`save_checkpoint` by the mesh's first rank, called on all of them; returns when the files are there.

    Every rank holds one whole weight at a time. What the first rank raises, it raises after all ranks are done, and
    the others raise ParallelError.
    """
    agreement = Agreement(layout.mesh)
    weights = _once(model)
    blanks = {
        name: torch.empty(
            layout.folded.get(name, tuple(tensor.shape)), dtype=layout.codes.get(name, tensor.dtype), device="meta"
        )
        for name, tensor in weights.items()
    }
    stages = dict.fromkeys(blanks, 0)
    if layout.pp is not None:
        blanks, stages = _of_all_stages(blanks, layout, agreement)
    order = written_order(blanks, max_shard_size)
    gathered = (
        _gathered(weights, blanks, order) if layout.pp is None else _brought(weights, blanks, order, stages, layout)
    )
    failed: BaseException | None = None
    if _is_first(layout):

        def values(name: str) -> torch.Tensor:
            found, tensor = next(gathered)
            if found != name:
                raise ParallelError(f"{name!r} was to be written where {found!r} was gathered")
            return tensor

        try:
            save_checkpoint(
                directory, blanks, texts=texts, max_shard_size=max_shard_size, variant=variant, values=values
            )
        except BaseException as error:  # the others are waiting: go on with them to the end
            failed = error
    for _ in gathered:
        pass
    if failed is not None:
        agreement.fail(failed)
        raise failed
    agreement.meet()


def first_writes(
    layout: Layout, tensors: Mapping[str, Any], write: Callable[[Mapping[str, torch.Tensor]], None]
) -> None:
    """``write`` of whole tensors, together small enough for memory, on the CPU by the mesh's first rank; called on all
    of its ranks, and all raise if it does."""
    with together(layout), torch.no_grad():
        gathered = {}
        for name, tensor in tensors.items():
            whole = whole_tensor(tensor)
            if _is_first(layout):
                gathered[name] = whole.to("cpu")
        if _is_first(layout):
            write(gathered)


def _is_first(layout: Layout) -> bool:
    return dist.get_rank() == int(layout.mesh.mesh.flatten()[0])


def _once(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of the model: tied weights under their first name."""
    seen: set[int] = set()
    found: dict[str, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _gathered(
    weights: Mapping[str, Any], blanks: Mapping[str, torch.Tensor], order: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole weights in the order they are written in, on the CPU; a collective for each, so all ranks must go on."""
    with torch.no_grad():
        for name in order:
            yield name, _whole(weights[name], blanks[name])


def _whole(weight: Any, blank: torch.Tensor) -> torch.Tensor:
    tensor = weight.detach()
    whole = whole_tensor(tensor, blank.dtype) if hasattr(tensor, "full_tensor") else tensor
    return whole.to("cpu").view(blank.dtype).reshape(blank.shape)


def _of_all_stages(
    blanks: Mapping[str, torch.Tensor], layout: Layout, agreement: Agreement
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The weights of all stages of a pipeline, on meta, and the first stage that holds each."""
    mine = {name: (tuple(blank.shape), blank.dtype) for name, blank in blanks.items()}
    told = agreement.meet(stage=layout.stage, weights=mine).values()
    found: dict[str, torch.Tensor] = {}
    stages: dict[str, int] = {}
    for facts in sorted(told, key=lambda facts: facts["stage"]):
        for name, (shape, dtype) in facts["weights"].items():
            if name not in found:
                found[name], stages[name] = torch.empty(shape, dtype=dtype, device="meta"), facts["stage"]
    return found, stages


def _brought(
    weights: Mapping[str, Any],
    blanks: Mapping[str, torch.Tensor],
    order: list[str],
    stages: Mapping[str, int],
    layout: Layout,
) -> Iterator[tuple[str, torch.Tensor]]:
    """`_gathered` over the stages of a pipeline: the rank that writes gets each weight from a rank of its stage."""
    assert layout.pp is not None
    group, ranks = layout.pp.get_group(), layout.mesh.mesh
    writer, me = int(ranks.flatten()[0]), dist.get_rank()
    senders = [int(stage.flatten()[0]) for stage in ranks]
    with torch.no_grad():
        for name in order:
            blank, sender = blanks[name], senders[stages[name]]
            value = _whole(weights[name], blank) if stages[name] == layout.stage else blank
            if sender != writer and me == sender:
                dist.send(value.to(layout.device), writer, group=group)
            elif sender != writer and me == writer:
                value = torch.empty(blank.shape, dtype=blank.dtype, device=layout.device)
                dist.recv(value, sender, group=group)
            yield name, value.to("cpu") if not value.is_meta else value
