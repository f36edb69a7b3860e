"""How a model lies on a device mesh: what ``device_mesh=`` and ``parallel=`` of ``from_pretrained`` mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from ..errors import ParallelError, nearest

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

STRATEGIES = ("fsdp", "tp", "fsdp+tp", "pp", "pp+fsdp", "pp+tp", "pp+fsdp+tp")
_SHARD, _REPLICATE, _TENSOR, _PIPELINE = ("fsdp", "dp_shard", "dp"), ("replicate", "dp_replicate"), ("tp",), ("pp",)


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is spread over a device mesh; ``parallel=`` of ``from_pretrained``, where its name alone would do.

    strategy: "fsdp" (every rank holds a share of every weight, gathered block by block when needed), "tp" (the ranks
        share the work of every layer), "fsdp+tp"; "pp" (every rank has some of the layers, see
        `models.pipeline`), with "pp+" in front of the others; None: what the names of the mesh's dimensions say.
    mixed_precision: torch's ``MixedPrecisionPolicy`` for FSDP: the dtypes of computing and of reducing gradients.
    reshard_after_forward: as for ``fully_shard``: free gathered weights between forward and backward.
    tp_plan: {pattern of module names: style, or None to keep it whole}, over what the architecture declares.
    layers_per_stage: how many layers each stage of a pipeline has; None: as even as can be, the last the fewest.
    """

    strategy: str | None = None
    mixed_precision: MixedPrecisionPolicy | None = None
    reshard_after_forward: bool | int | None = None
    tp_plan: Mapping[str, Any] | None = None
    layers_per_stage: Sequence[int] | None = None

    @staticmethod
    def of(value: Any) -> ParallelConfig:
        """From what a caller gives: None, a strategy's name, or a configuration as it is; else ParallelError."""
        config = value if isinstance(value, ParallelConfig) else ParallelConfig(value)
        known = ", ".join(map(repr, STRATEGIES))
        if config.strategy is not None and not isinstance(config.strategy, str):
            raise ParallelError(f"parallel must be one of {known} or a ParallelConfig, not {config.strategy!r}")
        if config.strategy is not None and config.strategy not in STRATEGIES:
            raise ParallelError(
                f"parallel={config.strategy!r} is unknown{nearest(config.strategy, STRATEGIES)}; {known}"
            )
        if config.tp_plan is not None and not isinstance(config.tp_plan, Mapping):
            raise ParallelError(f"tp_plan must map patterns of module names to styles, not be {config.tp_plan!r}")
        return config


@dataclass(frozen=True, eq=False)
class Layout:
    """A mesh with its dimensions told apart. ``fsdp``: the submesh over which weights are sharded (with a dimension in
    front over which they are replicated, if there is one), ``tp``: the one over which layers are cut; None: neither.
    ``device``: where this rank's weights live. ``folded``: shapes in checkpoints of weights that have another one here;
    ``codes``: dtypes in checkpoints of codes that are held as numbers here. ``spread``: the modules whose weights the
    ranks share. ``pp``: the submesh of the stages of a pipeline; ``shared``: the weight that the first and the last of
    them hold.
    """

    mesh: DeviceMesh
    config: ParallelConfig
    fsdp: DeviceMesh | None
    tp: DeviceMesh | None
    device: torch.device
    folded: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    codes: Mapping[str, torch.dtype] = field(default_factory=dict)
    spread: WeakSet[Any] = field(default_factory=WeakSet)
    pp: DeviceMesh | None = None
    shared: str | None = None

    @property
    def stages(self) -> int:
        return 1 if self.pp is None else self.pp.size()

    @property
    def stage(self) -> int:
        return 0 if self.pp is None else self.pp.get_local_rank()

    @property
    def tp_size(self) -> int:
        return 1 if self.tp is None else self.tp.size()

    @property
    def tp_rank(self) -> int:
        return 0 if self.tp is None else self.tp.get_local_rank()

    @property
    def fsdp_size(self) -> int:
        return 1 if self.fsdp is None else self.fsdp.size(self.fsdp.ndim - 1)

    @property
    def fsdp_rank(self) -> int:
        return 0 if self.fsdp is None else self.fsdp.get_local_rank(self.fsdp.ndim - 1)

    def describe(self) -> str:
        """In words, for messages: ``fsdp+tp over a mesh of fsdp=2, tp=2``."""
        names = self.mesh.mesh_dim_names or ("ranks",) * self.mesh.ndim
        sizes = ", ".join(f"{name}={self.mesh.size(dim)}" for dim, name in enumerate(names))
        return f"{self.config.strategy} over a mesh of {sizes}"


def check_mesh(mesh: Any) -> DeviceMesh:
    """The mesh, if this process is part of it; else ParallelError."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise ParallelError(
            f"device_mesh must be a torch DeviceMesh, not {mesh!r}; torch.distributed.device_mesh.init_device_mesh("
            "'cuda', (8,), mesh_dim_names=('fsdp',)) makes one, under torchrun"
        )
    if mesh.get_coordinate() is None:
        raise ParallelError(
            f"this process (rank {torch.distributed.get_rank()}) is not in device_mesh {mesh}; only its ranks may load"
        )
    return mesh


def make_layout(mesh: DeviceMesh, parallel: Any) -> Layout:
    """Tell the mesh's dimensions apart, by their names or, with one, by ``parallel``.

    Names: "fsdp", "dp" or "dp_shard" (weights are sharded), "replicate" or "dp_replicate" (and replicated), "tp", "pp".
    Raises ParallelError for other names, and for a mesh and a strategy that do not fit.
    """
    config = ParallelConfig.of(parallel)
    names = mesh.mesh_dim_names
    if names is None:
        if mesh.ndim != 1 or config.strategy not in ("fsdp", "tp", "pp"):
            raise ParallelError(
                f"device_mesh has {mesh.ndim} dimension(s) without names and parallel={config.strategy!r}: give "
                "init_device_mesh(..., mesh_dim_names=('fsdp', 'tp')), or one dimension and parallel='fsdp', 'tp', 'pp'"
            )
        found = {config.strategy: mesh}
    else:
        found = _by_name(mesh, names)
    strategy = "+".join(kind for kind in ("pp", "fsdp", "tp") if kind in found)
    if config.strategy is not None and config.strategy != strategy:
        raise ParallelError(
            f"parallel={config.strategy!r}, but the dimensions of device_mesh are {names or mesh.ndim}, which is "
            f"{strategy!r}; every dimension must be used, for its ranks would train apart: slice the mesh "
            "(mesh['tp']), or change parallel"
        )
    config = replace(config, strategy=strategy)
    if config.mixed_precision is not None and "fsdp" not in found:
        raise ParallelError("mixed_precision is FSDP's, and the mesh has no fsdp dimension; pass dtype= instead")
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if config.layers_per_stage is not None and "pp" not in found:
        raise ParallelError("layers_per_stage is a pipeline's, and the mesh has no pp dimension")
    return Layout(mesh, config, found.get("fsdp"), found.get("tp"), device, pp=found.get("pp"))


def _by_name(mesh: DeviceMesh, names: tuple[str, ...]) -> dict[str, DeviceMesh]:
    kinds: dict[str, str] = {}
    meanings = (("shard", _SHARD), ("replicate", _REPLICATE), ("tp", _TENSOR), ("pp", _PIPELINE))
    for kind, spellings in meanings:
        here = [name for name in names if name in spellings]
        if len(here) > 1:
            raise ParallelError(f"device_mesh has two dimensions of one meaning: {', '.join(here)}")
        if here:
            kinds[kind] = here[0]
    known = [name for _, spellings in meanings for name in spellings]
    for name in names:
        if name not in known:
            raise ParallelError(
                f"dimension {name!r} of device_mesh is unknown{nearest(name, known)}; known: {', '.join(known)}"
            )
    if "replicate" in kinds and "shard" not in kinds:
        raise ParallelError(
            f"device_mesh has {kinds['replicate']!r} and no dimension to shard over: name it 'fsdp' (to replicate "
            "whole models, load them without device_mesh and use DistributedDataParallel)"
        )
    if "replicate" in kinds and names.index(kinds["replicate"]) > names.index(kinds["shard"]):
        raise ParallelError(f"{kinds['replicate']!r} must come before {kinds['shard']!r} in device_mesh")
    order = [name for name in names if name in (kinds.get("replicate"), kinds.get("shard"))]
    if "tp" in kinds and order and names.index("tp") < names.index(order[-1]):
        raise ParallelError(f"'tp' must be the last dimension of device_mesh, after {order[-1]!r}")
    if "pp" in kinds and names[0] != "pp":
        raise ParallelError(f"'pp' must be the first dimension of device_mesh, before {names[0]!r}")
    found: dict[str, DeviceMesh] = {}
    if "pp" in kinds:
        found["pp"] = mesh["pp"] if len(names) > 1 else mesh
    if order:
        found["fsdp"] = mesh[tuple(order)] if len(order) > 1 else mesh[order[0]] if len(names) > 1 else mesh
    if "tp" in kinds:
        found["tp"] = mesh["tp"] if len(names) > 1 else mesh
    return found
