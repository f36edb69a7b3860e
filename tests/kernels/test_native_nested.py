"""Scales that are quantized themselves, decoded within the compiled product: the same bits as decoding them first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_code import NATIVE, at, at_each_level, compiled

from loadstone.errors import KernelError
from loadstone.kernels import Kernels, native, register_kernel
from loadstone.kernels.four_bit import linear_4bit
from loadstone.kernels.scales import NestedScales, dequantize_absmax


def parts_of(outputs: int, blocks: int, blocksize: int, nested_blocksize: int = 256, seed: int = 0) -> tuple:
    """Any codes and scales: the arguments of `linear_4bit` after x, and what decodes the scales."""
    generator = torch.Generator().manual_seed(seed)
    width, count = blocks * blocksize, outputs * blocks
    packed = torch.randint(0, 256, (outputs * width // 2,), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    absmax = torch.randn(-(-count // nested_blocksize), generator=generator)
    nested = NestedScales(absmax, torch.randn(256, generator=generator), 0.1 + seed % 99 / 7, nested_blocksize)
    return (packed, scales, torch.randn(16, generator=generator), blocksize, (outputs, width)), nested


@compiled
@at_each_level
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 18) | st.sampled_from((128, 129)),
    outputs=st.integers(1, 40),
    blocks=st.integers(1, 9) | st.just(88),
    blocksize=st.sampled_from((32, 64, 128)),
    nested_blocksize=st.sampled_from((1, 7, 64, 256)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    bias=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_same_bits_as_scales_that_were_decoded_before(
    level, rows, outputs, blocks, blocksize, nested_blocksize, dtype, bias, seed
):
    (packed, scales, *rest), nested = parts_of(outputs, blocks, blocksize, nested_blocksize, seed)
    x = torch.randn(rows, blocks * blocksize).to(dtype)
    extra = torch.randn(outputs) if bias else None
    with at(level):
        found = linear_4bit(x, packed, scales, *rest, extra, nested=nested, kernels=NATIVE)
        expanded = dequantize_absmax(scales, *nested, kernels=NATIVE)
        assert torch.equal(expanded, dequantize_absmax(scales, *nested, kernels=Kernels("torch")))
        assert torch.equal(found, linear_4bit(x, packed, expanded, *rest, extra, kernels=NATIVE))


@compiled
@pytest.mark.parametrize("rows", [2, 200])
def test_gradients_and_compilers(rows):
    parts, nested = parts_of(6, 2, 64)
    x = torch.randn(rows, 128, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    *others, shape = parts
    given_ = (x, *others, list(shape), bias, *nested)
    torch.library.opcheck(torch.ops.loadstone.linear_4bit_native.default, given_)
    grad = torch.randn(rows, 6)

    def gradients(kernels):
        return torch.autograd.grad(linear_4bit(x, *parts, bias, nested=nested, kernels=kernels), (x, bias), grad)

    for mine, other in zip(gradients(NATIVE), gradients(Kernels("torch")), strict=True):
        assert torch.equal(mine, other)
    whole = torch.compile(lambda x: linear_4bit(x, *parts, bias, nested=nested), fullgraph=True, backend="aot_eager")
    found = whole(x)
    assert torch.equal(found, linear_4bit(x, *parts, bias, nested=nested))
    assert torch.equal(torch.autograd.grad(found, x, grad)[0], gradients(NATIVE)[0])


@pytest.fixture
def calls(monkeypatch):
    """Names of the operations that a call of `linear_4bit` came to."""
    found = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found.append(str(function).removeprefix("loadstone.").removesuffix(".default"))
            return function(*args, **(kwargs or {}))

    def run(kernels, dtype=torch.float32):
        found.clear()
        parts, nested = parts_of(6, 2, 64)
        with Watch():
            linear_4bit(torch.randn(1, 128, dtype=dtype), *parts, nested=nested, kernels=kernels)
        return [name for name in found if "4bit" in name or "absmax" in name or name == "mine"]

    return run


@compiled
def test_what_runs_is_what_was_chosen(calls):
    """One call decodes both where both were left to compiled code; else each operation is the one asked for."""
    register_kernel("linear_4bit", "test_mine", torch.ops.loadstone.linear_4bit.default, exist_ok=True)
    assert calls(Kernels()) == calls(NATIVE) == ["linear_4bit_native"]
    assert calls(Kernels("torch")) == ["dequantize_absmax", "linear_4bit"]
    assert calls(Kernels.of({"linear_4bit": "torch"})) == ["dequantize_absmax_native", "linear_4bit"]
    assert calls(Kernels.of({"linear_4bit": "test_mine"})) == ["dequantize_absmax_native", "linear_4bit"]
    assert calls(Kernels.of({"dequantize_absmax": "torch"})) == ["dequantize_absmax", "linear_4bit_native"]
    assert calls(Kernels(), torch.float64) == ["dequantize_absmax_native", "linear_4bit"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"absmax": torch.zeros(3)}, r"absmax of 12 quantized scales in blocks of 256 is \(1,\)"),
        ({"code": torch.zeros(16)}, "code of 12"),
        ({"blocksize": 0}, "blocks of 0"),
    ],
)
def test_refuses_what_does_not_fit(change, told):
    parts, nested = parts_of(6, 2, 64)
    for kernels in (Kernels(), Kernels("torch")):
        with pytest.raises(KernelError, match=told):
            linear_4bit(torch.randn(1, 128), *parts, nested=nested._replace(**change), kernels=kernels)
    with pytest.raises(KernelError, match=r"absmax .* \(12,\) torch.uint8"):
        linear_4bit(torch.randn(1, 128), parts[0], torch.ones(12), *parts[2:], nested=nested)


@compiled
def test_without_memory(monkeypatch):
    parts, nested = parts_of(6, 2, 64)
    monkeypatch.setattr(native, "_library", lambda: type("Library", (), {"loadstone_linear_4bit": lambda *_: 1}))
    with pytest.raises(MemoryError, match="4-bit product of 1 rows, 128 wide"):
        native.linear_4bit(torch.randn(1, 128), *parts[:4], 6, *nested)
