"""The plan of a load: what goes where, known from headers and a model on meta before a weight byte is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import (
    ArgumentError,
    DeviceMapError,
    FormatError,
    IntegrityError,
    MissingWeightsError,
    ShapeMismatchError,
    UnexpectedWeightsError,
)
from .budget import MaxMemory
from .checkpoint import Checkpoint
from .device_map import DeviceMap, place
from .header import TensorEntry
from .keys import match_keys
from .moves import Mismatch, Move, Packing
from .placement import CPU, DISK, Place, Placement
from .tree import Slot, Tree, survey

_SHOWN = 40
_MOST_MISSING = 10  # weights for each that is there: beyond that it is no checkpoint of this model
_RECOMPUTED = ("rotary_emb.inv_freq", "position_ids")  # what older checkpoints hold of buffers that models recompute


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a load will do.

    ``moves`` in file order. ``missing``: weights of the model that no file has, to be initialised (``excused`` too,
    but these are not reported). ``unexpected``: checkpoint tensors without a place. ``ignored``: those that need
    none. ``tied``: weight to the weight it shares. ``compare``: pairs to be tied that the checkpoint both
    holds; they are tied only if they are equal, which their bytes must tell.
    """

    name: str
    model_class: str
    moves: tuple[Move, ...]
    missing: tuple[str, ...]
    excused: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    tied: dict[str, str]
    compare: dict[str, str]
    placement: Placement
    tree: Tree

    @property
    def to_initialize(self) -> tuple[str, ...]:
        """Weights that get the architecture's initialisation instead of the checkpoint's values."""
        names = (*self.missing, *self.excused, *(mismatch.name for mismatch in self.mismatched))
        return tuple(name for name in dict.fromkeys(names) if name not in self.tied)

    def check(self, *, strict: bool = False, ignore_mismatched_sizes: bool = False) -> None:
        """Raise what makes the load impossible, or with ``strict`` imperfect, naming every tensor concerned."""
        self._check_room()
        weights = self.tree.weights
        codes = any(weights[mismatch.name].is_packed for mismatch in self.mismatched)
        if self.mismatched and (strict or codes or not ignore_mismatched_sizes):
            advice = "" if strict or codes else "; pass ignore_mismatched_sizes=True to initialise them instead"
            raise ShapeMismatchError(
                f"{self.name}: {len(self.mismatched)} tensors do not fit {self.model_class}: "
                f"{'; '.join(str(mismatch) for mismatch in self.mismatched[:_SHOWN])}{_more(self.mismatched)}{advice}"
            )
        here = len(self.moves) + len(self.mismatched)
        if len(self.missing) > _MOST_MISSING * here:
            raise MissingWeightsError(
                f"{self.name}: {here} of {here + len(self.missing)} weights of {self.model_class} are in its files, "
                f"which lack {_listed(self.missing)}, so nearly all would be random; are they another model's, or are "
                f"their names to be translated by key_mapping? Not used: {_listed(self.unexpected) or 'none'}"
            )
        lost = [name for name in self.to_initialize if weights[name].is_packed]
        if lost:
            raise MissingWeightsError(
                f"{self.name}: {len(lost)} tensors of quantized layers are not in the checkpoint, and codes cannot be "
                f"initialised: {_listed(lost)}"
            )
        if strict and self.missing:
            raise MissingWeightsError(
                f"{self.name}: {len(self.missing)} weights of {self.model_class} are not in the checkpoint: "
                f"{_listed(self.missing)}; strict=False would initialise them"
            )
        if strict and self.unexpected:
            raise UnexpectedWeightsError(
                f"{self.name}: {len(self.unexpected)} tensors have no place in {self.model_class}: "
                f"{_listed(self.unexpected)}; strict=False would leave them out"
            )

    def _check_room(self) -> None:
        if self.placement.shortfalls:
            raise DeviceMapError(
                f"{self.name} does not fit the limits of max_memory: "
                f"{'; '.join(str(shortfall) for shortfall in self.placement.shortfalls)}. Raise max_memory, allow "
                "'disk', load a smaller dtype, or quantize"
            )

    def _sizes(self) -> list[tuple[Place, torch.dtype, int]]:
        """Place, dtype and bytes of each weight and buffer that will exist, what is tied counted once."""
        twins = {*self.tied, *self.compare, *self.tree.shared}
        placement = self.placement
        weights = [(placement.place_of(name, slot), name, slot) for name, slot in self.tree.weights.items()]
        loose = [(placement.buffer_device(name), name, slot) for name, slot in self.tree.transient.items()]
        return [
            (where, slot.tensor.dtype, slot.tensor.nbytes) for where, name, slot in weights + loose if name not in twins
        ]

    def memory_by_device(self) -> dict[str, int]:
        """Bytes of weights and buffers on each device once loaded, and of those that stay on "disk"."""
        total: dict[str, int] = {}
        for device, _dtype, size in self._sizes():
            total[str(device)] = total.get(str(device), 0) + size
        return total

    def memory_by_dtype(self) -> dict[str, int]:
        """Bytes of weights and buffers of each dtype once loaded."""
        total: dict[str, int] = {}
        for _device, dtype, size in self._sizes():
            name = str(dtype).removeprefix("torch.")
            total[name] = total.get(name, 0) + size
        return total

    def bytes_quantized(self) -> tuple[int, int]:
        """Bytes of the tensors that are quantized while loading, in the checkpoint and packed."""
        moves = [move for move in self.moves if move.packing is not None]
        return sum(move.entry.nbytes for move in moves), sum(move.nbytes for move in moves)

    def bytes_by_transform(self) -> dict[str, int]:
        """Bytes at the destination for each transform in use."""
        total: dict[str, int] = {}
        for move in self.moves:
            total[move.transform] = total.get(move.transform, 0) + move.nbytes
        return total

    def __str__(self) -> str:
        from .report import describe_plan

        return describe_plan(self)


def make_plan(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    device_map: DeviceMap = None,
    max_memory: MaxMemory | None = None,
    no_split: Collection[str] = (),
    ties: Mapping[str, str] | None = None,
    key_mapping: Mapping[str, str] | None = None,
    base_model_prefix: str = "",
    ignore_unexpected: Sequence[str] = (),
    ignore_missing: Sequence[str] = (),
    offload_buffers: bool = False,
    devices_must_exist: bool = True,
) -> Plan:
    """Plan the loading of ``checkpoint`` into ``model``, whose weights are on meta in their final dtypes.

    Nothing is read and nothing allocated. Misfits are recorded, not raised: ``Plan.check`` raises them.
    Raises DeviceMapError, IntegrityError (two tensors for one weight), ArgumentError (a bad regex) and FormatError
    (a tensor whose dtype cannot become that of its weight).
    """
    tree = survey(model)
    ties = _rooted({**tree.shared, **(ties or {})}, tree)
    placement = place(
        model,
        device_map,
        max_memory=max_memory,
        no_split=no_split,
        ties=ties,
        tree=tree,
        offload_buffers=offload_buffers,
        must_exist=devices_must_exist,
    )
    matched, left = match_keys(
        checkpoint.entries, tree.weights, key_mapping=key_mapping, base_model_prefix=base_model_prefix
    )
    moves, mismatched = _moves(matched, checkpoint, tree, placement)
    held = {move.target for move in moves}
    if tree.packed:
        _add_made(held, moves)
    absent = [name for name in tree.weights if name not in held]
    wrong = {mismatch.name for mismatch in mismatched}
    tied, compare, late = _resolve_ties(ties, held, wrong)
    excuses = _patterns(ignore_missing, "ignore_missing")
    missing: list[str] = []
    excused: list[str] = []
    for name in absent:
        if name not in tied and name not in wrong:
            (excused if any(excuse.search(name) for excuse in excuses) else missing).append(name)
    unexpected, ignored = _sort_left(left, tree, _patterns(ignore_unexpected, "ignore_unexpected"))
    return Plan(
        name=checkpoint.name,
        model_class=type(model).__name__,
        moves=tuple(moves),
        missing=tuple(missing),
        excused=tuple(excused),
        unexpected=tuple(unexpected),
        ignored=tuple(ignored),
        mismatched=tuple(mismatched),
        tied={**tied, **late},
        compare=compare,
        placement=placement,
        tree=tree,
    )


def _moves(
    matched: Mapping[str, str], checkpoint: Checkpoint, tree: Tree, placement: Placement
) -> tuple[list[Move], list[Mismatch]]:
    moves, mismatched, made = [], [], []
    entries, weights = checkpoint.entries, tree.weights
    for name, key in matched.items():  # in the order of the checkpoint's entries, which is that of the files
        entry, slot = entries[key], weights[name]
        tensor, packing = slot.tensor, None
        wanted: tuple[int, ...] = tensor.shape
        where, dtype = placement.place_of(name, slot), tensor.dtype
        device = CPU if where == DISK else where
        if (entry.shape != wanted or entry.dtype != dtype) and slot.is_packed:
            packing, wanted = _fit(name, entry, slot)
            if packing is None:
                dtype = entry.dtype
        if entry.shape != wanted:
            mismatched.append(Mismatch(name, entry.file, entry.shape, tuple(wanted), key))
            continue
        if device.type == "meta":
            transform = "none"
        elif packing is not None:
            transform = "quantize"
            if where == DISK:
                made.append(name)
        elif where == DISK and _lies_ready(entry):
            transform = "disk"
            if entry.dtype != dtype:
                _check_cast(entry, name, dtype)
        elif entry.dtype != dtype:
            _check_cast(entry, name, dtype)
            transform = "cast"
        elif entry.values is not None:
            transform = "map" if entry.values.home == device else "copy"
        else:
            transform = "map" if device.type == "cpu" and entry.offset % dtype.itemsize == 0 else "copy"
        if where == DISK and entry.values is not None and transform in ("cast", "copy"):
            made.append(name)
        moves.append(Move(name, entry, device, dtype, transform, packing))
    if made:
        raise DeviceMapError(
            f"{len(made)} weights are to stay on disk, but they are quantized or decoded while loading, and "
            f"nothing is written: {_listed(made)}. Convert or quantize the checkpoint first, or give them memory"
        )
    return moves, mismatched


def _lies_ready(entry: TensorEntry) -> bool:
    """Whether a tensor can be used from where it lies, in its own dtype: in its file, or in the caller's memory."""
    if entry.values is not None:
        return entry.values.home == CPU
    return entry.offset % entry.dtype.itemsize == 0


def _fit(name: str, entry: TensorEntry, slot: Slot) -> tuple[Packing | None, tuple[int, ...]]:
    """How a tensor that is not what a packed layer holds fits it, if it does, and the shape it must have."""
    layer: Any = slot.module
    recipe = layer.load_recipe(slot.attribute) if entry.dtype.is_floating_point and not layer.loads_packed else None
    if recipe is not None:
        prefix = name.removesuffix(layer.checkpoint_names.get(slot.attribute, slot.attribute))
        makes = {made: prefix + layer.checkpoint_names.get(made, made) for made in recipe.makes}
        size = sum(getattr(layer, made).nbytes for made in makes)
        return Packing(recipe, makes, size), recipe.shape
    if entry.dtype != slot.tensor.dtype and not (entry.dtype.is_floating_point and slot.attribute in layer.own_dtype):
        raise _cannot_become(entry, name, slot.tensor.dtype)
    fits = layer.accepts(slot.attribute, entry.shape, entry.dtype)
    return None, entry.shape if fits else tuple(slot.tensor.shape)


def _add_made(held: set[str], moves: Sequence[Move]) -> None:
    """Count what quantizing makes as held; IntegrityError if the checkpoint holds it too."""
    for move in moves:
        for made in move.packing.makes.values() if move.packing is not None else ():
            if made in held and made != move.target:
                raise IntegrityError(
                    f"{move.entry.file.name} holds {move.target!r} in floating point and {made!r} of its quantized form"
                )
            held.add(made)


def _check_cast(entry: TensorEntry, name: str, dtype: torch.dtype) -> None:
    if entry.dtype.is_floating_point and dtype.is_floating_point:
        return
    if not (entry.dtype.is_floating_point or entry.dtype.is_complex) and not dtype.is_floating_point:
        return  # integers and booleans, for example a mask kept as uint8
    raise _cannot_become(entry, name, dtype)


def _cannot_become(entry: TensorEntry, name: str, dtype: torch.dtype) -> FormatError:
    return FormatError(
        f"tensor {entry.name!r} in {entry.file.name} is {str(entry.dtype).removeprefix('torch.')}, which cannot become "
        f"the {str(dtype).removeprefix('torch.')} of {name!r}; is the checkpoint quantized in a way its config hides?"
    )


def _rooted(ties: Mapping[str, str], tree: Tree) -> dict[str, str]:
    """Ties with chains followed to their end; names the model lacks are an error of the architecture."""
    rooted = {}
    for target in ties:
        source, steps = ties[target], 0
        while source in ties and steps <= len(ties):
            source, steps = ties[source], steps + 1
        for name in (target, source):
            if name not in tree.weights:
                raise ArgumentError(f"tied weight {name!r} is not a weight of the model")
        if source != target and steps <= len(ties):
            rooted[target] = source
    return rooted


def _resolve_ties(
    ties: Mapping[str, str], held: Collection[str], wrong: Collection[str]
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Three maps of weight to the weight it shares: what the checkpoint lacks to what it holds; what it holds twice,
    so that bytes must decide; and what it lacks altogether, which is missing and tied after its initialisation.

    If the source is not there, the first target that is takes its role; next best is one of the ``wrong`` shape.
    """
    groups: dict[str, list[str]] = {}
    for target, source in ties.items():
        groups.setdefault(source, [source]).append(target)
    tied: dict[str, str] = {}
    compare: dict[str, str] = {}
    late: dict[str, str] = {}
    for source, members in groups.items():
        root = next((name for name in members if name in held), None)
        root = root or next((name for name in members if name in wrong), None)
        for name in members:
            if root is None and name != source:
                late[name] = source
            elif root is not None and name != root:
                (compare if name in held else tied)[name] = root
    return tied, compare, late


def _sort_left(left: Mapping[str, str], tree: Tree, patterns: Sequence[re.Pattern[str]]) -> tuple[list[str], list[str]]:
    """Checkpoint tensors without a place: unexpected, or known to need none."""
    tails = tuple(tail for tail in _RECOMPUTED if any(f".{name}".endswith(f".{tail}") for name in tree.transient))
    unexpected: list[str] = []
    ignored: list[str] = []
    for name, key in left.items():
        needless = (
            key in tree.transient
            or (tails and f".{key}".endswith(tuple(f".{tail}" for tail in tails)))
            or any(pattern.search(name) or pattern.search(key) for pattern in patterns)
        )
        (ignored if needless else unexpected).append(name)
    return unexpected, ignored


def _patterns(regexes: Sequence[str], what: str) -> list[re.Pattern[str]]:
    try:
        return [re.compile(regex) for regex in regexes]
    except (re.error, TypeError) as error:
        raise ArgumentError(f"{what}: not a regex: {error}") from error


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:_SHOWN]) + _more(names)


def _more(things: Sequence[object]) -> str:
    return f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else ""
