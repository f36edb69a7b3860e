"""The compiled 4-bit product against a float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.kernels import native
from loadstone.kernels.four_bit import linear_4bit
from loadstone.quant.four_bit import dequantize_4bit, quantize_4bit

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"compiled product: {native.why_not()}")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, native.MOST_ROWS),
    outputs=st.integers(1, 70),
    blocks=st.integers(1, 5),
    blocksize=st.sampled_from((32, 64, 128, 256)),
    kind=st.sampled_from(("nf4", "fp4")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    bias=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_equals_float64(rows, outputs, blocks, blocksize, kind, dtype, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    width = blocks * blocksize
    weight = torch.randn(outputs, width, generator=generator)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    extra = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    packed, state = quantize_4bit(weight, quant_type=kind, blocksize=blocksize)
    assert native.takes(x, blocksize, width)
    found = linear_4bit(x, packed.view(-1), state.absmax, state.code, blocksize, (outputs, width), extra)
    exact = dequantize_4bit(packed, state, dtype).double()
    wanted = x.double() @ exact.T + (0 if extra is None else extra.double())
    size = x.double().abs() @ exact.abs().T + (0 if extra is None else extra.double().abs())
    assert found.dtype == dtype
    assert found.shape == (rows, outputs)
    assert ((found.double() - wanted).abs() <= 2 * torch.finfo(dtype).eps * size + 1e-6 * size).all()


@pytest.mark.parametrize(("rows", "width"), [(17, 128), (1, 96)])
def test_leaves_the_rest_to_torch(rows, width):
    assert not native.takes(torch.zeros(rows, width), 64, width)
