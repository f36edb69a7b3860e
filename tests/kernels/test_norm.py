"""Norms in Triton's interpreter: against float64, over shapes, dtypes, layouts, with and without bias and residual."""

from __future__ import annotations

from typing import Any

import elementwise
import pytest
import tiny
import torch
from elementwise import LAYOUTS, TORCH, TRITON, check, laid_out, run, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import KernelError
from loadstone.kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm, support

pytestmark = pytest.mark.skipif(not support.interpreting(), reason="for Triton's interpreter; tests/gpu has the GPU's")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FORMULAS: dict[Any, Any] = {
    rms_norm: elementwise.rms_norm, add_rms_norm: elementwise.add_rms,
    layer_norm: elementwise.layer_norm, add_layer_norm: elementwise.add_layer,
}  # fmt: skip


def arguments(
    call: Any, lead: tuple[int, ...], hidden_size: int, dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None, layout: str = "contiguous", bias: bool = True, frozen: bool = False,
) -> list[Any]:  # fmt: skip
    """What an operation takes; ``frozen``: weight and bias want no gradient."""
    generator = torch.Generator().manual_seed(hidden_size)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    added = call in (add_rms_norm, add_layer_norm)
    states = [laid_out((random(*lead, hidden_size) + 0.5).to(dtype), layout) for _ in range(1 + added)]
    weight, offset = (random(hidden_size).to(weight_dtype or dtype).requires_grad_(not frozen) for _ in range(2))
    tail: list[Any] = [weight]
    if call in (layer_norm, add_layer_norm):
        tail.append(offset if bias else None)
    return [*(state.requires_grad_() for state in states), *tail, 1e-5]


@pytest.mark.parametrize("call", FORMULAS)
@tiny.examples(8)
@given(
    lead=st.lists(st.integers(1, 9), max_size=3).map(tuple), hidden_size=st.integers(3, 150),
    dtype=st.sampled_from(FLOATS), layout=st.sampled_from(LAYOUTS), bias=st.booleans(), frozen=st.booleans(),
)  # fmt: skip
def test_near_the_formula(
    call: Any, lead: tuple[int, ...], hidden_size: int, dtype: torch.dtype, layout: str, bias: bool, frozen: bool
) -> None:
    check(call, FORMULAS[call], *arguments(call, lead, hidden_size, dtype, None, layout, bias, frozen))


@pytest.mark.parametrize("call", FORMULAS)
def test_several_blocks_of_rows_for_each_program(call: Any) -> None:
    check(call, FORMULAS[call], *arguments(call, (90,), 48))
    check(call, FORMULAS[call], *arguments(call, (90,), 80))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("call", [rms_norm, add_rms_norm])
def test_mixed_dtypes(call: Any, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for hidden_size in (40, 72):
        check(call, FORMULAS[call], *arguments(call, (3, 5), hidden_size, dtype, weight_dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("call", [layer_norm, add_layer_norm])
def test_layer_norm_with_a_wider_weight(call: Any, dtype: torch.dtype) -> None:
    check(call, FORMULAS[call], *arguments(call, (3, 5), 72, dtype, torch.float32))


def test_sum_of_two_dtypes() -> None:
    x, residual, weight, eps = arguments(add_rms_norm, (3, 5), 40, torch.float16)
    check(add_rms_norm, elementwise.add_rms, x, residual.detach().float().requires_grad_(), weight, eps)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("call", [add_rms_norm, add_layer_norm])
def test_gradient_through_one_result_alone(call: Any, used: int) -> None:
    def one(*values: Any, **options: Any) -> Tensor:
        return call(*values, **options)[used]

    given_ = arguments(call, (3, 5), 40, frozen=used == 1)
    check(one, lambda *values: FORMULAS[call](*values)[used], *given_)


def test_rounds_where_torch_rounds() -> None:
    for call in (rms_norm, layer_norm):
        values = [v.detach() if isinstance(v, Tensor) else v for v in arguments(call, (4, 5), 56, torch.float16)]
        ours, torchs = call(*values, kernels=TRITON), call(*values, kernels=TORCH)
        assert (ours != torchs).sum() <= 2  # where fp32 sums in another order fall on the other side of a tie


@pytest.mark.parametrize("hidden_size", [40, 100])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_norm_is_that_of_the_rounded_sum(dtype: torch.dtype, hidden_size: int) -> None:
    x, residual, weight, bias, eps = arguments(add_layer_norm, (7,), hidden_size, dtype)
    out, total = add_rms_norm(x, residual, weight, eps, kernels=TRITON)
    assert torch.equal(out, rms_norm(total, weight, eps, kernels=TRITON))
    out, total = add_layer_norm(x, residual, weight, bias, eps, kernels=TRITON)
    assert torch.equal(out, layer_norm(total, weight, bias, eps, kernels=TRITON))


@pytest.mark.parametrize("call", FORMULAS)
def test_statistics_stay_exact_far_from_zero(call: Any) -> None:
    for hidden_size in (60, 200):
        given_ = arguments(call, (4,), hidden_size)
        with torch.no_grad():
            given_[0] += 100.0
        check(call, FORMULAS[call], *given_)


@pytest.mark.parametrize("call", FORMULAS)
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_no_rows(call: Any, lead: tuple[int, ...]) -> None:
    for hidden_size in (8, 100):
        given_ = arguments(call, lead, hidden_size)
        check(call, FORMULAS[call], *given_)
        *_, of_weight = run(lambda *v: call(*v, kernels=TRITON), given_, None, False)
        assert not of_weight.any()


@pytest.mark.parametrize("call", FORMULAS)
def test_same_bits_every_time(call: Any) -> None:
    same_bits(call, *arguments(call, (40,), 48))
    same_bits(call, *arguments(call, (20,), 100))


@pytest.mark.parametrize("call", FORMULAS)
def test_keeps_its_input_and_numbers_a_row(call: Any) -> None:
    kept: list[Tensor] = []
    given_ = arguments(call, (6, 5), 40)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        call(*given_, kernels=TRITON)
    assert sum(tensor.numel() for tensor in kept) <= 30 * 40 + 40 + 2 * 30


@pytest.mark.parametrize("call", FORMULAS)
def test_compiles_whole(call: Any) -> None:
    given_ = arguments(call, (3, 5), 40)
    compiled = torch.compile(lambda *v: call(*v, kernels=TRITON), fullgraph=True, backend="aot_eager")
    eager = run(lambda *v: call(*v, kernels=TRITON), given_, None, False)
    for mine, its in zip(run(compiled, given_, None, False), eager, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_operations_are_what_torch_expects(center: bool, grad: bool) -> None:
    x, residual, weight, bias, eps = arguments(add_layer_norm, (3, 5), 40)
    values = [value.detach().requires_grad_(grad) for value in (x, residual, weight, bias)]
    x, residual, weight, bias = values
    bias = bias if center else None
    torch.library.opcheck(torch.ops.loadstone.norm.default, (x, weight, bias, eps, center, torch.float32))
    torch.library.opcheck(torch.ops.loadstone.add_norm.default, (x, residual, weight, bias, eps, center, torch.float32))


def test_refuses_what_it_does_not_compute() -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(KernelError, match="not float64"):
        rms_norm(x.double(), weight.double(), 1e-5, kernels=TRITON)
    with pytest.raises(KernelError, match="not float64"):
        layer_norm(x, weight, weight.double(), 1e-5, kernels=TRITON)
    with pytest.raises(KernelError, match=r"weight of \(4,\), not \(1,\)"):
        rms_norm(x, torch.ones(1), 1e-5, kernels=TRITON)
    with pytest.raises(KernelError, match="equal shapes"):
        add_rms_norm(x, torch.ones(1, 4), weight, 1e-5, kernels=TRITON)
