"""Losses by torch and in Triton's interpreter, of logits and fused with the head: against float64; what they hold."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loadstone.errors import KernelError
from loadstone.kernels import Kernels, causal_lm_loss, linear_cross_entropy, support

module: Any = importlib.import_module("loadstone.kernels.linear_cross_entropy")

interpreted = pytest.mark.skipif(not support.interpreting(), reason="for Triton's interpreter; tests/gpu has the GPU's")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def chunks_of(tokens: int) -> Iterator[None]:
    with mock.patch.dict(module._CHUNK_TOKENS, cpu=tokens):
        yield


@dataclass
class Problem:
    states: Tensor
    weight: Tensor
    labels: Tensor
    options: dict[str, Any]

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in (self.states, self.weight))  # type: ignore[return-value]

    def plain(self, dtype: torch.dtype, softmax: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradients by torch's own functions: products in ``dtype``, the softmax in another."""
        options = dict(self.options)
        count, cap = options.pop("num_items_in_batch", None), options.pop("softcap", None)
        states, weight = self.leaves(dtype)
        logits = F.linear(states, weight).to(softmax)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        targets = F.pad(self.labels, (0, 1), value=options.get("ignore_index", -100))[..., 1:].reshape(-1)
        reduction = "mean" if count is None else "sum"
        loss = F.cross_entropy(logits.flatten(0, -2), targets, reduction=reduction, **options)
        if count is not None:
            loss = loss / count
        return (loss.detach(), *torch.autograd.grad(loss, (states, weight)))

    def fused(self, backend: str, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
        states, weight = self.leaves()
        loss = linear_cross_entropy(
            states, weight, self.labels, kernels=Kernels(backend), **{**self.options, **changes}
        )
        return (loss.detach(), *torch.autograd.grad(loss, (states, weight)))

    def unfused(self, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        states, weight = self.leaves()
        loss = causal_lm_loss(F.linear(states, weight), self.labels, kernels=Kernels(backend), **self.options)
        return (loss.detach(), *torch.autograd.grad(loss, (states, weight)))


def problem(
    shape: tuple[int, ...] = (2, 19), hidden: int = 24, vocabulary: int = 133, dtype: torch.dtype = torch.float32,
    seed: int = 0, ignored: float = 0.3, **options: Any,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(*shape, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 2 / math.sqrt(hidden)).to(dtype)
    labels = torch.randint(vocabulary, shape, generator=generator)
    missing = torch.rand(shape, generator=generator) < ignored
    return Problem(states, weight, labels.masked_fill(missing, options.get("ignore_index", -100)), options)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    shape = draw(st.one_of(st.tuples(st.integers(1, 3), st.integers(2, 23)), st.tuples(st.integers(2, 60))))
    vocabulary = draw(st.integers(2, 150))
    options: dict[str, Any] = {
        "label_smoothing": draw(st.sampled_from((0.0, 0.0, 0.1, 1.0))),
        "softcap": draw(st.sampled_from((None, None, 1.5, 30.0))),
        "num_items_in_batch": draw(st.sampled_from((None, 7, torch.tensor(11)))),
        "ignore_index": draw(st.sampled_from((-100, -1, 0, 1))),
    }
    made = problem(
        shape, draw(st.integers(1, 40)), vocabulary, draw(st.sampled_from(FLOATS)), draw(st.integers(0, 99)),
        draw(st.sampled_from((0.0, 0.3, 0.8))), **options,
    )  # fmt: skip
    counted = (made.labels[..., 1:] != options["ignore_index"]).any()
    if not counted:  # a mean over nothing has a test of its own
        made.options["num_items_in_batch"] = made.options["num_items_in_batch"] or 5
    return made


def check(got: tuple[Tensor, ...], made: Problem, backend: str) -> None:
    """The field's rule: at most twice (loss) and three times (gradients) the error of plain torch in that precision."""
    dtype = made.states.dtype
    exact, plain = made.plain(torch.float64, torch.float64), made.plain(dtype, torch.float32)
    # Some units in the last place, for where torch's error is small by chance: in fp32, where the softmax is no wider
    # than the products, and in bf16 in the interpreter, which cuts off what a GPU rounds.
    few = dtype == torch.float32 or (backend == "triton" and dtype == torch.bfloat16)
    grain = torch.finfo(dtype).eps * (4 if few else 1)
    assert got[0].dtype == torch.float32
    for value, want, other, factor in zip(got, exact, plain, (2, 3, 3), strict=True):
        error, allowed = (float((x.double() - want).abs().max()) for x in (value, other))
        size = float(want.abs().max()) + (factor == 2)
        assert error <= factor * allowed + grain * size, (error, allowed, size)
    assert got[1].dtype == got[2].dtype == dtype


@backends
@tiny.examples(15)
@given(made=problems(), chunk=st.sampled_from((1, 5, 16, 256)))
def test_fused_near_the_formula(backend: str, made: Problem, chunk: int) -> None:
    with chunks_of(chunk):
        check(made.fused(backend), made, backend)


@backends
@tiny.examples(8)
@given(made=problems())
def test_unfused_near_the_formula(backend: str, made: Problem) -> None:
    check(made.unfused(backend), made, backend)


@backends
def test_ways_to_give_labels(backend: str) -> None:
    made = problem()
    shifted = F.pad(made.labels, (0, 1), value=-100)[:, 1:]
    expected = made.fused(backend)
    for got in (made.fused(backend, shift_labels=shifted), made.fused(backend, shift_labels=shifted.int())):
        assert all(map(torch.equal, got, expected))
    flat = Problem(made.states.flatten(0, 1), made.weight, shifted.flatten(), {"shift_labels": shifted.flatten()})
    assert torch.equal(flat.fused(backend)[0], expected[0])


@backends
def test_chunks_do_not_show(backend: str) -> None:
    made = problem((3, 24), ignored=0.1, label_smoothing=0.1)
    whole = made.fused(backend)
    for size in (1, 7, 64):
        with chunks_of(size):
            for got, want in zip(made.fused(backend), whole, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 255, 256, 257, 1000, 5000])
@pytest.mark.parametrize("vocabulary", [2, 50257, 262144, 1 << 28])
def test_chunk_size(tokens: int, vocabulary: int) -> None:
    """Within both bounds, and no more chunks than the bounds ask for."""
    for device in ("cpu", "meta"):
        kind = "cpu" if device == "cpu" else "gpu"
        states = torch.empty(0, dtype=torch.bfloat16, device=device)
        size = module.chunk_size(tokens, vocabulary, states)
        most = max(1, min(module._CHUNK_TOKENS[kind], module._CHUNK_BYTES[kind] // (2 * vocabulary)))
        assert 1 <= size <= most
        assert -(-tokens // size) == -(-tokens // most)


@backends
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_frozen_tensors(backend: str, dtype: torch.dtype) -> None:
    made = problem(dtype=dtype)
    loss, *gradients = made.fused(backend)
    for place in (0, 1):
        leaves = list(made.leaves())
        leaves[1 - place].requires_grad_(False)
        got = linear_cross_entropy(*leaves, made.labels, kernels=Kernels(backend))
        got.backward()
        assert torch.equal(got, loss)
        assert torch.equal(leaves[place].grad, gradients[place])
        assert leaves[1 - place].grad is None


@backends
def test_tied_weight(backend: str) -> None:
    """The gradient of an embedding that is the head too is the sum of both."""
    made = problem(vocabulary=61)
    ids = made.labels.clamp(min=0)
    grads = []
    for fused in (True, False):
        weight = made.weight.detach().requires_grad_()
        states = torch.tanh(F.embedding(ids, weight))
        if fused:
            linear_cross_entropy(states, weight, made.labels, kernels=Kernels(backend)).backward()
        else:
            logits = F.linear(states, weight)[:, :-1].flatten(0, 1)
            F.cross_entropy(logits, made.labels[:, 1:].flatten()).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


@backends
def test_strided_tensors(backend: str) -> None:
    made = problem((4, 9), 16, 70)
    states = made.states.transpose(0, 1).contiguous().transpose(0, 1)
    weight = made.weight.t().contiguous().t()
    wide = F.pad(states, (3, 5))[..., 3:-5]
    expected = made.fused(backend)
    for strided in (states, wide):
        for got, want in zip(Problem(strided, weight, made.labels, {}).fused(backend), expected, strict=True):
            torch.testing.assert_close(got, want)
    logits = F.linear(made.states, made.weight)
    columns = logits.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    loss = causal_lm_loss(columns, made.labels, kernels=Kernels(backend))
    torch.testing.assert_close(loss.detach(), expected[0])
    before = columns.detach().clone()
    torch.testing.assert_close(
        torch.autograd.grad(loss, columns)[0].flatten(0, 1).t() @ states.flatten(0, 1), expected[2]
    )
    assert torch.equal(columns.detach(), before)  # the caller's logits are left alone


@backends
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_incoming_gradient_scales_in_fp32(backend: str, dtype: torch.dtype) -> None:
    made = problem(dtype=dtype)
    states, weight = made.leaves()
    loss = linear_cross_entropy(states, weight, made.labels, kernels=Kernels(backend))
    one = torch.autograd.grad(loss, (states, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (states, weight), retain_graph=True)
    assert all(map(torch.equal, one, again))  # nothing was scaled in place while the graph is kept
    third = torch.autograd.grad(loss / 3, (states, weight))
    for got, want in zip(third, one, strict=True):
        torch.testing.assert_close(got, want / 3)
    bias = sum(float((got.double() - want.double() / 3).sum()) for got, want in zip(third, one, strict=True))
    assert abs(bias) <= torch.finfo(dtype).eps * sum(float(want.double().abs().sum()) for want in one) / 8


@backends
def test_half_precision_gradients_do_not_overflow_before_they_are_scaled(backend: str) -> None:
    """The sum over the tokens of what is in range only as a mean."""
    made = problem((1, 400), 8, 3, torch.float16, ignored=0.0, label_smoothing=0.0)
    made.states = made.states * 0 + 1000
    made.weight = made.weight * 0
    made.labels = made.labels * 0
    states, weight = made.leaves()
    loss = linear_cross_entropy(states, weight, made.labels, kernels=Kernels(backend))
    grad = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(grad, torch.tensor([[-2.0], [1.0], [1.0]]).expand(3, 8).half() * 1000 / 3)


@backends
def test_nothing_to_count(backend: str) -> None:
    made = problem(ignored=2.0)
    for loss, *grads in (made.fused(backend), made.unfused(backend)):
        assert torch.isnan(loss)
        assert not any(grad.any() for grad in grads)
    made.options["num_items_in_batch"] = 3
    for results in (made.fused(backend), made.unfused(backend)):
        assert not any(result.any() for result in results)


@backends
def test_ignored_positions_may_hold_anything(backend: str) -> None:
    made = problem((1, 12))
    made.labels[0, 4:7] = -100
    clean = made.fused(backend)
    made.states[0, 3:6] = 1e30
    for got, want in zip(made.fused(backend), clean, strict=True):
        torch.testing.assert_close(got, want)


@backends
@pytest.mark.parametrize("label", [133, -7])
def test_label_outside_the_vocabulary(backend: str, label: int) -> None:
    made = problem()
    made.labels[1, 4] = label
    with pytest.raises(IndexError, match="the vocabulary from 0 to 132"):
        made.fused(backend)
    with pytest.raises((IndexError, RuntimeError), match=r"133|132"):
        made.unfused(backend)


def test_a_row_with_a_wrong_label_is_nan_where_nothing_waits_for_the_device() -> None:
    logits = torch.randn(4, 9)
    losses = torch.empty(4)
    targets = torch.tensor([2, 9, -100, -3])
    wanted = torch.tensor([False, True, False, True])
    for backend in ("torch", *(["triton"] if support.interpreting() else [])):
        rows = logits.clone()
        module._rows_of(backend)(rows, targets, -100, 0.0, 0.0, losses, True)
        assert torch.equal(losses.isnan(), wanted)
        assert torch.equal(rows.isnan().any(1), wanted)


def test_what_is_refused() -> None:
    made = problem()
    call = made.fused
    with pytest.raises(ValueError, match="needs labels"):
        linear_cross_entropy(made.states, made.weight)
    with pytest.raises(ValueError, match="one entry for each position"):
        linear_cross_entropy(made.states[:, -2:], made.weight, made.labels)
    with pytest.raises(ValueError, match=r"shape \(vocab, 24\)"):
        linear_cross_entropy(made.states, made.weight[:, 1:], made.labels)
    with pytest.raises(ValueError, match="one dtype"):
        linear_cross_entropy(made.states.half(), made.weight, made.labels)
    for wrong in ({"label_smoothing": 1.1}, {"label_smoothing": -0.1}, {"softcap": 0.0}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            call("torch", **wrong)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            causal_lm_loss(made.states, made.labels, **wrong)


@interpreted
def test_triton_says_which_dtypes_it_takes() -> None:
    made = problem(dtype=torch.float64)
    with pytest.raises(KernelError, match="fp16, bf16 and fp32"):
        made.fused("triton")
    with pytest.raises(KernelError, match="fp16, bf16 and fp32"):
        made.unfused("triton")
    for got, want in zip(made.fused("torch"), made.plain(torch.float64, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, check_dtype=False)


@backends
def test_differentiated_twice(backend: str) -> None:
    made = problem()
    for call in (linear_cross_entropy, lambda s, w, *a, **k: causal_lm_loss(F.linear(s, w), *a, **k)):
        states, weight = made.leaves()
        loss = call(states, weight, made.labels, kernels=Kernels(backend))
        (grad,) = torch.autograd.grad(loss.square(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    """Products as in a linear layer under autocast; the weight's gradient is not rounded on the way."""
    made = problem()
    rounded = problem(dtype=dtype)
    with torch.autocast("cpu", dtype):
        got = made.fused(backend)
    exact = rounded.plain(torch.float64, torch.float64)
    plain = rounded.plain(dtype, torch.float32)
    for value, want, other, factor in zip(got, exact, plain, (2, 3, 3), strict=True):
        assert value.dtype == torch.float32
        error, allowed = (float((x.double() - want).abs().max()) for x in (value, other))
        assert error <= factor * allowed + torch.finfo(dtype).eps * float(want.abs().max())


# What is held


class Made(TorchDispatchMode):
    """Sizes of the tensors that operations make, those inside of ours too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.loadstone.linear_cross_entropy.default:
            with self:
                return module._forward(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        given, made = (
            {x.untyped_storage().data_ptr(): x.numel() for x in tree_leaves(tree) if isinstance(x, Tensor)}
            for tree in ((args, kwargs), out)
        )
        self.sizes += [size for place, size in made.items() if place not in given]
        return out


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_what_is_made(backend: str, dtype: torch.dtype, wanted: tuple[bool, bool]) -> None:
    """Never more than a chunk's logits; the weight's gradient once, and only if it is wanted."""
    made = problem((4, 24), 16, 300, dtype, ignored=0.0, softcap=9.0, label_smoothing=0.1)
    states, weight = (leaf.requires_grad_(want) for leaf, want in zip(made.leaves(), wanted, strict=True))
    with chunks_of(32), Made() as record:
        loss = linear_cross_entropy(states, weight, made.labels, kernels=Kernels(backend), **made.options)
        forward = list(record.sizes)
        if any(wanted):
            loss.backward()
    backward = record.sizes[len(forward) :]
    of_weight = weight.numel()
    assert max(forward) == 32 * (304 if backend == "triton" else 300)  # rows of Triton's start aligned
    # in half precision each chunk's product is made before it is added, in fp32 only the sum is
    assert forward.count(of_weight) == wanted[1] * (1 if dtype == torch.float32 else 1 + 3)
    assert backward.count(of_weight) == (wanted[1] and dtype != torch.float32)  # fp32 is scaled in place
    assert max(backward, default=0) <= max(of_weight * wanted[1], states.numel() * wanted[0])


@backends
def test_forward_alone_makes_no_gradient(backend: str) -> None:
    made = problem((2, 40), 40, 64, ignored=0.0)
    expected = made.fused(backend)[0]
    states, weight = made.leaves()
    with torch.no_grad(), chunks_of(32), Made() as record:
        loss = linear_cross_entropy(states, weight, made.labels, kernels=Kernels(backend))
    torch.testing.assert_close(loss, expected)
    assert weight.numel() not in record.sizes
    assert max(record.sizes) <= states.numel()  # those that count, picked out


def test_gradients_that_were_not_made_are_not_silently_zero() -> None:
    made = problem((5,))
    states, weight = made.leaves()
    operation = torch.ops.loadstone.linear_cross_entropy
    total = operation(states, weight, made.labels, -100, 0.0, 0.0, True, False, "torch")[0]
    with pytest.raises(KernelError, match="without the gradients"):
        total.backward()


# Compilers


@backends
def test_opcheck(backend: str) -> None:
    made = problem((20,), 8, 33)
    for smoothing, cap, cases in ((0.0, 0.0, ((True, True),)), (0.1, 5.0, ((False, True), (True, False)))):
        for wanted in cases:
            leaves = (leaf.requires_grad_(want) for leaf, want in zip(made.leaves(), wanted, strict=True))
            arguments = (*leaves, made.labels, -100, smoothing, cap, *wanted, backend)
            torch.library.opcheck(torch.ops.loadstone.linear_cross_entropy.default, arguments)
        if backend == "triton":
            logits = torch.randn(20, 33, requires_grad=True)
            causal_lm_loss(logits, made.labels, kernels=Kernels("triton"))
            torch.library.opcheck(
                torch.ops.loadstone.cross_entropy.default, (logits, made.labels, -100, smoothing, cap)
            )


@backends
def test_compiled_whole(backend: str) -> None:
    made = problem(num_items_in_batch=9)
    selection = Kernels(backend)
    made.unfused(backend)  # imports the kernels

    def both(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        fused = linear_cross_entropy(states, weight, labels, kernels=selection, **made.options)
        return fused + 2 * causal_lm_loss(F.linear(states, weight), labels, kernels=selection, **made.options)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for call in (both, compiled):
        states, weight = made.leaves()
        loss = call(states, weight, made.labels)
        loss.backward()
        results.append((loss.detach(), states.grad, weight.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(states, weight, made.labels), results[0][0])
