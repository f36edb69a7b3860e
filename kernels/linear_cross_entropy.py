"""The head's projection and the next-token loss in one, without ever holding the logits.

The tokens are worked through in chunks. A chunk's logits are computed in the dtype of the hidden states, as the head
would, their loss in fp32; the gradient of the logits takes their place, and goes at once into the gradients of the
hidden states and of the weight. So gradients are made in the forward pass, with three matrix products in all and none
of them twice, and the backward pass multiplies them by the incoming number.
Source: Hsu et al. 2024, arXiv:2410.10989, section 3.2 (chunks, gradients in the forward pass).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import KernelError
from .dispatch import AUTO, Kernels, declare, dispatch
from .library import define
from .loss import average, check_options, check_targets, shifted_targets

Rows = Callable[[Tensor, Tensor, int, float, float, Tensor, bool], None]
"""(logits, targets, ignore_index, label_smoothing, softcap or 0, losses, differentiate): fills ``losses`` (tokens,)
with the fp32 loss of each row of ``logits`` (tokens, vocab); if asked to differentiate, writes the gradients over
the logits. Rows to be ignored give zeros, targets outside the vocabulary NaN."""

# Adding a chunk of n tokens to the weight's gradient moves 8 bytes for each number of the weight, and its products
# are 6 n operations: the chunk hides the traffic if n is well above 8/6 of the operations a device does per byte
# (some 300 on a GPU, 10 to 30 on a CPU). The logits of a chunk take n * vocab * itemsize bytes, never more than this.
_CHUNK_TOKENS = {"cpu": 256, "gpu": 2048}
_CHUNK_BYTES = {"cpu": 128 << 20, "gpu": 1 << 30}
_SHARE_NUMBERS = {"cpu": 1 << 22, "gpu": 1 << 25}  # logits that torch works on at a time, held in fp32


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    kernels: Kernels = AUTO,
) -> Tensor:
    """`causal_lm_loss` of ``hidden_states @ weight.T``, of which only a chunk of tokens is held at a time.

    hidden_states: (batch, seq, hidden_size) or (tokens, hidden_size). weight: (vocab, hidden_size), of the same float
        dtype; under autocast both are cast as in a linear layer. labels and the options: as for `causal_lm_loss`.
    Chunks have min(2048 on a GPU or 256 on a CPU, 1 GiB or 128 MiB / bytes of one token's logits) tokens, evened out.
    Returns a scalar in fp32. Where gradients are wanted the forward pass makes and holds them: that of the hidden
    states in their dtype, that of the weight in fp32 until the backward pass scales it; frozen tensors cost nothing.
    The backward pass scales them in place unless the graph is kept. Can be differentiated once.
    Operation "linear_cross_entropy": takes hidden_states (tokens, hidden_size), weight, targets (tokens,),
    ignore_index, label_smoothing, softcap; returns the sum of the losses, fp32, and the number of counted targets.
    Raises ValueError if shapes or dtypes do not agree or an option is out of its range, IndexError for a label outside
    the vocabulary; on a GPU, which nothing waits for, such a label makes the loss and the gradients NaN instead.
    """
    check_options(label_smoothing, softcap)
    if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[-1]:
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)}, hidden_states {tuple(hidden_states.shape)}: the weight needs "
            f"the shape (vocab, {hidden_states.shape[-1]})"
        )
    targets = shifted_targets(hidden_states, "hidden_states", labels, shift_labels, ignore_index)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    options = (ignore_index, label_smoothing, softcap)
    total, counted = dispatch(kernels, "linear_cross_entropy", flat, weight, targets, *options)
    return average(total, counted, num_items_in_batch)


def summed_loss(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The operation, by the rows function of ``backend``: "torch" or "triton"."""
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden_states.dtype, weight.dtype):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
    elif hidden_states.dtype != weight.dtype:
        raise ValueError(
            f"hidden_states are {hidden_states.dtype}, the weight is {weight.dtype}: outside autocast they need one "
            "dtype"
        )
    recorded = torch.is_grad_enabled()
    total, counted, _, _ = _OPERATION(
        hidden_states,
        weight,
        targets,
        ignore_index,
        float(label_smoothing),
        float(softcap or 0.0),
        recorded and hidden_states.requires_grad,
        recorded and weight.requires_grad,
        backend,
    )
    return total, counted


def _torch_linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return summed_loss(hidden_states, weight, targets, ignore_index, label_smoothing, softcap, "torch")


declare("linear_cross_entropy", _torch_linear_cross_entropy, "cross_entropy")


# The operation of torch


def _forward(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    grad_hidden_states: bool,
    grad_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, number of counted targets, and the gradients of the sum that are wanted (else empty).

    hidden_states: (tokens, hidden_size), whose dtype is that of the products. weight: (vocab, hidden_size).
    """
    check_targets(targets, weight.shape[0], ignore_index)
    counted = targets != ignore_index
    kept = None
    states = hidden_states
    if states.device.type == "cpu" and not bool(counted.all()):  # elsewhere, asking would wait for the device
        kept = counted.nonzero()[:, 0]
        states, targets = states[kept], targets[kept]
    with torch.autocast(states.device.type, enabled=False):
        total, for_states, for_weight = _chunked(
            states,
            weight.to(states.dtype),
            targets,
            (ignore_index, label_smoothing, softcap),
            (grad_hidden_states, grad_weight),
            backend,
        )
    if kept is not None and grad_hidden_states:
        for_states = torch.zeros_like(hidden_states).index_copy_(0, kept, for_states)
    return total, counted.sum(), for_states, for_weight


def _chunked(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: tuple[int, float, float],
    wanted: tuple[bool, bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop over the chunks, in one dtype: the sum of the losses and both gradients."""
    tokens, vocabulary = states.shape[0], weight.shape[0]
    rows = _rows_of(backend)
    size = chunk_size(tokens, vocabulary, states)
    losses = states.new_empty(tokens, dtype=torch.float32)
    for_states = torch.empty_like(states, memory_format=torch.contiguous_format) if wanted[0] else states.new_empty(0)
    for_weight = _weight_gradient(weight, tokens) if wanted[1] else weight.new_empty(0, dtype=torch.float32)
    buffer = _logits_buffer(size, vocabulary, states, aligned=backend == "triton")
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        block = states[part]
        logits = torch.mm(block, weight.t(), out=buffer[: block.shape[0]])
        rows(logits, targets[part], *options, losses[part], any(wanted))
        if wanted[0]:
            torch.mm(logits, weight, out=for_states[part])
        if wanted[1]:
            _accumulate(for_weight, logits, block, first=start == 0)
    return losses.sum(), for_states, for_weight


def chunk_size(tokens: int, vocabulary: int, states: Tensor) -> int:
    """Tokens of a chunk: at most the device's number and bytes, the chunks about alike and of whole tiles."""
    kind = "cpu" if states.device.type == "cpu" else "gpu"
    most = max(1, min(_CHUNK_TOKENS[kind], _CHUNK_BYTES[kind] // (vocabulary * states.itemsize)))
    chunks = max(1, -(-tokens // most))
    even = -(-tokens // chunks)
    return max(1, min(most, -(-even // 64) * 64))


def _logits_buffer(rows: int, vocabulary: int, states: Tensor, aligned: bool) -> Tensor:
    """Room for a chunk's logits; aligned: rows start at multiples of 16 numbers, for wide loads of odd vocabularies."""
    stride = -(-vocabulary // 16) * 16 if aligned else vocabulary
    return states.new_empty(rows, stride)[:, :vocabulary]


def _weight_gradient(weight: Tensor, tokens: int) -> Tensor:
    """Where the weight's gradient is summed, in fp32 at least; not filled unless there is nothing to sum."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    make = torch.empty_like if tokens else torch.zeros_like
    return make(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _accumulate(total: Tensor, grad_logits: Tensor, states: Tensor, first: bool) -> None:
    """total += grad_logits.T @ states, or total = if it is the first."""
    if total.dtype == states.dtype:
        total.addmm_(grad_logits.t(), states, beta=0 if first else 1)
    elif _sums_in_fp32(states.device, states.dtype):
        beta = 0 if first else 1
        torch.addmm(total, grad_logits.t(), states, beta=beta, out_dtype=torch.float32, out=total)
    else:  # the product is rounded, to the dtype in which an unfused head would have its gradient
        # fp16 ends at 65504, which the sum over a chunk, not divided by its count yet, could pass
        unit = 2.0 ** (states.shape[0] - 1).bit_length() if states.dtype == torch.float16 else 1.0
        product = torch.mm(grad_logits.t(), states if unit == 1.0 else states / unit)
        if first:
            total.copy_(product).mul_(unit)
        else:
            total.add_(product, alpha=unit)


@lru_cache(maxsize=16)
def _sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds products of half precision to an fp32 matrix on a device: found out by trying, for the
    argument is there since 2.8, for NVIDIA only, and a sum of another dtype than the factors is taken since later."""
    if device.type != "cuda":
        return False
    total = torch.ones(16, 16, device=device)
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor.t(), factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def _fake(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    grad_hidden_states: bool,
    grad_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return (
        hidden_states.new_empty((), dtype=torch.float32),
        targets.new_empty((), dtype=torch.int64),
        hidden_states.new_empty(hidden_states.shape if grad_hidden_states else 0),
        weight.new_empty(weight.shape if grad_weight else 0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros as large as the weight come with the loss's gradient
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.made = inputs[6:8]


# Whether the graph is kept for another backward pass; torch's own compiled functions ask the same of it.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    counted, *made = ctx.saved_tensors
    if any(needs and not is_made for needs, is_made in zip(ctx.needs_input_grad, ctx.made, strict=False)):
        raise KernelError(
            "linear_cross_entropy was called without the gradients that are now asked for; call "
            "kernels.linear_cross_entropy, which asks for those that its tensors need"
        )
    scale = torch.where(counted > 0, grad, 0.0)  # a mean over nothing comes with an infinite gradient
    keep = _graph_is_kept()
    gradients = [
        _scaled(gradient, scale, dtype, keep) if needs else None
        for gradient, dtype, needs in zip(made, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*gradients, *[None] * 7)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    if gradient.dtype == dtype and torch.finfo(dtype).bits >= 32:
        in_place = not keep and type(gradient) is Tensor  # a compiler's tensors are of other types; it decides itself
        return gradient.mul_(scale) if in_place else gradient * scale
    # A scale of no dimensions would be rounded to half precision before it multiplies.
    return torch.mul(gradient, scale.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


_OPERATION = define("linear_cross_entropy", _forward, _fake, backward=_backward, setup_context=_setup_context)


# A chunk's rows by torch


def _rows_of(backend: str) -> Rows:
    if backend == "torch":
        return _torch_rows
    return import_module(".fused.cross_entropy", __package__).rows


def _torch_rows(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    losses: Tensor,
    differentiate: bool,
) -> None:
    """A `Rows`, a few rows at a time so that what is between logits and gradient stays in the cache."""
    vocabulary = logits.shape[1]
    counted = (targets != ignore_index)[:, None]
    known = ((targets >= 0) & (targets < vocabulary))[:, None]
    safe = torch.where(known, targets[:, None], 0)
    expected = torch.where(known, 1.0 - label_smoothing, torch.nan)
    on_cpu = logits.device.type == "cpu"
    complete = on_cpu and bool(counted.all())
    step = max(1, _SHARE_NUMBERS["cpu" if on_cpu else "gpu"] // max(1, vocabulary))
    scratch = logits.new_empty(min(step, logits.shape[0]), vocabulary, dtype=torch.float32)
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        values = logits[part]
        bent = torch.tanh(values.float() / softcap) if softcap else None
        share = scratch[: values.shape[0]]
        torch.log_softmax(values if bent is None else bent * softcap, -1, dtype=torch.float32, out=share)
        loss = share.gather(1, safe[part]).mul_(-expected[part])
        if label_smoothing:
            loss.sub_(share.mean(1, keepdim=True), alpha=label_smoothing)
        losses[part] = torch.where(counted[part], loss, 0.0)[:, 0]
        if not differentiate:
            continue
        grad = torch.exp(share, out=values if values.dtype == torch.float32 else share)
        if label_smoothing:
            grad.sub_(label_smoothing / vocabulary)
        grad.scatter_add_(1, safe[part], -expected[part])
        if bent is not None:
            grad.mul_(bent.square_().neg_().add_(1.0))
        if not complete:
            grad.masked_fill_(~counted[part], 0.0)
        if grad is not values:
            values.copy_(grad)
