"""A plan carried out over a device mesh: each rank shards the model on meta and brings its own parts of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import ParallelError
from ..quant.shares import as_floats
from .initialize import check_buffers, initialize_missing, recompute_buffers
from .parallel_agree import Agreement
from .parallel_mesh import Layout
from .parallel_packed import complete, hold_as_floats, localize_packed
from .parallel_shard import check_divides, cut_on_meta, filled, wrap_for_fsdp
from .parallel_slices import Cut, localize, region
from .plan import Plan
from .progress import Progress
from .stream import Streamed, Way, stream

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .device_map import Placement


@dataclass(eq=False)
class Spread:
    """What `load_into` needs to load onto a mesh. ``cuts``: by the names of weights; ``units``: names of the modules
    that FSDP gathers one after the other; ``commit``: of the source, on which all ranks must agree."""

    layout: Layout
    agreement: Agreement
    cuts: Mapping[str, Cut]
    units: Sequence[str]
    commit: str | None = None

    def check(self, plan: Plan, checkpoint: Checkpoint) -> None:
        """Raise what cannot be spread, then agree with all ranks on what will be loaded; nothing is read yet."""
        if not plan.placement.main_device.type == self.layout.device.type:
            raise ParallelError("device_map and device_mesh were both given; the mesh says where weights live")
        check_buffers(plan.tree)
        check_divides(plan.tree, self.cuts, self.layout)
        for target, source in self._ties(plan).items():
            if self.cuts.get(target) != self.cuts.get(source):
                raise ParallelError(
                    f"{target!r} and {source!r} are one weight, but tp would cut them as {self.cuts.get(target)} and "
                    f"{self.cuts.get(source)}; give both modules styles that cut alike, or keep both whole"
                )
        files = _fingerprint(checkpoint)
        if self.layout.pp is None:
            self.agreement.same(commit=self.commit, checkpoint=files, plan=self._told(plan))
        else:
            layers = self.layout.config.layers_per_stage
            self.agreement.same(commit=self.commit, checkpoint=files, layers_per_stage=layers)
            self.agreement.same(self.layout.stage, plan=self._told(plan))

    @property
    def turn(self) -> tuple[int, int]:
        """Which of how many ranks this is, where they divide work among them."""
        return self.layout.fsdp_rank, self.layout.fsdp_size

    def execute(
        self,
        model: nn.Module,
        plan: Plan,
        checkpoint: Checkpoint,
        way: Way,
        initialize: Callable[[nn.Module], None] | None,
        progress: bool | None,
    ) -> Streamed:
        """Shard the model and bring this rank's parts; see `load._execute`."""
        ties = self._ties(plan)
        values = self._initialized(model, plan, initialize)
        values.update(recompute_buffers(plan.tree, plan.placement))
        if self.layout.tp is not None:
            cut_on_meta(plan.tree, self.cuts, ties, self.layout)
        for target, source in ties.items():
            plan.tree.weights[target].put(plan.tree.weights[source].get())  # type: ignore[arg-type]
        if plan.tree.packed:
            hold_as_floats(plan)
        if self.layout.fsdp is not None:
            wrap_for_fsdp(model, self.units, self.layout)
        local = localize_packed(localize(plan, self.cuts, self.layout), self.layout)
        with Progress(sum(move.entry.nbytes for move in local.moves), progress, plan.model_class) as bar:
            streamed = stream(local, checkpoint, bar if bar.watching else None, way)
        if lost := [name for name in plan.compare if name not in streamed.tied]:
            raise ParallelError(
                f"{plan.name}: the model ties {lost[0]!r} to {plan.compare[lost[0]]!r}, but the checkpoint holds "
                "different values for them; set tie_word_embeddings=False if that is meant"
            )
        if plan.tree.packed:
            self.agreement.meet()  # what one rank cannot quantize ends all, before they need each other
            complete(plan, streamed.tensors, self.layout)
        values.update(streamed.tensors)
        self._assign(plan, values, streamed.tied)
        for layer in plan.tree.packed.values():
            layer.loaded()  # type: ignore[operator]
        _check_complete(model)
        return streamed

    def _assign(self, plan: Plan, values: dict[str, torch.Tensor], tied: Mapping[str, str]) -> None:
        for name, slot in plan.tree.slots():
            if (value := values.get(name)) is None:
                continue
            if slot.is_parameter:
                value = as_floats(value) if slot.is_packed else value
                value = values[name] = filled(slot.get(), value, name)  # type: ignore[arg-type]
            slot.put(value)
        for target, source in tied.items():
            plan.tree.weights[target].put(values[source])

    def _initialized(
        self, model: nn.Module, plan: Plan, initialize: Callable[[nn.Module], None] | None
    ) -> dict[str, torch.Tensor]:
        """This rank's parts of missing weights, drawn whole and alike on all ranks, on the CPU."""
        seeds = self.agreement.meet(seed=torch.initial_seed())
        names = plan.to_initialize
        if not names:
            return {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(next(iter(seeds.values()))["seed"])
            whole = initialize_missing(model, plan.tree, names, _on_cpu(plan), initialize)
        parts = {}
        for name, value in whole.items():
            slot = plan.tree.weights[name]
            slot.put(slot.tensor)  # on meta again
            if slot.is_parameter:
                cut, shape = self.cuts.get(name), tuple(value.shape)
                bounds = region(shape, cut, self.layout)
                value = value.detach().view(shape if cut is None else cut.viewed(shape))
                value = value[tuple(slice(*bound) for bound in bounds)].clone()
            parts[name] = value.to(self.layout.device)
        return parts

    def _ties(self, plan: Plan) -> dict[str, str]:
        return {**plan.tied, **plan.compare}

    def _told(self, plan: Plan) -> str:
        facts = (
            plan.model_class,
            self.layout.describe(),
            sorted(self.cuts.items()),
            list(self.units),
            [(name, tuple(slot.tensor.shape), slot.tensor.dtype) for name, slot in plan.tree.weights.items()],
            plan.to_initialize,
            sorted(plan.tied.items()),
        )
        return f"{plan.model_class}, {self.layout.describe()}, {_digest(facts)}"


def _on_cpu(plan: Plan) -> Placement:
    return plan.placement._replace(table={"": torch.device("cpu")})


def _fingerprint(checkpoint: Checkpoint) -> str:
    entries = [(entry.name, str(entry.dtype), entry.shape, entry.offset) for entry in checkpoint.entries.values()]
    return f"{len(entries)} tensors, {checkpoint.total_bytes} bytes, {_digest(entries)}"


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _check_complete(model: nn.Module) -> None:
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ParallelError(f"{left[0]!r} was left without values; is it a parameter made outside of __init__?")
