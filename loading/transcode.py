"""A checkpoint written anew as a plan says, tensor by tensor, without a model in memory.

What `load_into` and `save_checkpoint` do one after the other: the same names, bytes, shards and ties. One weight at a
time is quantized and its parts are written where they belong; other tensors go by in pieces.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError, IntegrityError, MissingWeightsError, PathError, QuantizationError
from .atomic import Contents, replace_contents
from .checkpoint import Checkpoint
from .files import Files
from .moves import Move
from .plan import Plan
from .quantize import make_codes
from .save import CONFIG_NAME, WeightNames, index_text, parse_size, plan_shards, write_texts
from .source import check_filename
from .stream import PIECE, confirm_ties
from .workers import one_thread_each
from .writer import header_bytes, laid_out, pieces_of, sync, tensor_bytes

_METADATA = {"format": "pt"}
_SPARE = 1 << 20  # bytes on the disk, for what is not weights


class Transcoded(NamedTuple):
    """Names of the files written, bytes of tensors in the source and in the result, names of tensors left out, and the
    bytes of each dtype in the result."""

    files: list[str]
    bytes_before: int
    bytes_after: int
    unexpected: tuple[str, ...]
    by_dtype: dict[torch.dtype, int]


@dataclass(frozen=True)
class Beside:
    """What a checkpoint has beside its weights: ``texts`` by name, and ``copies``: name to the file to copy."""

    texts: Mapping[str, str | bytes]
    copies: Mapping[str, Path]


def transcode(
    plan: Plan,
    checkpoint: Checkpoint,
    state: Mapping[str, torch.Tensor],
    directory: Path,
    beside: Beside,
    *,
    ties: Collection[str] = (),
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    watch: Callable[[int], None] = lambda count: None,
) -> Transcoded:
    """Write what loading ``checkpoint`` by ``plan`` and saving the model to ``directory`` would write, in one step.

    state: the state dict of the model on meta that the plan is for. ties: its tied names, left out where another name
    has the bytes. watch: called with the bytes of each source tensor that is done. A crash leaves the directory as it
    was. Raises, before anything is written: ShapeMismatchError, MissingWeightsError, CheckpointError (not enough space,
    a bad shard size), PathError; QuantizationError for a tensor that has no codes; OSError as the system gives it.
    """
    names, limit = WeightNames(variant), parse_size(max_shard_size)
    for name in (*beside.texts, *beside.copies):
        check_filename(name)
        if names.is_weights(name):
            raise PathError(f"{name!r} cannot be a file beside the weights of a checkpoint")
    plan.check()
    if plan.to_initialize:
        raise MissingWeightsError(
            f"{plan.name}: {len(plan.to_initialize)} weights of {plan.model_class} are not in the checkpoint, and "
            f"would be made up: {', '.join(map(repr, plan.to_initialize[:12]))}; repair it first"
        )
    with Files(checkpoint) as files:
        work = _Work(plan, files, state, ties)
        _check_space(directory, sum(map(tensor_bytes, work.outputs.values())), beside)
        made, by_dtype = _write(work, plan_shards(work.outputs, limit), checkpoint, names, directory, beside, watch)
    return Transcoded(made, checkpoint.total_bytes, sum(by_dtype.values()), plan.unexpected, by_dtype)


def _write(
    work: _Work,
    shards: Sequence[Mapping[str, torch.Tensor]],
    checkpoint: Checkpoint,
    names: WeightNames,
    directory: Path,
    beside: Beside,
    watch: Callable[[int], None],
) -> tuple[list[str], dict[torch.dtype, int]]:
    """Write all files as one step: their names, and the bytes of each dtype."""
    files = names.files(len(shards))
    by_dtype: dict[torch.dtype, int] = {}

    def write(staging: Path) -> list[list[str]]:
        weights: dict[str, dict[str, torch.Tensor]] = {}
        with one_thread_each():  # many small steps, of which each would wait for the slowest of torch's threads
            for file, shard in zip(files, shards, strict=True):
                weights[file] = _write_shard(staging / file, shard, work, watch)
        for tensor in (tensor for shard in weights.values() for tensor in shard.values()):
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor_bytes(tensor)
        changed = checkpoint.changed_files()
        if changed:
            raise IntegrityError(f"{', '.join(map(str, changed))} changed while being read; start again")
        last = {names.index: index_text(weights)} if len(files) > 1 else {}
        _write_beside(staging, Beside({**beside.texts, **last}, beside.copies))
        others = [name for name in (*beside.texts, *beside.copies) if name != CONFIG_NAME]
        config = [name for name in beside.texts if name == CONFIG_NAME]
        return [files if last else [], others, list(last) or files, config]

    written = {*files, *([names.index] if len(files) > 1 else [])}
    made = replace_contents(directory, Contents(write, lambda name: names.is_weights(name) and name not in written))
    return made, by_dtype


class _Work:
    """What is to be written, in order, and where it comes from."""

    def __init__(self, plan: Plan, files: Files, state: Mapping[str, torch.Tensor], ties: Collection[str]) -> None:
        self.files = files
        roots = {**plan.tied, **confirm_ties(plan, self.files)}
        self.plain = {move.target: move for move in plan.moves if move.packing is None}
        self.makers = {name: move for move in plan.moves if move.packing for name in move.packing.makes.values()}
        self.loose = {
            prefix + layer.checkpoint_names.get(attribute, attribute): layer.text_room
            for prefix, layer in _packed(plan)
            for attribute in layer.stay_on_cpu
            if layer.text_room
        }
        self.holder: dict[str, str] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        for name in _without_twins(state, roots, ties):
            tensor = state[name]
            self.holder[name] = roots.get(name, name)
            if name in self.loose:
                tensor = torch.empty(tensor.numel() + self.loose[name], dtype=tensor.dtype, device="meta")
            self.outputs[name] = tensor
        self._made: dict[str, torch.Tensor] = {}

    def pieces(self, name: str, watch: Callable[[int], None]) -> Iterator[torch.Tensor]:
        """The values of an output, in flat pieces, each to be used before the next is asked for."""
        move = self.makers.get(name)
        if move is None:
            yield from self._cast(self.plain[self.holder[name]])
            watch(self.plain[self.holder[name]].entry.nbytes)
            return
        if name not in self._made:
            entry = move.entry
            source = self.files.bring(entry, 0, entry.nbytes // entry.dtype.itemsize)
            self._made |= make_codes(move, source.view(entry.shape))
            self.files.leave(source, entry)
            watch(move.entry.nbytes)
        yield self._made.pop(name)

    def _cast(self, move: Move) -> Iterator[torch.Tensor]:
        count = move.entry.nbytes // move.entry.dtype.itemsize
        step = PIECE // move.entry.dtype.itemsize
        for begin in range(0, count, step):
            source = self.files.bring(move.entry, begin, min(begin + step, count))
            yield source.to(move.dtype)
            self.files.leave(source, move.entry)


def _packed(plan: Plan) -> Iterator[tuple[str, Any]]:
    for name, layer in plan.tree.packed.items():
        yield (f"{name}." if name else ""), layer


def _without_twins(state: Mapping[str, torch.Tensor], roots: Mapping[str, str], ties: Collection[str]) -> list[str]:
    """Names to write: of those that share a weight the one that is not declared tied to another, as saving does."""
    groups: dict[str, list[str]] = {}
    for name in state:
        groups.setdefault(roots.get(name, name), []).append(name)
    kept = {next((name for name in group if name not in ties), group[0]) for group in groups.values()}
    return [name for name in state if name in kept]


def _write_shard(
    path: Path, shard: Mapping[str, torch.Tensor], work: _Work, watch: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """Write one file; its tensors on meta, with the shapes that they came out with.

    Tensors lie in the file by item size, and come in the order of the layers: each is written where it belongs. From
    the first one on whose size only its values decide, and whose items are bytes, they follow each other.
    """
    ordered = laid_out(shard)
    first_loose = next((place for place, (name, _) in enumerate(ordered) if name in work.loose), len(ordered))
    room = len(header_bytes(ordered, _METADATA))
    starts: dict[str, int] = {}
    tail = room
    for name, tensor in ordered[:first_loose]:
        starts[name] = tail
        tail += tensor_bytes(tensor)
    shapes = dict(shard)
    with open(path, "xb") as file:
        for name, tensor in shard.items():
            begin = position = starts.get(name, tail)
            file.seek(begin)
            for values in work.pieces(name, watch):
                _check_made(name, tensor, values)
                for piece in pieces_of(name, values):
                    file.write(piece)
                    position += len(piece)
            if name in work.loose:
                shapes[name] = torch.empty(position - begin, dtype=tensor.dtype, device="meta")
            if position - begin != tensor_bytes(shapes[name]):
                raise QuantizationError(
                    f"tensor {name!r} came out with {position - begin} bytes, {tensor_bytes(tensor)} were planned"
                )
            if name not in starts:
                tail = position
        file.seek(0)
        file.write(header_bytes([(name, shapes[name]) for name, _ in ordered], _METADATA, room))
        sync(file)
    return shapes


def _check_made(name: str, planned: torch.Tensor, values: torch.Tensor) -> None:
    if values.dtype != planned.dtype or values.numel() > planned.numel():
        raise QuantizationError(
            f"tensor {name!r} came out as {values.numel()} numbers of {values.dtype}, "
            f"{planned.numel()} of {planned.dtype} were planned"
        )


def _write_beside(staging: Path, beside: Beside) -> None:
    write_texts(staging, beside.texts)
    for name, path in beside.copies.items():
        with open(path, "rb") as source, open(staging / name, "xb") as file:
            shutil.copyfileobj(source, file)
            sync(file)


def _check_space(directory: Path, weights: int, beside: Beside) -> None:
    """CheckpointError if the disk has no room for the new files beside what is there."""
    others = sum(path.stat().st_size for path in beside.copies.values())
    place = directory.resolve()
    while not place.exists():
        place = place.parent
    needed, free = weights + others + _SPARE, shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"the result takes {needed / 1e9:.1f} GB, and the disk of {str(directory)!r} has {free / 1e9:.1f} GB left; "
            "nothing was written"
        )
