"""Forwards of tensor-parallel modules: local tensors in and out, and what the ranks tell each other in between.

A weight is a distributed tensor, so that optimizers, norms of gradients and checkpoints see the whole. While its
module runs, the attribute is this rank's part of it, a plain tensor: every kernel works as it does on one device, and
the gradient comes back as a distributed one. Activations between modules are whole and alike on all ranks.
Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParallelError
from ..kernels.vocab_parallel import vocab_parallel_cross_entropy
from ..quant.packed import holds_in_out
from .collectives import Copy, Gather, Sum
from .parallel_heads import KeyHeads
from .parallel_plan import Style

Forward = Callable[..., Any]


def parallelize_forwards(
    model: nn.Module, styles: Mapping[str, Style], group: Any, heads: KeyHeads | None = None
) -> None:
    """Give every module with weights of its own, and those with a style, their forward over the ranks of ``group``;
    ``heads``: how those get their key heads that have not their own."""
    shared = [f"{name}." for name, style in styles.items() if style.name == "shared_input"]
    for name, module in list(model.named_modules()):
        style = styles.get(name)
        if style is None and not module._parameters:
            continue
        plain: Forward = module.forward
        if style is None:
            made = _whole(module, plain)
        elif style.name == "shared_input":
            made = _shared_input(name, plain, group)
        elif style.name == "embedding_rowwise":
            made = _embedding(module, plain, group)
        elif style.name == "rowwise":
            made = _rowwise(module, plain, group)
        else:
            copied = name.startswith(tuple(shared))
            made = _colwise(module, plain, group, style, copied)
            if style.name == "colwise_key_heads" and heads is not None:
                made = _key_heads(made, heads)
            if style.name == "colwise_gather_output" and getattr(module, "bias", None) is None:
                module.fused_loss = partial(torch.compiler.disable(_head_loss), module, group)
        # compilers look past the attributes that stand in front of parameters; these modules run as they are
        module.forward = torch.compiler.disable(wraps(plain)(made))


@contextmanager
def _attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Attributes of a module that stand in front of its parameters meanwhile."""
    held = module.__dict__
    before = {name: held[name] for name in values if name in held}
    held.update(values)
    try:
        yield
    finally:
        for name in values:
            del held[name]
        held.update(before)


def local_part(module: nn.Module, name: str) -> Tensor | None:
    """This rank's part of a module's parameter, through which gradients flow."""
    parameter: Any = module._parameters[name]
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _locals(module: nn.Module) -> dict[str, Any]:
    return {name: local_part(module, name) for name in module._parameters}


def _whole(module: nn.Module, plain: Forward) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _attributes(module, **_locals(module)):
            return plain(*args, **kwargs)

    return forward


def _shared_input(name: str, plain: Forward, group: Any) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not args:
            raise ParallelError(f"{name} has the style shared_input: its first input must be given by position")
        return plain(Copy.apply(args[0], group), *args[1:], **kwargs)

    return forward


def _colwise(module: nn.Module, plain: Forward, group: Any, style: Style, copied: bool) -> Forward:
    def forward(hidden_states: Tensor) -> Tensor:
        parts = _locals(module)
        if style.parts > 1:
            side_by_side = (1, 2) if holds_in_out(module) else (0, 1)
            parts["weight"] = parts["weight"].flatten(*side_by_side)
            if parts.get("bias") is not None:
                shares = Copy.apply(parts["bias"], group).view(style.parts, group.size(), -1)
                parts["bias"] = shares[:, group.rank()].reshape(-1)
        if not copied:
            hidden_states = Copy.apply(hidden_states, group)
        with _attributes(module, **parts):
            output = plain(hidden_states)
        return Gather.apply(output, group) if style.name == "colwise_gather_output" else output

    return forward


def _key_heads(share: Forward, heads: KeyHeads) -> Forward:
    def forward(hidden_states: Tensor) -> Tensor:
        return heads.gather(share(hidden_states))

    return forward


def _head_loss(head: nn.Module, group: Any, hidden_states: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    """The loss of a head whose rows are shared out, without its logits."""
    weight = local_part(head, "weight")
    assert weight is not None
    return vocab_parallel_cross_entropy(Copy.apply(hidden_states, group), weight, labels, group=group, **options)


def _rowwise(module: nn.Module, plain: Forward, group: Any) -> Forward:
    def forward(hidden_states: Tensor) -> Tensor:
        parts = _locals(module)
        bias = parts.get("bias")
        with _attributes(module, **{**parts, "bias": None}):
            output = Sum.apply(plain(hidden_states), group)
        return output if bias is None else output + bias

    return forward


def _embedding(module: nn.Module, plain: Forward, group: Any) -> Forward:
    padding: int | None = module.padding_idx  # type: ignore[assignment]

    def forward(ids: Tensor) -> Tensor:
        weight = local_part(module, "weight")
        assert weight is not None
        rows = weight.shape[0]
        first = group.rank() * rows
        elsewhere = (ids < first) | (ids >= first + rows)
        here = None if padding is None or not first <= padding < first + rows else padding - first
        with _attributes(module, weight=weight, padding_idx=here):
            output = plain((ids - first).masked_fill(elsewhere, 0))
        return Sum.apply(output.masked_fill(elsewhere[..., None], 0), group)

    return forward
