"""Scales that are quantized themselves: every kernel gives the same bits as bitsandbytes' rounding, twice."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_code import compiled

from loadstone.errors import KernelError
from loadstone.kernels import Kernels, support
from loadstone.kernels.scales import dequantize_absmax

interpreted = pytest.mark.skipif(not support.interpreting(), reason="for Triton's interpreter")
KERNELS = [
    Kernels("torch"),
    pytest.param(Kernels("triton"), marks=interpreted),
    pytest.param(Kernels("native"), marks=compiled),
]


def parts(count: int, blocksize: int, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    absmax = torch.randn(-(-count // blocksize), generator=generator)
    return codes, absmax, torch.randn(256, generator=generator), 0.1 + seed / 7, blocksize


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.default)
@tiny.examples(25)
@given(
    count=st.integers(1, 1500) | st.just((1 << 14) + 5),
    blocksize=st.sampled_from((1, 24, 64, 256)),
    seed=st.integers(0, 99),
)
def test_same_bits(kernels: Kernels, count: int, blocksize: int, seed: int) -> None:
    codes, absmax, code, offset, _ = given_ = parts(count, blocksize, seed)
    found = dequantize_absmax(*given_, kernels=kernels)
    product = code[codes.long()] * absmax.repeat_interleave(blocksize)[:count]
    assert torch.equal(found, product + torch.tensor(offset, dtype=torch.float32))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.default)
def test_compiles_whole(kernels: Kernels) -> None:
    given_ = parts(300, 256)
    compiled = torch.compile(lambda *v: dequantize_absmax(*v, kernels=kernels), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given_), dequantize_absmax(*given_, kernels=kernels))


@pytest.mark.parametrize(
    "name", ["", pytest.param("triton_", marks=interpreted), pytest.param("native", marks=compiled)]
)
def test_operations_are_what_torch_expects(name: str) -> None:
    import loadstone.kernels.fused.scales  # noqa: F401

    full = "dequantize_absmax_native" if name == "native" else f"{name}dequantize_absmax"
    torch.library.opcheck(getattr(torch.ops.loadstone, full).default, parts(300, 256))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({0: torch.zeros(300)}, "codes of 300"),
        ({1: torch.zeros(3)}, r"absmax of 300 quantized scales in blocks of 256 is \(2,\)"),
        ({2: torch.zeros(16)}, "code of 300"),
        ({4: 0}, "blocks of 0"),
    ],
)
def test_refuses_what_does_not_fit(change: dict, told: str) -> None:
    given_ = list(parts(300, 256))
    for place, value in change.items():
        given_[place] = value
    with pytest.raises(KernelError, match=told):
        dequantize_absmax(*given_)
