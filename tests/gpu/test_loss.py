"""Losses on a GPU, of logits and fused with the head: against fp64 or fp32, determinism, memory, wrong labels."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loadstone.kernels import Kernels, causal_lm_loss, linear_cross_entropy, support

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or support.why_not(torch.device("cuda", 0)) is not None or support.interpreting(),
        reason="needs a GPU that runs Triton",
    ),
]
module: Any = importlib.import_module("loadstone.kernels.linear_cross_entropy")
both = pytest.mark.parametrize("backend", ["torch", "triton"])
OPTIONS = [{}, {"label_smoothing": 0.1}, {"softcap": 20.0}, {"label_smoothing": 0.2, "softcap": 5.0}]


def problem(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, ignored: float = 0.2) -> list[Tensor]:
    """Hidden states, weight, and labels that are shifted already."""
    generator = torch.Generator("cuda").manual_seed(tokens + vocabulary)
    states = torch.randn(tokens, hidden, device="cuda", generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden, device="cuda", generator=generator) / hidden**0.5 * 2).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), device="cuda", generator=generator)
    return [states, weight, labels.masked_fill(torch.rand(tokens, device="cuda", generator=generator) < ignored, -100)]


def reference(states: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Loss and gradients by torch's functions: products in ``dtype``, softmax in fp32 or better, tokens in parts."""
    states, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (states, weight))
    wide = torch.promote_types(dtype, torch.float32)
    cap, smoothing = options.get("softcap"), options.get("label_smoothing", 0.0)
    count = (labels != -100).sum()
    total = torch.zeros((), device="cuda", dtype=wide)
    grads = [torch.zeros_like(tensor, dtype=wide) for tensor in (states, weight)]
    for start in range(0, len(states), 1024):
        part = slice(start, start + 1024)
        logits = F.linear(states[part], weight).to(wide)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = F.cross_entropy(logits, labels[part], reduction="sum", label_smoothing=smoothing) / count
        for grad, share in zip(grads, torch.autograd.grad(loss, (states, weight)), strict=True):
            grad += share
        total += loss.detach()
    return [total, *grads]


def results(backend: str, states: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (states, weight)]
    loss = linear_cross_entropy(*leaves, shift_labels=labels, kernels=Kernels(backend), **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check(got: list[Tensor], exact: list[Tensor], plain: list[Tensor], dtype: torch.dtype) -> None:
    for value, want, other, factor in zip(got, exact, plain, (2, 3, 3), strict=True):
        error, allowed = (float((x.to(want.dtype) - want).abs().max()) for x in (value, other))
        size = float(want.abs().max()) + (factor == 2)
        grain = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)  # where torch is right by chance
        assert error <= factor * allowed + grain * size, (error, allowed, size)


@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"), [(1, 64, 50257), (511, 576, 49152), (2049, 256, 32001), (4500, 128, 1000)]
)
def test_near_the_formula(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    inputs = problem(tokens, hidden, vocabulary, dtype, ignored=0.2 * (tokens > 1))
    exact = reference(*inputs, torch.float64, **options)
    check(results(backend, *inputs, **options), exact, reference(*inputs, dtype, **options), dtype)


@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocabulary", [1000, 50257, 128256])
def test_logits_given(vocabulary: int, dtype: torch.dtype, options: dict[str, Any], backend: str) -> None:
    states, weight, labels = problem(300, 32, vocabulary, dtype)
    logits = F.linear(states, weight).detach()
    exact, plain, mine = (logits.to(kind).requires_grad_() for kind in (torch.float64, torch.float32, dtype))
    losses = []
    for tensor in (exact, plain):
        cap = options.get("softcap")
        capped = tensor if cap is None else cap * torch.tanh(tensor / cap)
        losses.append(F.cross_entropy(capped, labels, label_smoothing=options.get("label_smoothing", 0.0)))
    losses.append(causal_lm_loss(mine, shift_labels=labels, kernels=Kernels(backend), **options))
    before = mine.detach().clone()
    outcomes = [
        [loss.detach(), *torch.autograd.grad(loss, x)] for loss, x in zip(losses, (exact, plain, mine), strict=True)
    ]
    assert torch.equal(mine.detach(), before)
    want, other, got = outcomes
    for value, truth, near, factor in zip(got, want, other, (2, 3), strict=True):
        error, allowed = (float((x.double() - truth).abs().max()) for x in (value, near))
        assert error <= factor * allowed + 4 * torch.finfo(value.dtype).eps * float(truth.abs().max() + (factor == 2))


@both
def test_more_logits_than_32_bits_can_count(backend: str) -> None:
    """17000 tokens of a vocabulary of 128256: 2.2e9 logits, of which a chunk is held at a time."""
    tokens, hidden, vocabulary = 17000, 128, 128256
    inputs = problem(tokens, hidden, vocabulary, torch.bfloat16)
    exact = reference(*inputs, torch.float32)
    plain = reference(*inputs, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = results(backend, *inputs)
    held = torch.cuda.max_memory_allocated() - before
    check(got, exact, plain, torch.bfloat16)
    size = module.chunk_size(tokens, vocabulary, inputs[0])
    weight_gradient = vocabulary * hidden * (4 + 2 + 2)  # the sum, what comes out of it, a chunk's product
    between = {"torch": module._SHARE_NUMBERS["gpu"] * 4 * 3, "triton": 0}[backend]
    assert held <= size * (vocabulary + 16) * 2 + weight_gradient + between + 4 * inputs[0].nbytes + (64 << 20)
    assert held < tokens * vocabulary


def test_rows_beyond_32_bits_of_given_logits() -> None:
    tokens, vocabulary = 17000, 128256
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free GPU memory")
    logits = torch.randn(tokens, vocabulary, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.full((tokens,), -100, device="cuda")
    labels[-3:] = torch.tensor([0, 7, vocabulary - 1], device="cuda")
    loss = causal_lm_loss(logits, shift_labels=labels, kernels=Kernels("triton"))
    (grad,) = torch.autograd.grad(loss, logits)
    tail = logits[-3:].detach().double().requires_grad_()
    expected = F.cross_entropy(tail, labels[-3:])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[-3:].double(), torch.autograd.grad(expected, tail)[0], rtol=1e-2, atol=1e-6)
    assert not grad[:-3].any()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_same_bits_every_time(backend: str, dtype: torch.dtype) -> None:
    inputs = problem(5000, 512, 32000, dtype)
    runs = [results(backend, *inputs) for _ in range(4)]
    assert all(
        torch.equal(a, b) for first, second in itertools.pairwise(runs) for a, b in zip(first, second, strict=True)
    )


@both
def test_frozen_weight_holds_no_gradient_of_it(backend: str) -> None:
    states, weight, labels = problem(4096, 1024, 64000, torch.bfloat16)
    states.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(states, weight, shift_labels=labels, kernels=Kernels(backend))
    held = torch.cuda.memory_allocated() - before
    assert held <= states.nbytes + (8 << 20)
    loss.backward()
    assert states.grad is not None


@both
def test_a_label_outside_the_vocabulary_is_nan_and_nothing_waits(backend: str) -> None:
    states, weight, labels = problem(600, 64, 1000, torch.bfloat16)
    for warm in (labels, labels.index_fill(0, torch.tensor([5], device="cuda"), 1000)):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if warm is not labels else "default")
        try:
            loss, grad_states, _ = results(backend, states, weight, warm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isnan().item() == (warm is not labels)
    assert grad_states[5].isnan().any()


@both
def test_autocast(backend: str) -> None:
    states, weight, labels = problem(3000, 256, 32000, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        got = results(backend, states, weight, labels)
    rounded = [tensor.bfloat16() for tensor in (states, weight)]
    assert {tensor.dtype for tensor in got} == {torch.float32}
    exact = reference(*rounded, labels, torch.float64)
    check(got, exact, reference(*rounded, labels, torch.bfloat16), torch.bfloat16)


@both
def test_compiled_whole(backend: str) -> None:
    states, weight, labels = problem(3000, 256, 32000, torch.bfloat16)
    expected = results(backend, states, weight, labels)
    leaves = [tensor.detach().requires_grad_() for tensor in (states, weight)]

    def call(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(states, weight, shift_labels=labels, kernels=Kernels(backend))

    loss = torch.compile(call, fullgraph=True)(*leaves, labels)
    for got, want in zip([loss.detach(), *torch.autograd.grad(loss, leaves)], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-6)
