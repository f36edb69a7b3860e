"""Norms, rotary and gates on a GPU, as Triton compiled them: against float64, and past what 32 bits can count."""

from __future__ import annotations

from functools import partial
from typing import Any

import elementwise
import pytest
import torch
from elementwise import LAYOUTS, TORCH, TRITON, check, laid_out, same_bits
from torch import Tensor

from loadstone.kernels import (
    AUTO,
    Kernels,
    add_layer_norm,
    add_rms_norm,
    apply_rotary,
    gated,
    layer_norm,
    rms_norm,
    support,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(support.interpreting(), reason="TRITON_INTERPRET is set"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMULAS: dict[Any, Any] = {
    rms_norm: elementwise.rms_norm, add_rms_norm: elementwise.add_rms,
    layer_norm: elementwise.layer_norm, add_layer_norm: elementwise.add_layer,
}  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", DTYPES)
norms = pytest.mark.parametrize("call", FORMULAS)


def random(*shape: int, dtype: torch.dtype, seed: int = 0, layout: str = "contiguous") -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return laid_out(torch.randn(shape, generator=generator, device="cuda").to(dtype), layout).requires_grad_()


def norm_arguments(call: Any, rows: tuple[int, ...], hidden_size: int, dtype: torch.dtype, layout: str) -> list[Any]:
    states = [random(*rows, hidden_size, dtype=dtype, seed=seed, layout=layout) for seed in range(2)]
    vectors = [random(hidden_size, dtype=dtype, seed=seed) for seed in range(2, 4)]
    states = states if call in (add_rms_norm, add_layer_norm) else states[:1]
    return [*states, *(vectors if call in (layer_norm, add_layer_norm) else vectors[:1]), 1e-5]


@norms
@dtypes
@pytest.mark.parametrize("hidden_size", [64, 576, 2048, 4096, 5120, 8192, 12288, 16384, 20480, 33333])
def test_norms(call: Any, dtype: torch.dtype, hidden_size: int) -> None:
    check(call, FORMULAS[call], *norm_arguments(call, (3, 217), hidden_size, dtype, "contiguous"))


@norms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden_size", [500, 20000])
def test_norms_of_any_layout(call: Any, layout: str, hidden_size: int) -> None:
    check(call, FORMULAS[call], *norm_arguments(call, (4, 33), hidden_size, torch.bfloat16, layout))


@norms
@pytest.mark.parametrize("hidden_size", [4096, 20480])
def test_norms_give_the_same_bits(call: Any, hidden_size: int) -> None:
    same_bits(call, *norm_arguments(call, (4, 2048), hidden_size, torch.bfloat16, "contiguous"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_under_autocast(dtype: torch.dtype) -> None:
    for call in FORMULAS:
        given_ = norm_arguments(call, (2, 64), 1024, dtype, "contiguous")
        with torch.autocast("cuda", dtype):
            ours, torchs = (call(*given_, kernels=kernels) for kernels in (TRITON, TORCH))
        pairs = zip(ours, torchs, strict=True) if isinstance(ours, tuple) else [(ours, torchs)]
        for mine, its in pairs:
            torch.testing.assert_close(mine, its)  # which looks at the dtype too


def rotary_arguments(
    batch: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    query = random(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)
    key = random(batch, length, kv_heads, head_dim, dtype=dtype, seed=1).transpose(1, 2)
    cos, sin = (random(1, 1, length, head_dim, dtype=dtype, seed=seed).detach() for seed in (2, 3))
    return [query.detach().requires_grad_(), key.detach().requires_grad_(), cos, sin]


@dtypes
@pytest.mark.parametrize("sizes", [(2, 32, 8, 1000, 128), (1, 9, 3, 77, 64), (64, 32, 8, 1, 128), (2, 8, 8, 300, 80)])
def test_rotary(dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> None:
    check(apply_rotary, elementwise.rotary, *rotary_arguments(*sizes, dtype))


def call_gate(name: str, gate: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
    return gated(name, gate, up, kernels=kernels)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_gate(name: str, dtype: torch.dtype, layout: str) -> None:
    gate, up = (random(4, 333, 14336, dtype=dtype, seed=seed, layout=layout) for seed in range(2))
    check(partial(call_gate, name), partial(elementwise.gate, name), gate, up)


def test_rotary_and_gate_give_the_same_bits() -> None:
    same_bits(apply_rotary, *rotary_arguments(2, 32, 8, 1000, 128, torch.bfloat16))
    same_bits(partial(call_gate, "silu"), *(random(4, 333, 8192, dtype=torch.bfloat16, seed=s) for s in range(2)))


def test_auto_takes_triton_here() -> None:
    for operation in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "apply_rotary", "gated"):
        assert AUTO.chosen(operation, torch.device("cuda")) == "triton"


@pytest.mark.slow
def test_more_numbers_than_32_bits_count() -> None:
    """The last rows of tensors of more than 2^31 numbers, forward and backward."""
    rows, width, tail = (1 << 19) + 64, 4096, 32
    if torch.cuda.mem_get_info()[0] < 7 * rows * width * 2:
        pytest.skip("needs 30 GB of free GPU memory")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    weight = random(width, dtype=torch.bfloat16).detach()
    x[-tail:] = random(tail, width, dtype=torch.bfloat16, seed=1).detach()
    last = x[-tail:].clone().requires_grad_()
    x.requires_grad_()
    for call in (lambda y: rms_norm(y, weight, 1e-5, kernels=TRITON), lambda y: call_gate("silu", y, y, TRITON)):
        whole, part = call(x), call(last)
        assert torch.equal(whole[-tail:], part)
        (of_whole,) = torch.autograd.grad(
            whole, x, torch.ones((), dtype=torch.bfloat16, device="cuda").expand_as(whole)
        )
        (of_part,) = torch.autograd.grad(part, last, torch.ones_like(part))
        assert torch.equal(of_whole[-tail:], of_part)
        del whole, of_whole
