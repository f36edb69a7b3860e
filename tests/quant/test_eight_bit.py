"""int8 rows: frozen vectors of bitsandbytes, and what holds for every weight and every input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quant_weights
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_weights import FLOATS, same_bytes
from torch import Tensor

from loadstone.errors import KernelError, QuantizationError
from loadstone.kernels import eight_bit as kernel
from loadstone.quant.eight_bit import dequantize_rows, linear_int8, quantize_rows

VECTORS = json.loads((Path(__file__).parent / "vectors" / "eight_bit.json").read_text())
KINDS = tuple(kind for kind in quant_weights.KINDS if kind != "huge")
matrices = st.builds(
    quant_weights.weight, st.sampled_from(KINDS), quant_weights.matrices, st.sampled_from(FLOATS), st.integers(0, 1000)
)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["weight"]["dtype"])
def test_frozen_vectors(vector: dict[str, Any]) -> None:
    codes, scb = quantize_rows(quant_weights.from_json(vector["weight"]))
    assert same_bytes(codes, quant_weights.from_json(vector["codes"]))
    assert same_bytes(scb, quant_weights.from_json(vector["scb"]))


@tiny.examples(60)
@given(weight=matrices)
def test_rows_are_off_by_half_a_step(weight: Tensor) -> None:
    half = weight.half().double()
    codes, scb = quantize_rows(weight)
    assert torch.equal(scb.double(), half.abs().amax(1))
    off = (dequantize_rows(codes, scb).double() - half).abs()
    assert bool((off <= scb.double().unsqueeze(1) * (0.5 / 127 + 3e-7)).all())
    assert int(codes.min()) >= -127


@tiny.examples(40)
@given(weight=matrices, rows=st.integers(1, 3))
def test_chunks_of_rows_do_not_show(weight: Tensor, rows: int) -> None:
    expected = quantize_rows(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loadstone.quant.eight_bit._CHUNK", rows * weight.shape[1])
        patch.setattr(kernel, "_CHUNK", {"cpu": rows * weight.shape[1]})
        found = quantize_rows(weight)
        assert torch.equal(dequantize_rows(*found), expected[0] * expected[1].unsqueeze(1) * kernel.PER_127)
    assert same_bytes(found[0], expected[0])
    assert same_bytes(found[1], expected[1])


@tiny.examples(40)
@given(
    rows=st.integers(1, 20), shape=quant_weights.matrices, dtype=st.sampled_from(FLOATS), biased=st.booleans(),
    outliers=st.booleans(),
)  # fmt: skip
def test_product_is_near_float64(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, biased: bool, outliers: bool
) -> None:
    weight = quant_weights.weight("normal", shape, dtype)
    codes, scb = quantize_rows(weight)
    x = quant_weights.weight("normal", (rows, 1, shape[1]), dtype, 1).clamp_(-5, 5)
    if outliers:
        x[..., 0] = 40.0
    bias = quant_weights.weight("normal", shape[:1], dtype, 2) if biased else None
    found = linear_int8(x, codes, scb, bias)
    assert found.dtype == dtype
    assert found.shape == (rows, 1, shape[0])
    exact = x.double() @ dequantize_rows(codes, scb, torch.float32).double().t()
    if bias is not None:
        exact = exact + bias.double()
    # A number of x is off by half a step of its row (the outliers, kept apart, by rounding), and by fp16's rounding.
    step = 5 * (0.5 / 127 + 2**-11) * scb.double() * shape[1] * 0.3 + 5 * 0.5 / 127 * scb.double() * shape[1] * 0.7
    rounding = 4 * torch.finfo(dtype).eps * (exact.abs() + 40 * scb.double())
    assert bool(((found.double() - exact).abs() <= step + rounding + 1e-4).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_column_of_outliers_costs_the_others_nothing(dtype: torch.dtype) -> None:
    weight, x = quant_weights.weight("normal", (8, 64), dtype), quant_weights.weight("normal", (4, 64), dtype, 1)
    x = x.clamp(-3, 3)
    codes, scb = quantize_rows(weight)
    x[:, 5] = 0.0
    expected = linear_int8(x, codes, scb, threshold=6.0).double()
    x[2, 5] = 1000.0
    found = linear_int8(x, codes, scb, threshold=6.0).double()
    added = x[:, 5:6].double() * dequantize_rows(codes, scb, dtype)[:, 5].double()
    assert bool(((found - expected - added).abs() <= 3 * torch.finfo(dtype).eps * (added.abs() + expected.abs())).all())
    without = linear_int8(x, codes, scb, threshold=0.0).double()
    assert float((without - expected - added)[2].abs().max()) > float((found - expected - added)[2].abs().max())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("value", "kept"), [(6.0, True), (-6.0, True), (5.999, True), (5.99609375, False), (1e5, True), (5.0, False)]
)
def test_which_columns_are_kept_apart(value: float, kept: bool, dtype: torch.dtype) -> None:
    """Those with a magnitude of 6 or more once fp16 has rounded it, all of their rows, unrounded and out of the scale;
    by float64, with a weight that picks single columns."""
    x = quant_weights.weight("normal", (5, 16), dtype, 1).clamp_(-3, 3)
    x[2, 4] = min(value, torch.finfo(dtype).max)
    kept = kept or float(x[2, 4].abs()) >= 6.0  # bf16 has nothing between 5.96875 and 6
    codes, scb = quantize_rows(torch.eye(16))
    found = linear_int8(x, codes, scb, threshold=6.0).double()
    half = x.half().double()
    outliers = half.abs() >= 6.0
    columns = outliers.any(0)
    assert columns.tolist() == [kept and column == 4 for column in range(16)]
    scale = half.masked_fill(outliers, 0.0).abs().amax(1, keepdim=True)
    expected = (half * (127.0 / scale.float()).double()).round() * scale * 127 * kernel.PER_127_SQUARED
    expected[:, columns] = x[:, columns].double()
    room = 2 * torch.finfo(dtype).eps * expected.abs() + 1e-6
    assert bool(((found - expected).abs() <= room).all())


def test_gradients_are_those_of_the_decoded_weight() -> None:
    codes, scb = quantize_rows(quant_weights.weight("normal", (10, 33), torch.float32))
    x = quant_weights.weight("normal", (2, 3, 33), torch.float32, 1).requires_grad_()
    bias = torch.zeros(10, requires_grad=True)
    incoming = quant_weights.weight("normal", (2, 3, 10), torch.float32, 2)
    linear_int8(x, codes, scb, bias).backward(incoming)
    torch.testing.assert_close(x.grad, incoming @ dequantize_rows(codes, scb))
    torch.testing.assert_close(bias.grad, incoming.sum((0, 1)))


@tiny.examples(30)
@given(rows=st.integers(1, 5), shape=st.tuples(st.integers(1, 9), st.sampled_from((1, 2, 100, 1024, 1025, 3000))))
def test_integer_products_are_exact(rows: int, shape: tuple[int, int]) -> None:
    """By torch's own product and by the other way; of numbers at the end of the range, so that sums are large."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = (
        torch.randint(100, 128, size, generator=generator, dtype=torch.int8) for size in ((rows, shape[1]), shape)
    )
    exact = x.long() @ weight.long().t()
    assert torch.equal(kernel._product(x, weight).long(), exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_multiplies_int8", lambda *_: False)
        assert torch.equal(kernel._product(x, weight).long(), exact)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e5, -7e4])
def test_refuses_what_float16_cannot_hold(bad: float) -> None:
    weight = torch.ones(4, 8)
    weight[2, 3] = bad
    with pytest.raises(QuantizationError, match="65504"):
        quantize_rows(weight)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(2, 2).double(), torch.ones(0, 3), torch.ones(2, 2).int()])
def test_refuses_what_has_no_rows(weight: Tensor) -> None:
    with pytest.raises(QuantizationError, match="int8 rows hold matrices"):
        quantize_rows(weight)


def test_refuses_what_does_not_fit() -> None:
    codes, scb = quantize_rows(torch.ones(4, 8))
    with pytest.raises(KernelError, match=r"x of shape \(2, 7\)"):
        linear_int8(torch.ones(2, 7), codes, scb)
    with pytest.raises(KernelError, match=r"bias of \(3,\)"):
        linear_int8(torch.ones(2, 8), codes, scb, torch.ones(3))
    with pytest.raises(KernelError, match=r"scales \(3,\)"):
        linear_int8(torch.ones(2, 8), codes, scb[:3])
    with pytest.raises(KernelError, match=r"not torch\.uint8"):
        linear_int8(torch.ones(2, 8), codes.to(torch.uint8), scb)
    with pytest.raises(KernelError, match="threshold of -1"):
        linear_int8(torch.ones(2, 8), codes, scb, threshold=-1.0)
