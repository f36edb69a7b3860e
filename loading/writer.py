"""Writing one safetensors file, straight from the tensors' memory."""

from __future__ import annotations

import ctypes
import json
import os
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import CheckpointError
from .header import name_fault

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64  # of the first tensor in the file; the format itself asks for none
_CHUNK = 32 << 20


def check_writable(name: str, tensor: torch.Tensor) -> None:
    """CheckpointError unless ``tensor`` has bytes of its own that safetensors can hold."""
    fault = name_fault(name) if isinstance(name, str) else "is no text"
    if fault:
        raise CheckpointError(f"{reprlib.repr(name)} cannot be the name of a tensor in a safetensors file: it {fault}")
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{name!r} in the state dict is a {type(tensor).__name__}, not a tensor; leave it out")
    if tensor.is_meta:
        raise CheckpointError(f"tensor {name!r} is on the meta device and has no values; load or initialise it first")
    if tensor.layout != torch.strided:
        raise CheckpointError(f"tensor {name!r} has layout {tensor.layout}; safetensors holds dense ones: densify it")
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold; cast it first")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    progress: Callable[[BinaryIO], object] = lambda file: None,
    values: Callable[[str], torch.Tensor] | None = None,
) -> BinaryIO:
    """Write ``tensors`` to a new file and return it open, all bytes handed to the system but not yet synced.

    Tensors of any device, contiguous or not; at most one of them is copied at a time. They come as `laid_out` says.
    ``progress`` is called with the file after every 32 MiB or so. values: gives each tensor when its turn comes.
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors files are little-endian; this machine is not, saving here is unsupported")
    ordered = laid_out(tensors)
    file = open(path, "xb")  # noqa: SIM115  the caller syncs and closes it
    try:
        file.write(header_bytes(ordered, metadata))
        pending = 0
        for name, tensor in ordered:
            for piece in pieces_of(name, tensor if values is None else values(name)):
                file.write(piece)
                pending += len(piece)
                if pending >= _CHUNK:
                    progress(file)
                    pending = 0
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def laid_out(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Tensors in the order of their bytes in a file: by descending item size, so that each begins at a multiple of its
    own, then as they come."""
    return sorted(tensors.items(), key=lambda item: -item[1].element_size())


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def header_bytes(ordered: Sequence[tuple[str, torch.Tensor]], metadata: Mapping[str, str], at_least: int = 0) -> bytes:
    """What comes before the tensors' bytes, which follow each other in this order; ``at_least`` so many bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor_bytes(tensor)
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-(len(text) + 8) % _ALIGNMENT, at_least - len(text) - 8)
    return len(text).to_bytes(8, "little") + text


def pieces_of(name: str, tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in pieces of at most ``_CHUNK``, without a copy where its memory allows it."""
    size = tensor_bytes(tensor)
    if not size:
        return
    held = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    address = held.data_ptr()
    if not address:
        raise CheckpointError(f"tensor {name!r} ({type(tensor).__name__}) has no memory of its own to save; gather it")
    view = memoryview((ctypes.c_char * size).from_address(address))
    for start in range(0, size, _CHUNK):
        yield view[start : start + _CHUNK]


def sync(file: BinaryIO) -> None:
    """Wait until the file's bytes are on the disk, then close it."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def start_sync(file: BinaryIO) -> None:
    """Let the disk begin with what the system holds of the file, so that the last sync has little left to do."""
    with suppress(OSError, ValueError):  # errors come again in the last sync; a closed file has none
        getattr(os, "fdatasync", os.fsync)(file.fileno())
