"""Rotary embedding in Triton's interpreter: against float64, over shapes, dtypes, layouts and any tables."""

from __future__ import annotations

import elementwise
import pytest
import tiny
import torch
from elementwise import TRITON, check, run, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import KernelError
from loadstone.kernels import apply_rotary, support

pytestmark = pytest.mark.skipif(not support.interpreting(), reason="for Triton's interpreter; tests/gpu has the GPU's")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("by position", "by head", "sliced", "every other")


def states(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """(batch, heads, seq, head_dim), in one of the layouts queries come in."""
    batch, heads, length, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    if layout == "by head":
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    if layout == "every other":
        return torch.randn((*shape[:3], 2 * head_dim), generator=generator).to(dtype)[..., ::2].requires_grad_()
    more = 2 if layout == "sliced" else 0  # a part of a wider projection
    wide = torch.randn((batch, length, heads + more, head_dim), generator=generator).to(dtype)
    return wide[:, :, more:].transpose(1, 2).requires_grad_()


def arguments(
    batch: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.float32,
    layout: str = "by position", tables: int | None = None, table_dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """Queries, keys and random tables, the halves of which differ; ``tables`` rows of them, 1 or the batch."""
    generator = torch.Generator().manual_seed(head_dim)
    shape = (tables or 1, 1, length, head_dim)
    cos, sin = (torch.randn(shape, generator=generator).to(table_dtype or dtype) for _ in range(2))
    query = states((batch, heads, length, head_dim), dtype, layout, 1)
    return [query, states((batch, kv_heads, length, head_dim), dtype, layout, 2), cos, sin]


@tiny.examples(20)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 5), kv_heads=st.integers(1, 5), length=st.integers(1, 6),
    half=st.integers(1, 24), dtype=st.sampled_from(FLOATS), layout=st.sampled_from(LAYOUTS), own=st.booleans(),
)  # fmt: skip
def test_near_the_formula(
    batch: int, heads: int, kv_heads: int, length: int, half: int, dtype: torch.dtype, layout: str, own: bool
) -> None:
    given_ = arguments(batch, heads, kv_heads, length, 2 * half, dtype, layout, batch if own else 1)
    check(apply_rotary, elementwise.rotary, *given_)


@pytest.mark.parametrize("table_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_mixed_dtypes(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    check(apply_rotary, elementwise.rotary, *arguments(2, 3, 1, 4, 12, dtype, table_dtype=table_dtype))


def test_tables_that_are_views() -> None:
    query, key, cos, sin = arguments(3, 2, 2, 4, 8)
    wide = torch.cat((cos, sin), -1)
    check(apply_rotary, elementwise.rotary, query, key, wide[..., :8].expand(3, -1, -1, -1), wide[..., 8:])


@pytest.mark.parametrize("empty", [(0, 2, 1, 3, 8), (2, 2, 1, 0, 8), (2, 2, 1, 3, 0), (1, 0, 0, 3, 8), (1, 2, 0, 3, 8)])
def test_nothing_to_rotate(empty: tuple[int, int, int, int, int]) -> None:
    check(apply_rotary, elementwise.rotary, *arguments(*empty))


def test_results_lie_by_position() -> None:
    """(batch, seq, heads, head_dim) in memory, which attention and the output projection take without a copy."""
    given_ = arguments(2, 3, 2, 4, 8, layout="by head")
    for tensor in run(lambda *values: apply_rotary(*values, kernels=TRITON), given_, None, False):
        assert tensor.transpose(1, 2).is_contiguous()


def test_same_bits_every_time() -> None:
    same_bits(apply_rotary, *arguments(2, 4, 2, 9, 16))


def test_compiles_whole() -> None:
    given_ = arguments(2, 3, 2, 4, 8)
    compiled = torch.compile(lambda *v: apply_rotary(*v, kernels=TRITON), fullgraph=True, backend="aot_eager")
    eager = run(lambda *v: apply_rotary(*v, kernels=TRITON), given_, None, False)
    for mine, its in zip(run(compiled, given_, None, False), eager, strict=True):
        assert torch.equal(mine, its)
        assert mine.stride() == its.stride()


@pytest.mark.parametrize("grad", [True, False])
def test_operation_is_what_torch_expects(grad: bool) -> None:
    query, key, cos, sin = arguments(2, 3, 2, 4, 8, torch.float16, table_dtype=torch.float32)
    query, key = query.detach().requires_grad_(grad), key.detach().requires_grad_(grad)
    torch.library.opcheck(torch.ops.loadstone.apply_rotary.default, (query, key, cos, sin))


def test_refuses_what_it_does_not_compute() -> None:
    query, key, cos, sin = arguments(2, 2, 1, 3, 8)
    with pytest.raises(KernelError, match="no gradient with respect to sin"):
        apply_rotary(query, key, cos, sin.requires_grad_(), kernels=TRITON)
    with torch.no_grad():
        apply_rotary(query, key, cos, sin, kernels=TRITON)
    with pytest.raises(KernelError, match="even head_dim, not 7"):
        apply_rotary(*(tensor.detach()[..., :7] for tensor in (query, key, cos, sin)), kernels=TRITON)
    with pytest.raises(KernelError, match=r"cos of \(1 or 2, 1, 3, 8\)"):
        apply_rotary(query, key, cos[:, :, :1], sin.detach(), kernels=TRITON)
    with pytest.raises(KernelError, match="not float64"):
        apply_rotary(query, key, cos.double(), sin.detach(), kernels=TRITON)
    with pytest.raises(KernelError, match=r"\(batch, heads, seq, head_dim\)"):
        apply_rotary(query, key[:1], cos, sin.detach(), kernels=TRITON)
