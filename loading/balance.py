"""A model shared out over devices: by accelerate's planner where all fits on accelerators, else by ours.

accelerate's answer is what users know, but it keeps a layer's room free on the first device even if nothing is ever
offloaded, so that a model which just fits does not, and it knows of one visiting layer, not of the one fetched ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from .budget import Budget
from .placement import CPU, DISK, Place, Placement, Shortfall
from .tree import Tree


class Atom(NamedTuple):
    """Modules (or tensors) that go to one place together: a block, or a smaller part with what is tied to it.

    ``visits``: bytes that the largest of them takes on an accelerator while it is used, if it lives elsewhere.
    """

    names: tuple[str, ...]
    nbytes: int
    visits: int


class Shares(NamedTuple):
    """``table``: name to place. ``ahead``: whether there is room for a second visitor; ``reserved``: bytes for both."""

    table: dict[str, Place]
    ahead: bool = True
    reserved: int = 0
    shortfalls: tuple[Shortfall, ...] = ()


def share_out(
    model: nn.Module, kind: str, tree: Tree, no_split: Collection[str], ties: Mapping[str, str], limits: Budget
) -> Shares:
    """Places for all of a model on meta. What fits on accelerators goes there, then to the CPU, then stays on disk."""
    parts = atoms(tree, no_split, ties)
    total = sum(part.nbytes for part in parts)
    rooms = {device: room for device, room in limits.accelerators.items() if room > 0}
    if rooms and total <= sum(rooms.values()):
        found = _as_accelerate_does(model, kind, tree, no_split, ties, rooms)
        if found is None or not _sound(found, parts, rooms):
            found = _on_accelerators(parts, kind, rooms)
        if found is not None:
            return Shares(collapse(found, tree))
    return _with_offload(parts, rooms, limits, tree)


def atoms(tree: Tree, no_split: Collection[str], ties: Mapping[str, str]) -> list[Atom]:
    """The parts of a model that are not split, in its order, those that share weights joined."""
    classes = set(no_split)
    twins = {**tree.shared, **ties}
    bytes_of: dict[int, int] = {}
    slots_of: dict[int, list[tuple[str, int]]] = {}
    for name, slot in tree.slots():
        size = 0 if name in twins else slot.tensor.nbytes
        slots_of.setdefault(id(slot.module), []).append((name, size))
        bytes_of[id(slot.module)] = bytes_of.get(id(slot.module), 0) + size
    seen: set[int] = set()

    def parts(name: str, module: nn.Module) -> Iterator[tuple[str, int, bool]]:
        inner = [part for part in module.modules() if id(part) in slots_of]
        if not inner:
            return
        children = [(key, child) for key, child in module._modules.items() if child is not None]
        deeper = [(key, child) for key, child in children if any(id(part) in slots_of for part in child.modules())]
        if type(module).__name__ in classes or not deeper:
            size = sum(bytes_of[id(part)] for part in inner if id(part) not in seen)
            seen.update(id(part) for part in inner)
            yield name, size, isinstance(module, nn.Embedding)
            return
        for own, size in slots_of.get(id(module), ()):
            yield own, size, False
        for key, child in deeper:
            yield from parts(f"{name}.{key}" if name else key, child)

    found = list(parts("", tree.modules[""]))
    return _joined(found, twins)


def _joined(parts: Sequence[tuple[str, int, bool]], twins: Mapping[str, str]) -> list[Atom]:
    """One atom of those parts that a tie connects."""
    names = [name for name, _, _ in parts]
    index = {name: number for number, name in enumerate(names)}

    def holder(weight: str) -> int | None:
        while weight and weight not in index:
            weight = weight.rpartition(".")[0]
        return index.get(weight)

    group = list(range(len(parts)))
    for target, source in twins.items():
        one, other = holder(target), holder(source)
        if one is not None and other is not None and group[one] != group[other]:
            old, new = max(group[one], group[other]), min(group[one], group[other])
            group = [new if number == old else number for number in group]
    joined: dict[int, list[tuple[str, int, bool]]] = {}
    for number, part in zip(group, parts, strict=True):
        joined.setdefault(number, []).append(part)
    return [
        Atom(
            tuple(name for name, _, _ in members),
            sum(size for _, size, _ in members),
            # An embedding is looked up where it lives; a head that shares its weight visits.
            0 if all(looked_up for _, _, looked_up in members) else sum(size for _, size, _ in members),
        )
        for members in joined.values()
    ]


def _as_accelerate_does(
    model: nn.Module,
    kind: str,
    tree: Tree,
    no_split: Collection[str],
    ties: Mapping[str, str],
    rooms: Mapping[torch.device, int],
) -> dict[str, Place] | None:
    """accelerate's map if it puts everything on accelerators, else None."""
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    devices: list[Place] = list(rooms)
    memory: dict[int | str, int] = dict(enumerate(rooms.values()))
    memory["cpu"] = 0  # named, or accelerate adds what the machine has
    classes = list(no_split)
    with _tied_on_meta(tree, ties), _quiet("accelerate.utils.modeling"):
        if kind != "sequential":
            memory = get_balanced_memory(
                model, max_memory=memory, no_split_module_classes=classes, low_zero=kind == "balanced_low_0"
            )
        found = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=classes)
    if any(not isinstance(place, int) for place in found.values()):
        return None
    return {name: devices[place] for name, place in found.items()}


def _sound(found: Mapping[str, Place], parts: Sequence[Atom], rooms: Mapping[torch.device, int]) -> bool:
    """Whether a map keeps parts whole and within the limits."""
    placement = Placement({**found})
    used: dict[Place | None, int] = {}
    for part in parts:
        places = {placement.find(name) for name in part.names}
        if len(places) != 1:
            return False
        (place,) = places
        used[place] = used.get(place, 0) + part.nbytes
    return all(isinstance(place, torch.device) and size <= rooms.get(place, 0) for place, size in used.items())


def _on_accelerators(parts: Sequence[Atom], kind: str, rooms: Mapping[torch.device, int]) -> dict[str, Place] | None:
    """All parts on accelerators, evenly where ``kind`` says so and that fits; None if it fits in no way we try."""
    devices: list[Place] = list(rooms)
    limits = list(rooms.values())
    total = sum(part.nbytes for part in parts)
    largest = max((part.nbytes for part in parts), default=0)
    low_zero = kind == "balanced_low_0" and len(limits) > 1
    shares = [] if kind == "sequential" else [-(-total // (len(limits) - low_zero)) + spare for spare in (0, largest)]
    for share in shares:
        even = [min(limit, share) for limit in limits[:-1]] + limits[-1:]
        if low_zero:
            even[0] = min(limits[0], max(0, total - sum(limits[1:])) + share - shares[0])
        if (found := _filled(parts, devices, even)) is not None:
            return found
    return _filled(parts, devices, limits)


def _filled(parts: Sequence[Atom], places: Sequence[Place], limits: Sequence[int]) -> dict[str, Place] | None:
    """Parts put into places one after the other; None if some are left."""
    table: dict[str, Place] = {}
    number, used = 0, 0
    for part in parts:
        while number < len(places) and used + part.nbytes > limits[number]:
            number, used = number + 1, 0
        if number == len(places):
            return None
        table.update(dict.fromkeys(part.names, places[number]))
        used += part.nbytes
    return table


def _with_offload(parts: Sequence[Atom], rooms: Mapping[torch.device, int], limits: Budget, tree: Tree) -> Shares:
    """As much as fits on accelerators, with room for what visits the first of them; the rest on the CPU, then disk.

    Embeddings come last: where they are offloaded they are looked up, and only rows travel.
    """
    shortfalls: list[Shortfall] = []
    free: dict[Place, int] = {device: room for device, room in rooms.items()}  # noqa: C416
    ahead, reserved = True, 0
    if rooms:
        main = next(iter(rooms))
        largest = max((part.visits for part in parts), default=0)
        ahead = rooms[main] >= 2 * largest
        reserved = (2 if ahead else 1) * largest
        free[main] = rooms[main] - reserved
        if free[main] < 0:
            shortfalls.append(Shortfall(main, largest, rooms[main], "the largest block, which visits it when used"))
    free[CPU] = limits.cpu
    disk_need = 0
    places = list(free)
    table: dict[str, Place] = {}
    first = 0
    for part in sorted(parts, key=lambda part: part.nbytes > 0 and not part.visits):
        found = [number for number in range(first, len(places)) if part.nbytes <= free[places[number]]]
        if found and part.visits and places[found[0]] != CPU:
            first = found[0]  # the next blocks do not go back to an accelerator that was full
        place: Place = places[found[0]] if found else DISK
        if found:
            free[place] -= part.nbytes
        else:
            disk_need += part.nbytes
        table.update(dict.fromkeys(part.names, place))
    table = {name: table[name] for part in parts for name in part.names}
    if limits.disk is not None and disk_need > limits.disk:
        shortfalls.append(Shortfall(DISK, disk_need, limits.disk, "weights that fit nowhere else"))
    return Shares(collapse(table, tree), ahead, reserved, tuple(shortfalls))


def collapse(table: Mapping[str, Place], tree: Tree) -> dict[str, Place]:
    """The same map with one entry for a module whose parts all go to one place."""
    found: dict[str, Place] = dict(table)
    for name in sorted(tree.modules, key=lambda name: -name.count(".") - bool(name)):
        prefix = f"{name}." if name else ""
        inner = {place for entry, place in found.items() if entry.startswith(prefix) and entry != name}
        if len(inner) == 1 and name not in found:
            first = next(entry for entry in found if entry.startswith(prefix))
            found = {
                (name if entry == first else entry): place
                for entry, place in found.items()
                if entry == first or not entry.startswith(prefix)
            }
    return found


class _tied_on_meta:
    """While in it, tied weights of the meta model are one tensor, which is how accelerate knows of ties."""

    def __init__(self, tree: Tree, ties: Mapping[str, str]) -> None:
        self.pairs = [(tree.weights[target], tree.weights[source]) for target, source in ties.items()]

    def __enter__(self) -> None:
        for target, source in self.pairs:
            target.put(source.tensor)

    def __exit__(self, *_: object) -> None:
        for target, _source in self.pairs:
            target.put(target.tensor)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without that logger's warnings: it says of every device that a plan is for that it is not on this machine."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
