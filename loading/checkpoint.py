"""A checkpoint seen through its headers: which tensors it has and where their bytes lie."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import (
    ArgumentError,
    IntegrityError,
    MissingWeightsError,
    NotFoundError,
    UnsafeFormatError,
)
from .header import FileStamp, Header, TensorEntry, read_header
from .index import Index, read_index
from .source import Expected, Source, what_is_there

if TYPE_CHECKING:
    from .arrivals import Arrivals

__all__ = ["Checkpoint", "TensorEntry", "open_checkpoint"]

logger = logging.getLogger("loadstone.loading")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_VARIANT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_CODE_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npz")
_SHOWN = 12


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Tensors of a checkpoint by name, in the order of their bytes (file by file), known from headers alone.

    ``metadata`` is that of the files' headers (the first file that has a key wins), ``stamps`` says in which state
    the files were when their headers were read. ``arrivals`` brings files that are still to be downloaded, whose
    stamps are known when they are there.
    """

    name: str
    files: tuple[Path, ...]
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    total_bytes: int
    index_metadata: dict[str, Any] = field(default_factory=dict)
    stamps: dict[Path, FileStamp] = field(default_factory=dict)
    index_faults: tuple[str, ...] = ()
    arrivals: Arrivals | None = None

    @classmethod
    def from_headers(cls, name: str, headers: Sequence[Header], index: Index | None = None) -> Checkpoint:
        """Join the headers of one checkpoint's files; IntegrityError if they or the index contradict each other."""
        entries: dict[str, TensorEntry] = {}
        metadata: dict[str, str] = {}
        for header in headers:
            if not entries.keys().isdisjoint(header.entries):
                key = next(key for key in header.entries if key in entries)
                raise IntegrityError(
                    f"tensor {key!r} is both in {entries[key].file} and in {header.file}; "
                    "these are not shards of one checkpoint"
                )
            entries.update(header.entries)
            metadata = {**header.metadata, **metadata}
        total = sum(entry.nbytes for entry in entries.values())
        faults: tuple[str, ...] = ()
        if index is not None:
            places = {shard: header.file for shard, header in zip(index.shards, headers, strict=True)}
            _check_places(index, places, entries)
            faults = _index_faults(index, entries, total)
        return cls(
            name=name,
            files=tuple(header.file for header in headers),
            entries=entries,
            metadata=metadata,
            total_bytes=total,
            index_metadata={} if index is None else index.metadata,
            stamps={header.file: header.stamp for header in headers},
            index_faults=faults,
        )

    def wait(self, file: Path) -> None:
        """Return when a file is there; raises what its download raises."""
        if self.arrivals is not None:
            self.arrivals.wait(file)

    def receiving(self) -> AbstractContextManager[object]:
        """A context in which files may be waited for: if it raises, their downloads end too."""
        return nullcontext() if self.arrivals is None else self.arrivals

    def changed_files(self) -> list[Path]:
        """Files that are no longer what they were when their headers were read. Waits for those to come."""
        if self.arrivals is not None:
            self.arrivals.wait_for_all()
        changed = []
        for path, stamp in self.stamps.items():
            try:
                same = FileStamp.of(path.stat()) == stamp
            except OSError:
                same = False
            if not same:
                changed.append(path)
        return changed


def open_checkpoint(
    source: Source, *, variant: str | None = None, use_safetensors: bool | None = None, early: bool = False
) -> Checkpoint:
    """Read the headers of a checkpoint: ``model.safetensors``, else the shards of ``model.safetensors.index.json``.

    With ``variant="fp16"`` the names are ``model.fp16.safetensors`` and ``model.safetensors.index.fp16.json``. With
    ``use_safetensors=False`` it is ``pytorch_model.bin`` or its shards: see `pickled.open_pickled`.
    ``early``: of files that are still to be downloaded only the headers are fetched, where the server gives parts of
    files; whoever waits for a file, in the checkpoint's `receiving`, starts the downloads.

    Raises NotFoundError (no weights at all), MissingWeightsError (shards missing, all named), UnsafeFormatError
    (weights only in a format that can run code), IntegrityError (files contradict the
    index or each other), FormatError and PathError. No weight byte is read.
    """
    if variant is not None and not (type(variant) is str and _VARIANT.fullmatch(variant)):
        raise ArgumentError(f"variant must be a word such as 'fp16', not {variant!r}")
    if use_safetensors is False:
        from .pickled import open_pickled

        return open_pickled(source, variant)
    single = with_variant(SINGLE, variant)
    expected = source.expect([single]) if early else None
    if expected is not None:
        return _expected(source, [single], expected)
    path = source.find(single)
    if path is not None:
        return Checkpoint.from_headers(source.name, [read_header(path)])
    index_name = with_variant(INDEX, variant)
    path = source.find(index_name)
    if path is None:
        raise _no_weights(source, variant, (single, index_name))
    index = read_index(path)
    expected = source.expect(index.shards) if early else None
    if expected is None:
        return Checkpoint.from_headers(source.name, [read_header(shard) for shard in source.fetch(index.shards)], index)
    return _expected(source, index.shards, expected, index)


def _expected(source: Source, names: Sequence[str], expected: Expected, index: Index | None = None) -> Checkpoint:
    """The checkpoint of files of which some are still to come."""
    here = [name for name in names if name not in expected.headers]
    headers = {**expected.headers, **dict(zip(here, map(read_header, source.fetch(here)), strict=True))}
    found = Checkpoint.from_headers(source.name, [headers[name] for name in names], index)
    expected.arrivals.record(found.stamps)
    return replace(found, arrivals=expected.arrivals)


def with_variant(filename: str, variant: str | None) -> str:
    """``model.safetensors`` → ``model.fp16.safetensors``."""
    if variant is None:
        return filename
    stem, dot, ending = filename.rpartition(".")
    return f"{stem}.{variant}{dot}{ending}"


def _check_places(index: Index, places: dict[str, Path], entries: dict[str, TensorEntry]) -> None:
    """IntegrityError unless every tensor lies in the shard that the index names."""
    wrong = []
    for name, shard in index.weight_map.items():
        entry = entries.get(name)
        if entry is None:
            wrong.append(f"{name!r} is not in {shard}")
        elif entry.file is not places[shard]:
            wrong.append(f"{name!r} is in {entry.file.name}, not in {shard}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise IntegrityError(
            f"{index.file} does not fit its shards: {'; '.join(wrong[:_SHOWN])}{more}; "
            "fetch or save the checkpoint again"
        )


def _index_faults(index: Index, entries: dict[str, TensorEntry], total: int) -> tuple[str, ...]:
    """What is wrong with the index but does no harm; each is logged."""
    faults = []
    if index.total_size is not None and index.total_size != total:
        faults.append(f"{index.file} says total_size {index.total_size}, its shards hold {total} bytes of tensors")
    extra = entries.keys() - index.weight_map.keys()
    if extra:
        shown = ", ".join(repr(name) for name in sorted(extra)[:_SHOWN])
        faults.append(
            f"{len(extra)} tensors of the shards are not in {index.file}: {shown}; they are used all the same"
        )
    for fault in faults:
        logger.warning(fault)
    return tuple(faults)


def _no_weights(source: Source, variant: str | None, wanted: Sequence[str]) -> Exception:
    """The error that says best why there are no weights to read."""
    names = source.listing()
    place, looked = source.describe(), " and ".join(repr(name) for name in wanted)
    shards = [name for name in names if re.fullmatch(r".*-\d{5}-of-\d{5}\.safetensors", name)]
    if variant is not None:
        others = [name for name in names if name in (SINGLE, INDEX)]
        if others:
            return NotFoundError(
                f"{place} has no variant {variant!r} (looked for {looked}; {what_is_there(names)}); "
                f"pass variant=None to load {others[0]!r}"
            )
    if variant is None and shards:
        return MissingWeightsError(
            f"{place} has shards such as {shards[0]!r} but neither {looked}; fetch the index file again"
        )
    unsafe = [name for name in names if name.endswith(_CODE_FORMATS) and name != "training_args.bin"]
    if unsafe:
        return UnsafeFormatError(
            f"{place} has weights only as {', '.join(repr(name) for name in unsafe[:_SHOWN])} (looked for {looked}). "
            "Such files can run code where they are opened in the usual way, so loadstone reads them only on request: "
            "pass use_safetensors=False (nothing in them is run), or make safetensors of them once with "
            "`loadstone convert SRC DST`"
        )
    single = [name for name in names if name.endswith(".safetensors")]
    hint = f"; rename {single[0]!r} to {wanted[0]!r} if that is the model" if len(single) == 1 else ""
    variants = sorted({found[1] for name in names if (found := re.fullmatch(r"model\.(.+)\.safetensors", name))})
    if variants and variant is None:
        hint = f"; there is variant={variants[0]!r}"
    return NotFoundError(f"{place} has no weights: looked for {looked}; {what_is_there(names)}{hint}")
