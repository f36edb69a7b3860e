"""Flash attention on a GPU: the field's error rule over the full grid, determinism, causality, large tensors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernels_reference import attend, largest
from torch import Tensor

from loadstone import LlamaConfig, LlamaForCausalLM
from loadstone.kernels import Kernels, flash_attention, flash_attention_varlen, support

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or support.why_not(torch.device("cuda", 0)) is not None or support.interpreting(),
        reason="needs a GPU that runs Triton",
    ),
]
TRITON = Kernels("triton")
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 100},
    "softcap": {"causal": True, "softcap": 15.0},
    "padding": {"causal": True, "key_start": (7, 0), "key_end": (10**6, 150)},
    "dropout": {"causal": True, "dropout": 0.2},
}
LENGTHS = [(1, 1), (113, 203), (128, 217), (256, 256), (511, 512), (1023, 1024), (203, 113), (1, 777)]


def made(options: dict[str, Any], keys: int) -> dict[str, Any]:
    options = dict(options)
    for name in ("key_start", "key_end"):
        if name in options:
            options[name] = torch.tensor(options[name], device="cuda").clamp(max=keys)
    if "dropout" in options:
        options["seed"] = torch.tensor([1234567], device="cuda")
    return options


def inputs(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2
) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(queries + keys)
    shapes = ((2, queries, heads, head_dim), (2, keys, kv_heads, head_dim), (2, keys, kv_heads, head_dim))
    return [torch.randn(s, generator=generator, device="cuda").to(dtype).transpose(1, 2) for s in shapes]


def outcome(call: Any, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output, lse = call(*leaves)
    return [output.detach(), lse.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_error_against_float64(name: str, dtype: torch.dtype, head_dim: int) -> None:
    """At most twice (forward) and three times (backward) the error of torch in the same precision."""
    floor = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 3e-6}[dtype]
    for (queries, keys), (heads, kv_heads) in itertools.product(LENGTHS, ((6, 6), (6, 2), (4, 1))):
        tensors = inputs(queries, keys, head_dim, dtype, heads, kv_heads)
        options = made(OPTIONS[name], keys)
        grad = torch.randn(tensors[0].shape, device="cuda")
        mine = outcome(lambda *t: flash_attention(*t, **options, return_lse=True, kernels=TRITON), tensors, grad)  # noqa: B023
        truth = outcome(lambda *t: attend(*t, options, wide=True), tensors, grad)  # noqa: B023
        plain = outcome(lambda *t: attend(*t, options, wide=False), tensors, grad)  # noqa: B023
        for index, (ours, right, theirs) in enumerate(zip(mine, truth, plain, strict=True)):
            seen = right > float("-inf")
            size = float(torch.where(seen, right, torch.zeros_like(right)).abs().max())
            bound = (2 if index < 2 else 3) * largest(theirs, right) + floor * max(1.0, size)
            assert largest(ours, right) <= bound, (index, queries, keys, heads, kv_heads)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode(dtype: torch.dtype, head_dim: int) -> None:
    for queries, keys, (heads, kv_heads) in itertools.product(
        (1, 2, 5), (1, 300, 5000, 40000), ((8, 8), (32, 4), (8, 1))
    ):
        tensors = inputs(queries, keys, head_dim, dtype, heads, kv_heads)
        for options in ({"causal": True}, {"causal": True, "window": 300}, {"key_start": torch.tensor([3, 0]).cuda()}):
            if "key_start" in options and keys == 1:
                continue
            output = flash_attention(*tensors, **options, kernels=TRITON)
            truth = attend(*tensors, options, wide=True)[0]
            plain = attend(*tensors, options, wide=False)[0]
            assert largest(output, truth) <= 2 * largest(plain, truth) + 1e-3, (queries, keys, heads, kv_heads)
            assert torch.equal(output, flash_attention(*tensors, **options, kernels=TRITON))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_bits_twice(name: str) -> None:
    tensors = inputs(1000, 1500, 128, torch.bfloat16, 16, 4)
    options, grad = made(OPTIONS[name], 1500), torch.randn(2, 16, 1000, 128, device="cuda")
    first, again = (
        outcome(lambda *t: flash_attention(*t, **options, return_lse=True, kernels=TRITON), tensors, grad)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_future_changes_nothing() -> None:
    tensors = inputs(2000, 2000, 128, torch.bfloat16)
    changed = [torch.cat((tensor[:, :, :1234], tensor[:, :, 1234:] * 3 + 1), 2) for tensor in tensors]
    before = flash_attention(*tensors, causal=True, kernels=TRITON)
    assert torch.equal(before[:, :, :1234], flash_attention(*changed, causal=True, kernels=TRITON)[:, :, :1234])


def test_packed_equals_the_pieces_alone() -> None:
    lengths = [1, 700, 33, 1200, 128]
    cu = torch.tensor([0, *lengths], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
    query, key, value = (
        torch.randn(sum(lengths), heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)
    )
    packed = flash_attention_varlen(query, key, value, cu, causal=True, kernels=TRITON)
    pieces = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    apart = [
        flash_attention(*(t[None].transpose(1, 2) for t in piece), causal=True, kernels=TRITON)[0].transpose(0, 1)
        for piece in pieces
    ]
    assert largest(packed, torch.cat(apart)) < 2e-2


def test_queries_that_see_nothing() -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(300, 300, 64, torch.bfloat16)]
    end = torch.tensor([0, 5], device="cuda")
    output, lse = flash_attention(*tensors, key_end=end, return_lse=True, kernels=TRITON)
    assert not output[0].any()
    assert (lse[0] == float("-inf")).all()
    for gradient in torch.autograd.grad(output.float().square().sum(), tensors):
        assert torch.isfinite(gradient).all()
        assert not gradient[0].any()


def test_more_than_two_to_the_31_elements() -> None:
    """The last head of the last row, far beyond 32-bit offsets, equals the same head alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    query = torch.randn(1, 66_000, 260, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # 2.2e9 elements
    assert query.numel() > 1 << 31
    key, value = (torch.randn(1, 1, 300, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    output = flash_attention(query, key, value, kernels=TRITON)
    for head, start in ((0, 0), (259, 65_000)):
        alone = flash_attention(query[:, head : head + 1, start:], key, value, kernels=TRITON)
        assert torch.equal(output[:, head : head + 1, start:], alone)


def test_gradcheck() -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(17, 23, 16, torch.float32, 4, 2)]
    for name in ("full", "causal", "softcap", "dropout"):
        options = made(OPTIONS[name], 23)
        torch.autograd.gradcheck(
            lambda *t: flash_attention(*t, **options, kernels=TRITON),  # noqa: B023
            tensors, eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=0.0, fast_mode=True,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_whole_model(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=3,
                         num_attention_heads=8, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).cuda()
    ids = torch.randint(0, 1000, (2, 300), device="cuda")
    results = {}
    for name, attention, kernels, kind in (
        ("truth", "eager", "torch", torch.float64),
        ("plain", "eager", "torch", dtype),
        ("mine", "flash", "triton", dtype),
    ):
        model.to(kind)
        model.set_attn_implementation(attention)
        model.set_kernels(kernels)
        model.train()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.eval()
        with torch.no_grad():
            results[name] = [model(ids).logits, *gradients]
        model.float()
    for index, (mine, plain, truth) in enumerate(zip(results["mine"], results["plain"], results["truth"], strict=True)):
        assert largest(mine, truth) <= 3 * largest(plain, truth) + 1e-5, index
