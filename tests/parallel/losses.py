"""The loss over a shared-out head, and that over the whole one, with the same inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from loadstone.kernels import linear_cross_entropy
from loadstone.kernels.vocab_parallel import vocab_parallel_cross_entropy

HIDDEN, VOCABULARY = 16, 24
CASES: dict[str, dict[str, Any]] = {
    "plain": {"tokens": 21},
    "several chunks": {"tokens": 700},
    "half precision": {"tokens": 40, "dtype": torch.bfloat16},
    "some ignored": {"tokens": 30, "ignored": 11},
    "all ignored": {"tokens": 9, "ignored": 9, "options": {"num_items_in_batch": 5}},
    "counted by the caller": {"tokens": 30, "ignored": 4, "options": {"num_items_in_batch": torch.tensor(77)}},
    "another number to ignore": {"tokens": 12, "ignored": 3, "options": {"ignore_index": 2}},
    "large logits": {"tokens": 12, "scale": 400.0},
}


def made(
    tokens: int, ignored: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0, options: Any = None
) -> Any:
    generator = torch.Generator().manual_seed(tokens + ignored)
    hidden = (torch.randn(1, tokens, HIDDEN, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(3, VOCABULARY, (1, tokens), generator=generator)
    options = options or {}
    labels[0, torch.randperm(tokens, generator=generator)[:ignored]] = options.get("ignore_index", -100)
    return hidden, weight, labels, options


def whole(name: str) -> tuple[torch.Tensor, ...]:
    """Loss and both gradients, of twice the loss."""
    hidden, weight, labels, options = made(**CASES[name])
    loss = linear_cross_entropy(hidden, weight, shift_labels=labels, **options)
    (2 * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def shared(rank: int) -> dict[str, Any]:
    """The same for each case: the gradient of the hidden states summed, this rank's rows of the weight's."""
    group, found = dist.group.WORLD, {}
    assert group is not None
    for name, case in CASES.items():
        hidden, weight, labels, options = made(**case)
        rows = weight.detach().chunk(group.size())[rank].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(hidden, rows, shift_labels=labels, group=group, **options)
        (2 * loss).backward()
        dist.all_reduce(hidden.grad)
        found[name] = loss.detach(), hidden.grad, rows.grad
    hidden, weight, labels, _ = made(9)
    frozen = weight.detach().chunk(group.size())[rank]
    with torch.no_grad():
        found["no gradients"] = vocab_parallel_cross_entropy(hidden, frozen, labels, group=group)
    try:
        vocab_parallel_cross_entropy(hidden, frozen, labels + VOCABULARY, group=group)
    except IndexError as error:
        found["outside"] = str(error)
    return found
