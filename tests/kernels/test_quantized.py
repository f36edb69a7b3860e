"""Products with 4-bit and int8 weights: torch's against float64, Triton's in its interpreter against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import quant_weights
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import KernelError
from loadstone.kernels import AUTO, Kernels, native, support
from loadstone.kernels import four_bit as torch_four_bit
from loadstone.kernels.eight_bit import linear_int8
from loadstone.kernels.four_bit import dequantize_4bit, linear_4bit
from loadstone.quant.codebooks import QUANT_TYPES, codebook
from loadstone.quant.eight_bit import quantize_rows
from loadstone.quant.four_bit import packed_bytes, quantize_4bit

TRITON, TORCH = Kernels("triton"), Kernels("torch")
interpreted = pytest.mark.skipif(
    not support.interpreting(), reason="for Triton's interpreter; tests/gpu has the GPU's"
)  # fmt: skip
compiled = pytest.mark.skipif(native.why_not() is not None, reason=f"compiled code: {native.why_not()}")
ways = pytest.mark.parametrize(
    "kernels",
    [TORCH, pytest.param(TRITON, marks=interpreted), pytest.param(Kernels("native"), marks=compiled)],
    ids=["torch", "triton", "native"],
)
# The interpreter multiplies and rounds bfloat16 wrongly; on a GPU it is tested.
dtypes = st.sampled_from((torch.float32, torch.float16))
matrices = st.tuples(st.integers(1, 70), st.one_of(st.integers(1, 150), st.sampled_from((64, 128, 256))))
quant_types = st.sampled_from(QUANT_TYPES)
blocksizes = st.sampled_from((32, 64, 128, 512))
rows_of_x = st.one_of(st.integers(0, 18), st.sampled_from((1, 16)))


def codes(shape: tuple[int, ...], quant_type: str = "nf4", blocksize: int = 64) -> tuple[Any, ...]:
    """(packed, absmax, code, blocksize, shape) of a random weight."""
    packed, state = quantize_4bit(
        quant_weights.weight("normal", shape, torch.float32), quant_type=quant_type, blocksize=blocksize
    )
    return packed_bytes(packed, state.shape), state.absmax, state.code, blocksize, shape


def decoded(packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: tuple[int, ...]) -> Tensor:
    """The weight by the definition, number by number, in float64 from fp32 products."""
    numbers = []
    for place in range(int(torch.tensor(shape).prod())):
        byte = int(packed[place // 2])
        numbers.append(code[byte & 15 if place % 2 else byte >> 4] * absmax[place // blocksize])
    return torch.stack(numbers).view(shape)


def bound(x: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    """How far a product in the dtype of x may be from the exact one: its sums in fp32, its result rounded."""
    terms = x.double().abs() @ weight.double().abs().t()
    return 2 * weight.shape[1] * 2**-24 * terms + torch.finfo(x.dtype).eps * exact.abs() + 1e-6


@ways
@tiny.examples(12)
@given(
    shape=st.one_of(st.tuples(st.integers(1, 300)), st.tuples(st.integers(1, 7), st.integers(1, 60))),
    quant_type=quant_types, blocksize=blocksizes, dtype=dtypes,
)  # fmt: skip
def test_decodes_by_the_definition(
    kernels: Kernels, shape: tuple[int, ...], quant_type: str, blocksize: int, dtype: torch.dtype
) -> None:
    parts = codes(shape, quant_type, blocksize)
    found = dequantize_4bit(*parts, dtype, kernels=kernels)
    assert found.dtype == dtype
    assert torch.equal(found, decoded(*parts).to(dtype))


@ways
@tiny.examples(25)
@given(shape=matrices, rows=rows_of_x, quant_type=quant_types, blocksize=blocksizes, dtype=dtypes, biased=st.booleans())
def test_four_bit_product_is_near_float64(
    kernels: Kernels, shape: tuple[int, int], rows: int, quant_type: str, blocksize: int, dtype: torch.dtype,
    biased: bool,
) -> None:  # fmt: skip
    parts = codes(shape, quant_type, blocksize)
    x = quant_weights.weight("normal", (rows, shape[1]), dtype, 1)
    bias = quant_weights.weight("normal", shape[:1], dtype, 2) if biased else None
    found = linear_4bit(x, *parts, bias, kernels=kernels)
    weight = dequantize_4bit(*parts, dtype, kernels=TORCH)
    exact = x.double() @ weight.double().t()
    exact = exact if bias is None else exact + bias.double()
    assert found.dtype == dtype
    assert bool(((found.double() - exact).abs() <= bound(x, weight, exact)).all())


@ways
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_four_bit_gradients(kernels: Kernels, rows: int) -> None:
    parts = codes((30, 64))
    x = quant_weights.weight("normal", (rows, 2, 64), torch.float32, 1).requires_grad_()
    bias = torch.zeros(30, requires_grad=True)
    incoming = quant_weights.weight("normal", (rows, 2, 30), torch.float32, 2)
    linear_4bit(x, *parts, bias, kernels=kernels).backward(incoming)
    torch.testing.assert_close(x.grad, incoming @ dequantize_4bit(*parts, torch.float32, kernels=TORCH))
    torch.testing.assert_close(bias.grad, incoming.sum((0, 1)))


def test_four_bit_gradients_can_be_differentiated() -> None:
    parts = codes((6, 64))
    x = quant_weights.weight("normal", (2, 64), torch.float32, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(linear_4bit(x, *parts).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    weight = dequantize_4bit(*parts, torch.float32)
    torch.testing.assert_close(second, (2 * torch.ones(2, 64) @ weight.t()) @ weight)


@tiny.examples(20)
@given(shape=matrices, rows=st.integers(1, 4), chunk=st.sampled_from((64, 640, 4096)), blocksize=blocksizes)
def test_chunks_of_the_weight_do_not_show(shape: tuple[int, int], rows: int, chunk: int, blocksize: int) -> None:
    parts = codes(shape, "nf4", blocksize)
    x, bias = torch.eye(shape[1])[: rows % shape[1] + 1], torch.ones(shape[0])
    whole = dequantize_4bit(*parts, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_four_bit, "_CHUNK", {"cpu": chunk, "gpu": chunk})
        assert torch.equal(dequantize_4bit(*parts, torch.float32), whole)
        found = linear_4bit(x, *parts, bias)
    assert torch.equal(found, x @ whole.t() + 1)


def test_autocast_casts_as_a_linear_layer() -> None:
    parts = codes((8, 64))
    x = quant_weights.weight("normal", (3, 64), torch.float32, 1)
    rows = quantize_rows(quant_weights.weight("normal", (8, 64), torch.float32))
    expected = linear_4bit(x.bfloat16(), *parts), linear_int8(x.bfloat16() * 4, *rows)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_4bit(x, *parts, torch.zeros(8)), linear_int8(x * 4, *rows)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other)


@interpreted
@tiny.examples(20)
@given(
    shape=matrices, rows=st.one_of(st.integers(0, 18), st.just(40)), dtype=dtypes, biased=st.booleans(),
    scale=st.sampled_from((1.0, 4.0)), threshold=st.sampled_from((0.0, 6.0)),
)  # fmt: skip
def test_int8_product_is_torchs(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, biased: bool, scale: float, threshold: float
) -> None:
    """Integers are exact in both; the scaling may be fused on a GPU, here it is the same."""
    weight, scb = quantize_rows(quant_weights.weight("normal", shape, dtype))
    x = quant_weights.weight("normal", (rows, shape[1]), dtype, 1) * scale
    bias = quant_weights.weight("normal", shape[:1], dtype, 2) if biased else None
    arguments = (x, weight, scb, bias, threshold)
    torch.testing.assert_close(linear_int8(*arguments, kernels=TRITON), linear_int8(*arguments, kernels=TORCH))


@interpreted
def test_int8_gradients_are_torchs() -> None:
    weight, scb = quantize_rows(quant_weights.weight("normal", (10, 40), torch.float32))
    found = []
    for kernels in (TRITON, TORCH):
        x = quant_weights.weight("normal", (3, 40), torch.float32, 1).requires_grad_()
        found.append(torch.autograd.grad(linear_int8(x, weight, scb, kernels=kernels).square().sum(), x)[0])
    torch.testing.assert_close(*found)


@ways
def test_compiles_whole(kernels: Kernels) -> None:
    parts = codes((20, 64))
    weight, scb = quantize_rows(quant_weights.weight("normal", (20, 64), torch.float32))
    x = quant_weights.weight("normal", (2, 3, 64), torch.float32, 1) * 3

    def both(x: Tensor) -> Tensor:
        return linear_4bit(x, *parts, kernels=kernels) + linear_int8(x, weight, scb, kernels=kernels)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for call in (both, compiled):
        x = x.detach().requires_grad_()
        out = call(x)
        found = out.detach(), *torch.autograd.grad(out.sum(), x)
        if call is both:
            expected = found
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("prefix", ["", pytest.param("triton_", marks=interpreted)])
def test_operations_are_what_torch_expects(prefix: str) -> None:
    if prefix:
        import loadstone.kernels.fused.eight_bit
        import loadstone.kernels.fused.four_bit  # noqa: F401
    operations = torch.ops.loadstone
    packed, absmax, code, blocksize, shape = codes((20, 64))
    weight, scb = quantize_rows(quant_weights.weight("normal", (20, 64), torch.float32))
    decode = getattr(operations, f"{prefix}dequantize_4bit").default
    torch.library.opcheck(decode, (packed, absmax, code, blocksize, list(shape), torch.float16))
    for grad in (True, False):
        x = torch.randn(3, 64, requires_grad=grad)
        for bias in (None, torch.randn(20, requires_grad=grad)):
            four = (x, packed, absmax, code, blocksize, list(shape), bias)
            torch.library.opcheck(getattr(operations, f"{prefix}linear_4bit").default, four)
            eight = (x, weight, scb, bias, 6.0)
            torch.library.opcheck(getattr(operations, f"{prefix}linear_int8").default, eight)
    torch.library.opcheck(operations.dequantize_rows.default, (weight, scb, torch.float16))


@interpreted
@pytest.mark.parametrize("blocksize", [64, 512])
def test_columns_split_over_programs(blocksize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.kernels.fused import four_bit

    parts = codes((5, 448), "nf4", blocksize)
    x, bias = quant_weights.weight("normal", (3, 448), torch.float32, 1), torch.ones(5)
    found = []
    for splits in (1, 2, 3, 8):
        monkeypatch.setattr(four_bit, "_splits", lambda *_, splits=splits: splits)
        found.append(linear_4bit(x, *parts, bias, kernels=TRITON))
        torch.testing.assert_close(found[-1], found[0])
        assert torch.equal(linear_4bit(x, *parts, bias, kernels=TRITON), found[-1])


def test_refuses_what_does_not_fit() -> None:
    packed, absmax, code, blocksize, shape = codes((6, 64))
    x = torch.ones(2, 64)
    for arguments, message in (
        ((x[:, 1:], packed, absmax, code, blocksize, shape), r"x of shape \(2, 63\)"),
        ((x, packed[1:], absmax, code, blocksize, shape), r"packed .* \(192,\)"),
        ((x, packed, absmax[1:], code, blocksize, shape), r"absmax .* \(6,\)"),
        ((x, packed, absmax.double(), code, blocksize, shape), "float64"),
        ((x, packed, absmax, code[:8], blocksize, shape), r"code .* \(16,\)"),
        ((x, packed, absmax, code, 63, shape), "even number of numbers, not 63"),
        ((x, packed, absmax, code, 0, shape), "even number of numbers, not 0"),
        ((x, packed, absmax, code, blocksize, (384,)), r"shape \(384,\) cannot multiply"),
        ((x, packed, absmax, code, blocksize, shape, torch.ones(5)), r"bias of \(5,\)"),
    ):
        with pytest.raises(KernelError, match=message):
            linear_4bit(*arguments)


@interpreted
def test_triton_refuses_what_it_does_not_compute() -> None:
    parts = codes((6, 64))
    weight, scb = quantize_rows(torch.ones(6, 64))
    with pytest.raises(KernelError, match="not float64"):
        linear_4bit(torch.ones(2, 64).double(), *parts, kernels=TRITON)
    with pytest.raises(KernelError, match=r"not torch\.float64"):
        dequantize_4bit(*parts, torch.float64, kernels=TRITON)
    with pytest.raises(KernelError, match="not float64"):
        linear_int8(torch.ones(2, 64).double(), weight, scb, kernels=TRITON)
    odd = (torch.zeros(64, dtype=torch.uint8), torch.ones(6), codebook("nf4"), 24, (2, 64))
    with pytest.raises(KernelError, match="a power of two"):
        linear_4bit(torch.ones(2, 64), *odd, kernels=TRITON)


def test_auto_takes_no_triton_on_a_cpu() -> None:
    assert AUTO.chosen("linear_int8", "cpu") == "torch"
    for operation in ("dequantize_4bit", "linear_4bit"):
        assert AUTO.chosen(operation, "cpu") == ("torch" if native.why_not() else "native")
