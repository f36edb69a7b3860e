"""The compiled 4-bit product against a float64 reference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_code import NATIVE, at, at_each_level, compiled

from loadstone.errors import KernelError
from loadstone.kernels import Kernels, kernel_names, native
from loadstone.kernels.four_bit import dequantize_4bit as decode
from loadstone.kernels.four_bit import linear_4bit
from loadstone.kernels.scales import dequantize_absmax
from loadstone.quant.four_bit import dequantize_4bit, quantize_4bit

TORCH = Kernels("torch")


def weight_of(outputs: int, width: int, blocksize: int = 64, kind: str = "nf4", seed: int = 0) -> tuple:
    """A random 4-bit weight, as the arguments of `linear_4bit` after x."""
    weight = torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed))
    packed, state = quantize_4bit(weight, quant_type=kind, blocksize=blocksize)
    return packed.view(-1), state.absmax, state.code, blocksize, (outputs, width)


@compiled
@at_each_level
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20) | st.sampled_from((32, 33, 128, 129)),
    outputs=st.integers(1, 70),
    blocks=st.integers(1, 5),
    blocksize=st.sampled_from((32, 64, 128, 256)),
    kind=st.sampled_from(("nf4", "fp4")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    bias=st.booleans(),
    nested=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_equals_float64(level, rows, outputs, blocks, blocksize, kind, dtype, bias, nested, seed):
    generator = torch.Generator().manual_seed(seed)
    width = blocks * blocksize
    weight = torch.randn(outputs, width, generator=generator)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    extra = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    packed, state = quantize_4bit(weight, quant_type=kind, blocksize=blocksize, double_quant=nested)
    parts = (packed.view(-1), state.absmax, state.code, blocksize, (outputs, width))
    with at(level):
        found = linear_4bit(x, *parts, extra, nested=state.nested, kernels=NATIVE)
        assert torch.equal(found, linear_4bit(x, *parts, extra, nested=state.nested))
    exact = dequantize_4bit(packed, state, dtype).double()
    wanted = x.double() @ exact.T + (0 if extra is None else extra.double())
    size = x.double().abs() @ exact.abs().T + (0 if extra is None else extra.double().abs())
    assert found.dtype == dtype
    assert found.shape == (rows, outputs)
    assert ((found.double() - wanted).abs() <= 2 * torch.finfo(dtype).eps * size + 1e-6 * size).all()


@compiled
@at_each_level
@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 700),
    blocksize=st.sampled_from((32, 64, 128, 256)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 1 << 20),
)
def test_decodes_to_the_same_bits(level, count, blocksize, dtype, seed):
    """Any codes, table and scales: ends within a byte or a block, subnormal and infinite numbers, NaN."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8, generator=generator)
    scales = torch.randn(-(-count // blocksize), generator=generator) * 10.0 ** torch.randint(
        -44, 38, (-(-count // blocksize),), generator=generator
    )
    scales[seed % scales.numel()] = (1.0, float("inf"), float("nan"), 1e-40)[seed % 4]
    table = torch.randn(16, generator=generator)
    table[seed % 16] = 0
    parts = (packed, scales, table, blocksize, (count,), dtype)
    with at(level):
        found = decode(*parts, kernels=NATIVE)
    expected = decode(*parts, kernels=TORCH)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(1.0), expected.nan_to_num(1.0))


@compiled
@pytest.mark.parametrize(
    ("x", "blocksize", "reason"),
    [
        (torch.zeros(1, 128), 16, "blocks of 16 numbers"),
        (torch.zeros(1, 128, dtype=torch.float64), 64, "float64"),
    ],
)
def test_leaves_the_rest_to_torch(x, blocksize, reason):
    packed = torch.arange(3 * 64, dtype=torch.uint8)
    parts = (packed, torch.ones(3 * 128 // blocksize), torch.arange(16.0), blocksize, (3, 128))
    with pytest.raises(KernelError, match=reason):
        linear_4bit(x, *parts, kernels=NATIVE)
    assert torch.equal(linear_4bit(x, *parts), linear_4bit(x, *parts, kernels=TORCH))


@compiled
@pytest.mark.parametrize(("rows", "width"), [(5, 96), (200, 128)])
def test_blocks_over_rows_and_many_rows(rows, width):
    """What is decoded and then multiplied is the torch form's product to the last bit."""
    packed = torch.randint(0, 256, (2 * width,), dtype=torch.uint8)
    parts = (packed, torch.rand(4 * width // 64), torch.randn(16), 64, (4, width))
    x = torch.randn(rows, width, dtype=torch.bfloat16)
    assert torch.equal(linear_4bit(x, *parts, kernels=NATIVE), linear_4bit(x, *parts, kernels=TORCH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_where_the_processor_has_no_product_of_the_dtype(dtype, bias, monkeypatch):
    """They are multiplied in fp32, which is nearer to the numbers, and as fast as that is."""
    from loadstone.kernels import four_bit

    parts = weight_of(300, 1024, seed=3)  # more than is decoded at a time
    x = torch.randn(130, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    extra = torch.randn(300).to(dtype) if bias else None
    seen = []
    monkeypatch.setattr(four_bit, "_multiplies", lambda device, given: seen.append((device.type, given)))
    found = linear_4bit(x, *parts, extra)
    assert seen == [("cpu", dtype)]
    exact = x.double() @ decode(*parts, dtype).double().T + (0 if extra is None else extra.double())
    size = x.double().abs() @ decode(*parts, dtype).double().abs().T + 4
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * size).all()
    if native.why_not() is None:
        assert torch.equal(found, linear_4bit(x, *parts, extra, kernels=TORCH))


@compiled
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_and_device_do_not_matter(default):
    """The compiled code writes where these buffers are, in fp32."""
    parts, x = weight_of(40, 256), torch.randn(3, 256)
    scales = (torch.arange(256, dtype=torch.uint8), torch.rand(1), torch.randn(256), 0.5, 256)

    def all_of_them():
        expanded = dequantize_absmax(*scales, kernels=NATIVE)
        return expanded, linear_4bit(x, *parts, kernels=NATIVE), decode(*parts, torch.float32, kernels=NATIVE)

    expected, before = all_of_them(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):
            found = all_of_them()
    finally:
        torch.set_default_dtype(before)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other)


@compiled
def test_is_what_runs_and_what_is_reported():
    parts = weight_of(5, 128)
    x = torch.randn(2, 128)
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        linear_4bit(x, *parts)
    assert calls == ["loadstone.linear_4bit_native.default"]
    assert Kernels().chosen("linear_4bit", "cpu") == "native"
    assert Kernels("torch").chosen("linear_4bit", "cpu") == "torch"
    assert Kernels().chosen("rms_norm", "cpu") == Kernels("native").chosen("rms_norm", "cpu") == "torch"
    assert "native" in kernel_names("linear_4bit")


@compiled
def test_gradients_and_compilers():
    *parts, shape = weight_of(6, 128)
    x = torch.randn(2, 3, 128, dtype=torch.float32, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    torch.library.opcheck(torch.ops.loadstone.linear_4bit_native.default, (x, *parts, list(shape), bias))
    grad = torch.randn(2, 3, 6)
    of_native = torch.autograd.grad(linear_4bit(x, *parts, shape, bias), (x, bias), grad)
    of_torch = torch.autograd.grad(linear_4bit(x, *parts, shape, bias, kernels=TORCH), (x, bias), grad)
    for mine, other in zip(of_native, of_torch, strict=True):
        assert torch.equal(mine, other)
    whole = torch.compile(lambda x: linear_4bit(x, *parts, shape, bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(x), linear_4bit(x, *parts, shape, bias))


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc"))), reason="no C compiler, without which there is none")
def test_is_built_where_a_compiler_is():
    assert (Path(native.__file__).parent / native._LIBRARY).is_file(), "install loadstone again: pip install -e ."


def test_where_it_was_not_compiled(monkeypatch, caplog):
    """A warning once, where it would have run, and an error for those who asked for it by name."""
    parts = weight_of(5, 128)
    monkeypatch.setattr(native, "_find", lambda: (None, "no compiler was there"))
    native._warn.cache_clear()
    with pytest.raises(KernelError, match="linear_4bit: no compiler was there"):
        linear_4bit(torch.randn(1, 128), *parts, kernels=NATIVE)
    with pytest.raises(KernelError, match="no compiler was there"):
        NATIVE.require()
    assert Kernels().chosen("linear_4bit", "cpu") == "torch"
    with caplog.at_level("WARNING", "loadstone.kernels"):
        linear_4bit(torch.randn(3, 128, dtype=torch.float64), *parts)
        assert not caplog.records
        for _ in range(2):
            linear_4bit(torch.randn(1, 128), *parts)
    assert [record.getMessage() for record in caplog.records] == [
        "4-bit weights are decoded by torch on this CPU, for every token anew, which is slow: no compiler was there"
    ]
    native._warn.cache_clear()


def test_runs_on_the_cpu_only():
    with pytest.raises(KernelError, match="the tensors are on meta"):
        NATIVE.require(torch.device("meta"))
    assert Kernels().chosen("linear_4bit", "meta") == "torch"
