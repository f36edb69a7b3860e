"""Weights that torch.save wrote, read on request: pytorch_model.bin, single or in shards.

Nothing in such a file is run, imported or called: `pickle_data` reads what the pickle says, and from it follows where
each tensor's bytes lie, as from a header. From there they go the way of all weights: mapped, cast, sent or quantized,
in memory for no more than the model. Both formats of torch.save are read: the zip archive, and the older one of
pickles followed by the bytes (``_use_new_zipfile_serialization=False``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import FormatError, IntegrityError, NotFoundError, UnsafeFormatError
from .checkpoint import Checkpoint, with_variant
from .header import Header, TensorEntry
from .index import read_index
from .pickle_data import Call, CutOff, Named, read_pickle
from .regular import RegularFile, open_regular
from .source import Source, what_is_there
from .values import LooseBytes, StridedBytes, steps_on_itself
from .zip_records import Record, zip_records

logger = logging.getLogger("loadstone.loading")

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
MAX_PICKLE = 100_000_000  # bytes, as of a safetensors header
_FIRST_READ = 1 << 20
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LIMIT = 1 << 63
_MOST_DIMENSIONS = 64

_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    )
}  # fmt: skip
_PLAIN = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_PARAMETER = ("_rebuild_parameter", "_rebuild_parameter_with_state")
_FOREIGN = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_qtensor": "quantized by torch",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "on the meta device, without values",
    "_rebuild_wrapper_subclass": "of a subclass without bytes of its own",
    "_rebuild_device_tensor_from_numpy": "held as a numpy array",
    "_rebuild_device_tensor_from_cpu_tensor": "held for another device",
}
_OTHER_NAMES = frozenset(
    {
        ("collections", "OrderedDict"), ("torch", "Size"), ("torch", "Tensor"), ("torch", "device"),
        ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer"), ("torch.storage", "UntypedStorage"),
        ("torch._tensor", "_rebuild_from_type_v2"), ("torch.tensor", "_rebuild_from_type_v2"),
        ("torch.serialization", "_get_layout"), ("torch", "per_tensor_affine"), ("torch", "per_channel_affine"),
        ("torch", "QInt8Storage"), ("torch", "QUInt8Storage"), ("torch", "QInt32Storage"),
    }
)  # fmt: skip


class _Storage(NamedTuple):
    """A reference to a storage: its key, the dtype it was saved as, and the part of it that is meant, in elements."""

    key: str
    dtype: torch.dtype | None
    begin: int
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Archive(NamedTuple):
    """What a file's pickle says, and where the storages that it names lie."""

    value: Any
    places: Mapping[str, Record]


def open_pickled(source: Source, variant: str | None = None) -> Checkpoint:
    """The checkpoint of ``pytorch_model.bin`` or of the shards that ``pytorch_model.bin.index.json`` names.

    Raises NotFoundError (there is none), MissingWeightsError (shards), UnsafeFormatError (the file wants anything that
    could run code), FormatError (it is damaged, or holds what is no plain tensor), IntegrityError and PathError.
    """
    single = with_variant(SINGLE, variant)
    if (path := source.find(single)) is not None:
        return Checkpoint.from_headers(source.name, [read_pickled(path)])
    index_name = with_variant(INDEX, variant)
    if (path := source.find(index_name)) is None:
        names = source.listing()
        hint = "; leave out use_safetensors=False" if any(name.endswith(".safetensors") for name in names) else ""
        raise NotFoundError(
            f"{source.describe()} has no pickled weights: looked for {single!r} and {index_name!r}; "
            f"{what_is_there(names)}{hint}"
        )
    index = read_index(path, ending=".bin")
    return Checkpoint.from_headers(source.name, [read_pickled(path) for path in source.fetch(index.shards)], index)


def read_pickled(path: Path) -> Header:
    """The tensors of one file and where they lie, in the order of their bytes. No weight byte is read."""
    with open_regular(path) as file:
        head = file.read(0, min(file.size, 4))
        archive = _read_zip(file) if head == b"PK\3\4" else _read_older(file)
        found = _tensors(archive.value, path)
        spans = [(*_span(name, tensor, archive.places, path), name) for name, tensor in found.items()]
        entries, position = {}, 0
        for begin, end, name in sorted(spans, key=lambda span: span[:2]):
            # Of tensors that share bytes one may be a view of the file; weights that were not tied are no views of each
            # other.
            entries[name] = _entry(name, found[name], path, begin, end, apart=begin >= position or begin == end)
            position = max(position, end)
        return Header(path, entries, {}, file.stamp)


def _read_zip(file: RegularFile) -> _Archive:
    records = zip_records(file)
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise FormatError(f"{file.path} is a zip archive, but none that torch.save wrote: it has no data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in records:
        raise UnsafeFormatError(f"{file.path} is a TorchScript program, not weights; save its state_dict() instead")
    order = records.get(f"{prefix}byteorder")
    if order is not None and file.read(order.begin, min(order.nbytes, 8)) != b"little":
        raise FormatError(f"{file.path} was saved on a big-endian machine; save it again on a little-endian one")
    place = records[pickles[0]]
    if place.nbytes > MAX_PICKLE:
        raise FormatError(f"{file.path}: a pickle of {place.nbytes} bytes; {MAX_PICKLE} are allowed")
    data = file.read(place.begin, place.nbytes)
    value = read_pickle(data, str(file.path), allowed=_allowed, outside=lambda what: _storage(what, file.path)).value
    start = f"{prefix}data/"
    return _Archive(value, {name[len(start) :]: at for name, at in records.items() if name.startswith(start)})


def _read_older(file: RegularFile) -> _Archive:
    """The older format: magic number, protocol, facts of the machine, the value, the keys; then the storages."""
    where, length = str(file.path), _FIRST_READ
    while True:
        data = file.read(0, min(file.size, length))
        storages: dict[str, _Storage] = {}
        try:
            magic = read_pickle(data, where)
            if magic.value != _MAGIC:
                raise FormatError(f"{where} is not a file of torch.save; fetch it again")
            protocol = read_pickle(data, where, begin=magic.end)
            facts = read_pickle(data, where, begin=protocol.end)
            value = read_pickle(
                data,
                where,
                allowed=_allowed,
                outside=lambda what, seen=storages: _seen(_storage(what, file.path), seen),  # type: ignore[misc]
                begin=facts.end,
            )
            keys = read_pickle(data, where, begin=value.end)
            break
        except CutOff:
            if length >= min(file.size, MAX_PICKLE):
                raise
            length = min(length * 16, MAX_PICKLE)
        except UnsafeFormatError as error:
            raise _what_else(file, data) or error from None
    if protocol.value != _PROTOCOL or type(facts.value) is not dict or facts.value.get("little_endian") is not True:
        raise FormatError(f"{where} was saved on a big-endian machine or by an unknown version of torch")
    return _Archive(value.value, _places(file, keys.value, storages, keys.end))


def _what_else(file: RegularFile, data: bytes) -> Exception | None:
    """The error for a file that is no pickle at all, if that is plain."""
    if data[257:262] == b"ustar":
        return UnsafeFormatError(
            f"{file.path} is a tar archive of torch before 0.2, which is not read; load it with torch once and save it"
        )
    if data[:1] != b"\x80":
        return FormatError(f"{file.path} is not a file of torch.save ({file.size} bytes); fetch it again")
    return None


def _seen(storage: _Storage, seen: dict[str, _Storage]) -> _Storage:
    seen.setdefault(storage.key, storage)
    return storage


def _places(file: RegularFile, keys: Any, storages: Mapping[str, _Storage], position: int) -> dict[str, Record]:
    """Each storage of the older format: eight bytes that count its elements, then these."""
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
        raise FormatError(f"{file.path}: the storages it lists are not those that its tensors use")
    places = {}
    for key in keys:
        dtype = storages[key].dtype
        if dtype is None:
            raise FormatError(f"{file.path}: tensors quantized by torch are not read; dequantize() and save them again")
        count = int.from_bytes(file.read(position, 8), "little")
        size = count * dtype.itemsize
        if position + 8 + size > file.size:
            raise FormatError(
                f"{file.path} is truncated: storage {key!r} of {size} bytes begins at {position + 8}, the file has "
                f"{file.size}; fetch it again"
            )
        places[key] = Record(position + 8, size)
        position += 8 + size
    if position != file.size:
        raise FormatError(f"{file.path}: {file.size - position} bytes after the last storage")
    return places


def _allowed(name: Named) -> bool:
    if name in _OTHER_NAMES:
        return True
    if name.module == "torch":
        return name.name in _STORAGES or name.name in _DTYPES
    return name.module == "torch._utils" and name.name in (*_PLAIN, *_PARAMETER, *_FOREIGN)


def _storage(description: Any, path: Path) -> _Storage:
    """The storage that a reference of torch.save means: ("storage", type, key, device, elements[, view])."""
    if type(description) is not tuple or len(description) not in (5, 6) or description[0] != "storage":
        raise UnsafeFormatError(
            f"{path}: the pickle refers to something outside it that is no storage; nothing was run"
        )
    _, kind, key, _, count = description[:5]
    view = description[5] if len(description) == 6 else None
    if type(kind) is not Named or not kind.name.endswith("Storage") or type(key) is not str or not _is_size(count):
        raise FormatError(f"{path}: malformed reference to a storage")
    dtype = _STORAGES.get(kind.name)
    if view is None:
        return _Storage(key, dtype, 0, count)
    if type(view) is not tuple or len(view) != 3 or not (_is_size(view[1]) and _is_size(view[2])):
        raise FormatError(f"{path}: malformed view of a storage")
    return _Storage(key, dtype, view[1], view[2])


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LIMIT


def _tensors(value: Any, path: Path) -> dict[str, _Tensor]:
    """The tensors by name; ``{"state_dict": {...}}``, as trainers save it, is opened."""
    if type(value) is dict and type(value.get("state_dict")) is dict:
        logger.info("%s: the weights are what it holds under 'state_dict'", path)
        value = value["state_dict"]
    if type(value) is not dict:
        raise FormatError(f"{path} holds a {type(value).__name__}, not a state dict (names to tensors)")
    found = {}
    for name, item in value.items():
        if type(name) is not str or not 0 < len(name) <= 512 or not name.isprintable():
            raise FormatError(f"{path}: a key that cannot be the name of a tensor ({type(name).__name__})")
        if type(item) is not Call:
            raise FormatError(
                f"{path}: {name!r} is a {type(item).__name__}, not a tensor; a file of weights holds tensors only: "
                "save state_dict() alone"
            )
        found[name] = _tensor(item, name, path)
    return found


def _tensor(call: Call, name: str, path: Path, depth: int = 0) -> _Tensor:
    """What a call that rebuilds a tensor describes."""
    function, given = call
    if function.name in _FOREIGN:
        raise FormatError(
            f"{path}: tensor {name!r} is {_FOREIGN[function.name]}; weights are plain dense tensors: convert it with "
            "torch and save it again"
        )
    if depth < 4 and function.name == "_rebuild_from_type_v2" and len(given) == 4 and type(given[2]) is tuple:
        if type(given[0]) is Named and given[1] in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
            return _tensor(Call(given[0], given[2]), name, path, depth + 1)
    elif depth < 4 and function.name in _PARAMETER and given and type(given[0]) is Call:
        return _tensor(given[0], name, path, depth + 1)
    elif function.name in _PLAIN and len(given) >= 4 and type(given[0]) is _Storage:
        return _plain(function.name, given, name, path)
    raise FormatError(f"{path}: tensor {name!r} is rebuilt in a way that is not read")


def _plain(kind: str, given: tuple[Any, ...], name: str, path: Path) -> _Tensor:
    storage, offset, shape, strides = given[:4]
    last = given[-1]
    dtype = storage.dtype
    if kind == "_rebuild_tensor_v3":
        dtype = _DTYPES.get(given[6].name) if len(given) > 6 and type(given[6]) is Named else None
    elif len(given) > 6 and type(last) is dict and any(last.values()):
        raise FormatError(f"{path}: tensor {name!r} is a conjugate or negative view; resolve it and save it again")
    if dtype is None:
        raise FormatError(f"{path}: tensor {name!r} is of a dtype that is not read")
    both = type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides) <= _MOST_DIMENSIONS
    if not both or not _is_size(offset) or not all(map(_is_size, (*shape, *strides))):
        raise FormatError(f"{path}: tensor {name!r} has a malformed shape, stride or offset")
    return _Tensor(storage, dtype, offset, shape, strides)


def _span(name: str, tensor: _Tensor, places: Mapping[str, Record], path: Path) -> tuple[int, int]:
    """First and last byte of the file that the tensor touches, if its storage holds it."""
    storage, dtype, offset, shape, strides = tensor
    place = places.get(storage.key)
    if place is None:
        raise IntegrityError(f"{path}: the bytes of tensor {name!r} (storage {storage.key!r}) are not in the file")
    assert storage.dtype is not None
    unit = storage.dtype.itemsize
    if (storage.begin + storage.length) * unit > place.nbytes:
        raise FormatError(
            f"{path}: storage {storage.key!r} of tensor {name!r} should have {storage.length} elements, the file holds "
            f"{place.nbytes} bytes of it"
        )
    size = dtype.itemsize
    count = 1
    for length in shape:
        count *= length
        if count * size >= _LIMIT:
            raise FormatError(f"{path}: tensor {name!r} has a shape that is too large")
    span = (1 + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))) * size if count else 0
    if count and offset * size + span > storage.length * unit:
        raise FormatError(f"{path}: tensor {name!r} reaches beyond its storage of {storage.length * unit} bytes")
    begin = place.begin + storage.begin * unit + offset * size
    return begin, begin + span


def _entry(name: str, tensor: _Tensor, path: Path, begin: int, end: int, *, apart: bool) -> TensorEntry:
    """The tensor as an entry of the checkpoint: ``apart`` if no other one has these bytes already."""
    _, dtype, _, shape, strides = tensor
    size, total = dtype.itemsize, math.prod(shape) * dtype.itemsize
    if not _in_a_row(shape, strides):
        whole = apart and begin % size == 0 and not steps_on_itself(shape, strides)
        return TensorEntry(name, dtype, shape, path, -1, total, StridedBytes(begin, end - begin, strides, whole))
    if apart and begin % size == 0:
        return TensorEntry(name, dtype, shape, path, begin, total)
    return TensorEntry(name, dtype, shape, path, -1, total, LooseBytes(begin, total))


def _in_a_row(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    if 0 in shape:
        return True
    for length, step in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True
