"""Loading as a whole: plan, initialise what is missing, stream, recompute buffers, assign, tie, dispatch, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .budget import MaxMemory
from .checkpoint import Checkpoint
from .device_map import DeviceMap
from .initialize import check_buffers, initialize_missing, recompute_buffers
from .placement import needs_dispatch
from .plan import Plan, make_plan
from .progress import Progress
from .report import LoadReport
from .stream import Streamed, Way, choose_way, stream
from .tree import Tree

if TYPE_CHECKING:
    from .parallel_load import Spread

logger = logging.getLogger("loadstone.loading")


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    device_map: DeviceMap = None,
    max_memory: MaxMemory | None = None,
    no_split: Collection[str] = (),
    skip_keys: str | Sequence[str] | None = None,
    ties: Mapping[str, str] | None = None,
    key_mapping: Mapping[str, str] | None = None,
    base_model_prefix: str = "",
    ignore_unexpected: Sequence[str] = (),
    ignore_missing: Sequence[str] = (),
    ignore_mismatched_sizes: bool = False,
    strict: bool = False,
    offload_buffers: bool = False,
    initialize: Callable[[nn.Module], None] | None = None,
    progress: bool | None = None,
    disable_mmap: bool | None = None,
    spread: Spread | None = None,
) -> LoadReport:
    """Load ``checkpoint`` into ``model``, which is on meta with every weight already of its final dtype.

    Afterwards nothing is on meta (unless ``device_map="meta"``), tied weights are one parameter, and a model on
    several devices, or with weights on disk, has the hooks of `dispatch`. ``model.hf_device_map`` is set if
    ``device_map`` was given.

    ``ties`` maps each tied weight to its source; ``ignore_unexpected`` and ``ignore_missing`` are regexes of names not
    to report; ``initialize(module)`` initialises one module's own weights; modules with non-persistent buffers have
    ``reset_buffers(device)``. Whatever does not fit is logged as a warning, or raised with ``strict``.
    ``disable_mmap``: True reads the files instead of mapping them; None does so where a mapping would be slow.
    ``spread``: over which device mesh, whose device ``device_map`` then is; ParallelError if that cannot be.

    Raises, before any weight is read: DeviceMapError, ShapeMismatchError, MissingWeightsError, UnexpectedWeightsError,
    FormatError, IntegrityError, InitializationError, QuantizationError (which quantizing raises too). While they are
    read: IntegrityError for a file that changes or is cut, ReadError for a disk that fails. If anything raises, an
    interrupt too, the model is as it was before the call.
    """
    started = time.perf_counter()
    plan = make_plan(
        model,
        checkpoint,
        device_map=device_map,
        max_memory=max_memory,
        no_split=no_split,
        ties=ties,
        key_mapping=key_mapping,
        base_model_prefix=base_model_prefix,
        ignore_unexpected=ignore_unexpected,
        ignore_missing=ignore_missing,
        offload_buffers=offload_buffers,
    )
    plan.check(strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes)
    if spread is not None:
        spread.check(plan, checkpoint)
    way = choose_way(plan, disable_mmap)
    try:
        with checkpoint.receiving():
            if plan.tree.packed:
                from .quantize import check_packed

                check_packed(plan, checkpoint, mapped=way.mapped, turn=None if spread is None else spread.turn)
            execute = _execute if spread is None else spread.execute
            streamed = execute(model, plan, checkpoint, way, initialize, progress)
        loaded = len(streamed.tensors)
        streamed.tensors.clear()  # from here on the model alone holds them, so that one that moves is freed
        if plan.placement.given and spread is None:
            model.hf_device_map = plan.placement.as_hf()  # type: ignore[assignment]
        if needs_dispatch(plan.placement):
            from .dispatch import dispatch

            dispatch(model, plan, no_split, skip_keys)
    except BaseException:
        _restore(model, plan.tree)
        raise
    report = _report(plan, checkpoint, streamed, loaded, way, time.perf_counter() - started)
    if not report.fits:
        logger.warning("%s", report)
    return report


def _execute(
    model: nn.Module,
    plan: Plan,
    checkpoint: Checkpoint,
    way: Way,
    initialize: Callable[[nn.Module], None] | None,
    progress: bool | None,
) -> Streamed:
    """Bring all tensors, then put them into the model at once."""
    if plan.placement.main_device.type == "meta":
        return _meta(plan)
    check_buffers(plan.tree)
    values = initialize_missing(model, plan.tree, plan.to_initialize, plan.placement, initialize)
    values.update(recompute_buffers(plan.tree, plan.placement))
    untouched = ("map", "disk", "none") if way.mapped else ("disk", "none")
    copied = sum(move.entry.nbytes for move in plan.moves if move.transform not in untouched)
    with Progress(copied, progress, plan.model_class) as bar:
        streamed = stream(plan, checkpoint, bar if bar.watching else None, way)
    values.update(streamed.tensors)
    _assign(plan.tree, values, streamed.tied)
    for layer in plan.tree.packed.values():
        layer.loaded()  # type: ignore[operator]
    return streamed


def _meta(plan: Plan) -> Streamed:
    """A model that stays on meta; what would be tied, or is there twice, is tied."""
    tied = {**plan.tied, **plan.compare}
    _assign(plan.tree, {name: slot.tensor for name, slot in plan.tree.weights.items()}, tied)
    return Streamed({}, tied, 0, 0)


def _assign(tree: Tree, values: dict[str, torch.Tensor], tied: Mapping[str, str]) -> None:
    parameter = nn.Parameter
    for name, slot in tree.slots():
        value = values.get(name)
        if value is None:
            continue
        if slot.is_parameter and not isinstance(value, parameter):
            value = values[name] = parameter(value, requires_grad=slot.tensor.requires_grad)
        slot.put(value)
    for target, source in tied.items():
        tree.weights[target].put(values[source])


def _restore(model: nn.Module, tree: Tree) -> None:
    """The model as it was: half-loaded models do not exist."""
    from .dispatch import undo

    undo(model)
    for _name, slot in tree.slots():
        slot.put(slot.tensor)
    model.__dict__.pop("hf_device_map", None)


def _report(
    plan: Plan, checkpoint: Checkpoint, streamed: Streamed, loaded: int, way: Way, seconds: float
) -> LoadReport:
    return LoadReport(
        name=checkpoint.name,
        model_class=plan.model_class,
        loaded=loaded,
        missing=plan.missing,
        unexpected=plan.unexpected,
        mismatched=tuple((one.name, one.checkpoint_shape, one.model_shape) for one in plan.mismatched),
        tied=streamed.tied,
        ignored=plan.ignored,
        bytes_total=streamed.bytes_mapped + streamed.bytes_copied + streamed.bytes_quantized,
        bytes_mapped=streamed.bytes_mapped,
        bytes_copied=streamed.bytes_copied,
        bytes_quantized=streamed.bytes_quantized,
        bytes_packed=streamed.bytes_packed,
        not_mapped=way.reason if streamed.bytes_copied else None,
        seconds=seconds,
        device_map=plan.placement.as_hf() if plan.placement.given else None,
    )
