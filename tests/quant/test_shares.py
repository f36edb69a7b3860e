"""What ranks make of their parts of a weight is, put together, what one process makes of the whole."""

from __future__ import annotations

import math
from typing import Any

import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loadstone.loading.parallel_slices import chunk
from loadstone.quant.linear import Linear4bit, Linear8bitLt
from loadstone.quant.shares import as_codes, as_floats


class InOut(nn.Module):
    """A linear layer stored the other way round."""

    weight_is_in_out = True

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), None


def plain(rows: int, width: int, in_out: bool, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator)
    if in_out:
        return InOut(weight.t().contiguous())
    layer = nn.Linear(width, rows, bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def shared(kind: type, layer: nn.Module, count: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """What each of ``count`` ranks holds in the end, by what `Part` says and nothing else."""
    weight: Any = layer.weight
    blank = type(layer)(weight.detach().to("meta")) if isinstance(layer, InOut) else layer.to("meta")
    packed = kind.from_linear(blank, **options)
    made = []
    for rank in range(count):
        part = packed.part_of(lambda size, rank=rank: chunk(size, count, rank))
        mine = weight.detach().reshape(part.shape)[tuple(slice(*bound) for bound in part.bounds)].contiguous()
        made.append(part.run(mine))
        for name, blank_part in part.makes.items():
            assert made[-1][name].shape == blank_part.shape
            assert made[-1][name].dtype == blank_part.dtype
    whole = {name: torch.cat([one[name] for one in made]) for name in made[0]}

    def gather(tensor: torch.Tensor, size: int) -> torch.Tensor:
        name = next(name for name in whole if any(tensor is one[name] for one in made))
        assert len(whole[name]) == size
        return whole[name]

    return [
        packed.completed(one, lambda size, rank=rank: chunk(size, count, rank), gather) for rank, one in enumerate(made)
    ]


def check(kind: type, layer: nn.Module, count: int, shared_out: tuple[str, ...], **options: Any) -> None:
    expected = kind.from_linear(layer, **options).parts()
    ranks = shared(kind, layer, count, **options)
    for name, value in expected.items():
        if name in shared_out:
            found = torch.cat([rank[name] for rank in ranks])
            assert [len(rank[name]) for rank in ranks] == [
                end - begin for begin, end in (chunk(len(value), count, rank) for rank in range(count))
            ]
        else:
            found = ranks[0][name]
            assert all(torch.equal(rank[name], found) for rank in ranks)
        assert found.dtype == value.dtype
        assert torch.equal(found.view(torch.uint8), value.view(torch.uint8)), name


@tiny.examples(80)
@given(
    rows=st.integers(1, 40), width=st.integers(1, 70), count=st.integers(1, 5), in_out=st.booleans(),
    block=st.sampled_from([32, 64, 128]), double=st.booleans(), quant_type=st.sampled_from(["nf4", "fp4"]),
    storage=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_4_bit_shares_are_those_of_the_whole(
    rows: int, width: int, count: int, in_out: bool, block: int, double: bool, quant_type: str, storage: torch.dtype
) -> None:
    if (rows * width + 1) // 2 % storage.itemsize:
        storage = torch.uint8
    check(
        Linear4bit, plain(rows, width, in_out, rows * width), count, Linear4bit.shared_out, blocksize=block,
        compress_statistics=double, quant_type=quant_type, quant_storage=storage,
    )  # fmt: skip


@tiny.examples(40)
@given(rows=st.integers(1, 40), width=st.integers(1, 70), count=st.integers(1, 5), in_out=st.booleans())
def test_int8_shares_are_those_of_the_whole(rows: int, width: int, count: int, in_out: bool) -> None:
    check(Linear8bitLt, plain(rows, width, in_out, rows * width), count, Linear8bitLt.shared_out)


@given(rows=st.integers(64, 300), width=st.integers(64, 300), count=st.integers(1, 8))
def test_a_rank_reads_its_share_and_little_more(rows: int, width: int, count: int) -> None:
    layer = Linear4bit(width, rows, bias=False, device="meta")
    read = []
    for rank in range(count):
        part = layer.part_of(lambda size, rank=rank: chunk(size, count, rank))
        read.append(math.prod(end - begin for begin, end in part.bounds))
    assert max(read) <= rows * width / count + (count + 2) * 64


@given(data=st.binary(min_size=1, max_size=64))
def test_codes_held_as_numbers_keep_their_bytes(data: bytes) -> None:
    codes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    for dtype in (torch.uint8, torch.int8):
        held = as_floats(codes.view(dtype))
        assert held.is_floating_point()
        copied = torch.empty_like(held).copy_(held)
        assert torch.equal(as_codes(copied, dtype), codes.view(dtype))
