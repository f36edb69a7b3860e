"""The gate of a GLU in Triton's interpreter: against float64, over shapes, dtypes, layouts and activations."""

from __future__ import annotations

from functools import partial

import elementwise
import pytest
import tiny
import torch
from elementwise import LAYOUTS, TORCH, TRITON, check, laid_out, run, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import KernelError
from loadstone.kernels import Kernels, activation_names, gated, support
from loadstone.kernels.fused.gate import supports_gated

pytestmark = [
    pytest.mark.skipif(not support.interpreting(), reason="for Triton's interpreter; tests/gpu has the GPU's"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # to infinity, as a GPU does
]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FUSED = ("silu", "swish", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh")


def call(name: str, gate: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
    return gated(name, gate, up, kernels=kernels)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layouts: tuple[str, str] = ("contiguous", "contiguous"),
    spread: float = 3.0,
) -> list[Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(len(shape))
    return [
        laid_out((torch.randn(shape, generator=generator) * spread).to(dtype), layout).requires_grad_()
        for layout in layouts
    ]


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
@tiny.examples(12)
@given(
    shape=st.lists(st.integers(1, 7), max_size=3).map(tuple), width=st.integers(8, 300),
    dtype=st.sampled_from(FLOATS), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    spread=st.sampled_from([0.01, 1.0, 6.0, 40.0]),
)  # fmt: skip
def test_near_the_formula(
    name: str, shape: tuple[int, ...], width: int, dtype: torch.dtype, layouts: tuple[str, str], spread: float
) -> None:
    shape = (*shape, width)
    check(partial(call, name), partial(elementwise.gate, name), *arguments(shape, dtype, layouts, spread))


@pytest.mark.parametrize("name", FUSED)
def test_every_fused_name(name: str) -> None:
    check(partial(call, name), partial(elementwise.gate, name), *arguments((3, 40)))


def test_other_names_are_refused_by_triton_and_run_by_auto() -> None:
    gate, up = arguments((3, 8))
    for name in sorted({*activation_names()} - {*FUSED}):
        assert supports_gated(gate, up, name) is not None
        with pytest.raises(KernelError, match=f"not '{name}'"):
            gated(name, gate, up, kernels=TRITON)
        assert torch.equal(gated(name, gate, up), gated(name, gate, up, kernels=TORCH))


@pytest.mark.parametrize("name", ["silu", "gelu_new"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_limits(name: str, dtype: torch.dtype) -> None:
    """Where exponentials and cubes overflow, and at zero, value and slope are still those of the limit."""
    far = 1e4 if dtype == torch.float16 else 1e30
    gate = torch.tensor([-far, -100.0, -0.0, 0.0, 100.0, far], dtype=dtype, requires_grad=True)
    up = torch.ones_like(gate, requires_grad=True)
    out, of_gate, of_up = run(partial(call, name, kernels=TRITON), [gate, up], [torch.ones_like(gate)], False)
    expected = gate.detach().clamp(min=0)
    slope = torch.tensor([0, 0, 0.5, 0.5, 1, 1], dtype=dtype)
    for mine, right in ((out, expected), (of_up, expected), (of_gate, slope)):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-30 if dtype != torch.float16 else 1e-7)


def test_nan_stays_nan() -> None:
    gate = torch.tensor([float("nan"), 1.0])
    for name in ("silu", "gelu_new"):
        assert gated(name, gate, torch.ones(2), kernels=TRITON).isnan().tolist() == [True, False]


def test_rounds_where_torch_rounds() -> None:
    gate, up = (tensor.detach() for tensor in arguments((40, 30), torch.float16))
    differ = gated("silu", gate, up, kernels=TRITON) != gated("silu", gate, up, kernels=TORCH)
    assert differ.sum() <= 6  # of 1200, where two ways to an exponential fall on two sides of a tie


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 5)])
def test_nothing_to_gate(shape: tuple[int, ...]) -> None:
    check(partial(call, "silu"), partial(elementwise.gate, "silu"), *arguments(shape))


def test_numbers_without_axes() -> None:
    check(partial(call, "silu"), partial(elementwise.gate, "silu"), *arguments(()))


def test_keeps_the_two_inputs_alone() -> None:
    kept: list[Tensor] = []
    gate, up = arguments((6, 40))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gated("silu", gate, up, kernels=TRITON)
    assert sorted(tensor.data_ptr() for tensor in kept) == sorted([gate.data_ptr(), up.data_ptr()])


def test_same_bits_every_time() -> None:
    same_bits(partial(call, "gelu_new"), *arguments((9, 50)))


def test_compiles_whole() -> None:
    given_ = arguments((3, 40))
    for name in ("silu", "gelu_new"):
        whole = partial(call, name, kernels=TRITON)
        compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
        for mine, its in zip(run(compiled, given_, None, False), run(whole, given_, None, False), strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("grad", [True, False])
def test_operation_is_what_torch_expects(grad: bool) -> None:
    gate, up = (tensor.detach().requires_grad_(grad) for tensor in arguments((3, 8), torch.float16))
    torch.library.opcheck(torch.ops.loadstone.gated.default, (gate, up, True))


def test_refuses_what_it_does_not_compute() -> None:
    gate, up = torch.ones(2, 4), torch.ones(2, 4)
    with pytest.raises(KernelError, match="not float64"):
        gated("silu", gate.double(), up.double(), kernels=TRITON)
    with pytest.raises(KernelError, match="one shape and dtype"):
        gated("silu", gate, up.half(), kernels=TRITON)
    with pytest.raises(KernelError, match="one shape and dtype"):
        gated("silu", gate, up[:1], kernels=TRITON)
