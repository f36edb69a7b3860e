"""Quantization on a GPU: the same bytes as on the CPU, and products as Triton compiled them, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import quant_weights
import torch
from quant_weights import same_bytes
from torch import Tensor

from loadstone.kernels import AUTO, Kernels, support
from loadstone.kernels.eight_bit import linear_int8
from loadstone.kernels.four_bit import dequantize_4bit, linear_4bit
from loadstone.quant.codebooks import QUANT_TYPES
from loadstone.quant.eight_bit import dequantize_rows, quantize_rows
from loadstone.quant.four_bit import packed_bytes, quantize_4bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(support.interpreting(), reason="TRITON_INTERPRET is set"),
]
TRITON, TORCH = Kernels("triton"), Kernels("torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
both = pytest.mark.parametrize("kernels", [TRITON, TORCH], ids=["triton", "torch"])


def codes(shape: tuple[int, int], quant_type: str = "nf4", blocksize: int = 64) -> tuple[Any, ...]:
    weight = quant_weights.weight("normal", shape, torch.float32).cuda()
    packed, state = quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize)
    return packed_bytes(packed, state.shape), state.absmax, state.code, blocksize, shape


def bound(x: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    terms = x.double().abs() @ weight.double().abs().t()
    return 2 * weight.shape[1] * 2**-24 * terms + torch.finfo(x.dtype).eps * exact.abs() + 1e-6


@dtypes
@pytest.mark.parametrize("kind", quant_weights.KINDS)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_four_bit_codes_are_those_of_the_cpu(quant_type: str, kind: str, dtype: torch.dtype) -> None:
    weight = quant_weights.weight(kind, (133, 257), dtype)
    packed, state = quantize_4bit(weight, quant_type=quant_type)
    found, other = quantize_4bit(weight.cuda(), quant_type=quant_type)
    assert same_bytes(found.cpu(), packed)
    assert same_bytes(other.absmax.cpu(), state.absmax)


@dtypes
def test_int8_rows_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    weight = quant_weights.weight("normal", (133, 257), dtype)
    for ours, theirs in zip(quantize_rows(weight.cuda()), quantize_rows(weight), strict=True):
        assert same_bytes(ours.cpu(), theirs)


@dtypes
@pytest.mark.parametrize("shape", [(4096, 4096), (77, 333), (1, 1)])
def test_decoding_is_that_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    parts = codes(shape)
    on_cpu = dequantize_4bit(*(part.cpu() if isinstance(part, Tensor) else part for part in parts), dtype)
    for kernels in (TRITON, TORCH):
        assert torch.equal(dequantize_4bit(*parts, dtype, kernels=kernels).cpu(), on_cpu)


@both
@dtypes
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 300])
@pytest.mark.parametrize(("shape", "blocksize"), [((4096, 4096), 64), ((1024, 14336), 128), ((333, 576), 512)])
def test_four_bit_product(
    shape: tuple[int, int], blocksize: int, rows: int, dtype: torch.dtype, kernels: Kernels
) -> None:
    parts = codes(shape, "nf4", blocksize)
    x = quant_weights.weight("normal", (rows, shape[1]), dtype, 1).cuda()
    bias = quant_weights.weight("normal", shape[:1], dtype, 2).cuda()
    weight = dequantize_4bit(*parts, dtype)
    exact = x.double() @ weight.double().t() + bias.double()
    found = linear_4bit(x, *parts, bias, kernels=kernels)
    assert found.dtype == dtype
    assert bool(((found.double() - exact).abs() <= bound(x, weight, exact)).all())
    assert torch.equal(linear_4bit(x, *parts, bias, kernels=kernels), found)


@both
@dtypes
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@pytest.mark.parametrize("shape", [(4096, 4096), (333, 577)])
def test_int8_product(shape: tuple[int, int], rows: int, dtype: torch.dtype, kernels: Kernels) -> None:
    weight = quant_weights.weight("normal", shape, dtype)
    x = quant_weights.weight("normal", (rows, shape[1]), dtype, 1)
    x[:, 3] = 20.0
    weight, scb = quantize_rows(weight)
    expected = linear_int8(x, weight, scb)
    found = linear_int8(x.cuda(), weight.cuda(), scb.cuda(), kernels=kernels)
    room = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found.cpu(), expected, rtol=4 * torch.finfo(dtype).eps, atol=room)


@both
def test_gradients(kernels: Kernels) -> None:
    parts = codes((300, 512))
    weight, scb = (part.cuda() for part in quantize_rows(quant_weights.weight("normal", (300, 512), torch.float32)))
    incoming = quant_weights.weight("normal", (40, 300), torch.float32, 2).cuda()
    for call, decoded in (
        (lambda x: linear_4bit(x, *parts, kernels=kernels), dequantize_4bit(*parts, torch.float32)),
        (lambda x: linear_int8(x, weight, scb, kernels=kernels), dequantize_rows(weight, scb)),
    ):
        x = quant_weights.weight("normal", (40, 512), torch.float32, 1).cuda().requires_grad_()
        call(x).backward(incoming)
        torch.testing.assert_close(x.grad, incoming @ decoded, rtol=1e-4, atol=1e-3)


def test_compiles_whole() -> None:
    parts = codes((256, 512))
    x = quant_weights.weight("normal", (4, 512), torch.bfloat16, 1).cuda().requires_grad_()
    compiled = torch.compile(lambda x: linear_4bit(x, *parts, kernels=TRITON) * 2, fullgraph=True)
    found = torch.autograd.grad(compiled(x).sum(), x)[0]
    torch.testing.assert_close(compiled(x), linear_4bit(x, *parts, kernels=TRITON) * 2)
    torch.testing.assert_close(found, torch.autograd.grad(linear_4bit(x, *parts, kernels=TRITON).sum() * 2, x)[0])


def test_auto_takes_triton_here() -> None:
    for operation in ("dequantize_4bit", "linear_4bit", "linear_int8"):
        assert AUTO.chosen(operation, torch.device("cuda")) == "triton"


@pytest.mark.slow
def test_more_numbers_than_32_bits_count() -> None:
    shape = ((1 << 19) + 64, 4096)
    count, tail = shape[0] * shape[1], 64
    if torch.cuda.mem_get_info()[0] < 4 * count:
        pytest.skip("needs 9 GB of free GPU memory")
    packed = torch.full((count // 2,), 0x77, dtype=torch.uint8, device="cuda")
    absmax, code = torch.ones(count // 64, device="cuda"), codes((1, 64))[2]
    packed[-tail * 2048 :] = torch.arange(tail * 2048, device="cuda").to(torch.uint8)
    last = (packed[-tail * 2048 :], absmax[-tail * 64 :], code, 64, (tail, 4096))
    x = quant_weights.weight("normal", (2, 4096), torch.bfloat16, 1).cuda()
    torch.testing.assert_close(
        linear_4bit(x, packed, absmax, code, 64, shape, kernels=TRITON)[:, -tail:], linear_4bit(x, *last, kernels=TORCH)
    )
    whole = dequantize_4bit(packed, absmax, code, 64, shape, torch.bfloat16, kernels=TRITON)
    assert torch.equal(whole[-tail:], dequantize_4bit(*last, torch.bfloat16, kernels=TORCH))
