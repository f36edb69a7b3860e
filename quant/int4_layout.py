"""The order in which torch's int4 products want codes: learnt from torch's own packing, so that it can be undone.

torch packs 4-bit codes for the instructions of one processor and offers no way back; files need one order for all. The
packing moves nibbles inside tiles, the same way in each: `learn` packs tiles that hold their own positions, and checks
on random codes that it has understood. Where it has not, `layout_for` says None, and codes stay as files hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 20  # codes worked on at a time
_INNER = 8  # k tiles in a row of the GPU's layout: the widest torch has
_CPU_ROWS = (64, 32, 16)  # by the width of the vectors


class Layout(NamedTuple):
    """Tiles of (rows, columns) codes, in order of rows, then of columns.

    ``order``: (rows * columns,) int64, where in its tile each packed nibble comes from; the low one of a byte first.
    ``pack``: (n, k) uint8 codes → packed bytes.
    """

    rows: int
    columns: int
    order: Tensor
    pack: Callable[[Tensor], Tensor]

    def packed(self, plain: Tensor) -> Tensor:
        """Plain bytes, (n, k / 2) uint8 (`join`), as packed ones, of the same shape and dtype."""
        out = torch.empty_like(plain)
        step = max(1, _CHUNK // (2 * plain.shape[1]) // self.rows) * self.rows
        for part, target in zip(plain.split(step), out.split(step), strict=True):
            target.copy_(self.pack(split(part)).view(part.shape))
        return out

    def codes(self, packed: Tensor) -> Tensor:
        """Packed bytes of whole tiles, (n, k / 2) uint8, as codes, (n, k) uint8."""
        rows, columns = packed.shape[0], 2 * packed.shape[1]
        nibbles = torch.stack((packed & 15, packed >> 4), 2)
        tiles = nibbles.view(rows // self.rows, columns // self.columns, self.rows * self.columns)
        back = torch.argsort(self.order)
        tiles = tiles[..., back].view(rows // self.rows, columns // self.columns, self.rows, self.columns)
        return tiles.transpose(1, 2).reshape(rows, columns)


def join(codes: Tensor) -> Tensor:
    """(n, k) uint8 codes, two to a byte, the first in the high bits: (n, k / 2) uint8, as files hold them."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


def split(plain: Tensor) -> Tensor:
    """`join` undone."""
    return torch.stack((plain >> 4, plain & 15), 2).flatten(1)


def layout_for(device: torch.device, rows: int, columns: int) -> Layout | None:
    """The layout for a (rows, columns) weight on a device; None if torch has none there, or not for these sizes."""
    layout = _of_cpu() if device.type == "cpu" else _of_cuda(device.index or 0) if device.type == "cuda" else None
    if layout is None or rows % layout.rows or columns % max(layout.columns, 32):
        return None
    return layout


@lru_cache(maxsize=1)
def _of_cpu() -> Layout | None:
    convert = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    if convert is None or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None

    def pack(codes: Tensor) -> Tensor:
        packed: Tensor = convert(codes.int(), 1)
        return packed

    found = (learn(pack, rows, 1, torch.device("cpu")) for rows in _CPU_ROWS)
    return next((layout for layout in found if layout is not None), None)


@lru_cache(maxsize=8)
def _of_cuda(index: int) -> Layout | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability(index) < (8, 0):
        return None

    def pack(codes: Tensor) -> Tensor:
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(join(codes), _INNER)
        return packed.view(torch.uint8)

    return learn(pack, 8, 16 * _INNER, torch.device("cuda", index))


def learn(pack: Callable[[Tensor], Tensor], rows: int, columns: int, device: torch.device) -> Layout | None:
    """The layout of a packing whose tiles have this size; None if it is not so."""
    width = max(columns, 32)
    count = rows * columns
    places = torch.arange(count, device=device)
    order = torch.zeros_like(places)
    for digit in range(-(-count.bit_length() // 4)):
        codes = (places >> (4 * digit) & 15).to(torch.uint8).view(rows, columns).repeat(1, width // columns)
        packed = pack(codes).reshape(-1)[: count // 2]
        order |= torch.stack((packed & 15, packed >> 4), 1).view(-1).long() << (4 * digit)
    if not torch.equal(order.sort()[0], places):
        return None
    layout = Layout(rows, columns, order, pack)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (3 * rows, 2 * width), generator=generator).to(device, torch.uint8)
    return layout if torch.equal(layout.codes(layout.packed(join(codes))), codes) else None
