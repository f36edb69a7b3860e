"""Attention: one function with a stable signature, its implementation chosen by name from a small table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import AttentionError, RegistrationError, nearest
from . import support
from .eager import eager_attention
from .flash import flash_attention_2
from .mask import AttentionMask
from .sdpa import sdpa_attention

AttentionFunction = Callable[..., tuple[Tensor, "Tensor | None"]]
"""``fn(query, key, value, mask, *, scaling, dropout, score_precision, output_attentions) -> (output, weights)``."""


@dataclass(frozen=True)
class _Implementation:
    function: AttentionFunction
    returns_weights: bool = False
    unavailable: Callable[[], str | None] | None = None


_TABLE: dict[str, _Implementation] = {
    "eager": _Implementation(eager_attention, returns_weights=True),
    "flash": _Implementation(flash_attention_2, unavailable=support.no_gpu_at_all),
    "flash_attention_2": _Implementation(flash_attention_2, unavailable=support.no_gpu_at_all),
    "sdpa": _Implementation(sdpa_attention),
}


def register_attention(
    name: str,
    function: AttentionFunction,
    *,
    returns_weights: bool = False,
    unavailable: Callable[[], str | None] | None = None,
    exist_ok: bool = False,
) -> None:
    """Make ``function`` available as ``attn_implementation=name``.

    function: ``(query, key, value, mask, *, scaling, dropout, score_precision, output_attentions)``, as `attention`
        describes them, returning ``(output, weights or None)``.
    returns_weights: whether it gives the weights when ``output_attentions`` is true.
    unavailable: says why no device of this machine can run it, None if one can; asked when it is chosen.
    Raises RegistrationError if the name is taken and ``exist_ok`` is false.
    """
    if name in _TABLE and not exist_ok:
        raise RegistrationError(f"attention {name!r} is already registered; pass exist_ok=True to replace it")
    _TABLE[name] = _Implementation(function, returns_weights, unavailable)


def attention_names() -> list[str]:
    """Names accepted as ``attn_implementation``."""
    return sorted(_TABLE)


def attention_unavailable(name: str) -> str | None:
    """Why a registered implementation cannot run on any device of this machine, None if it can."""
    unavailable = _TABLE[name].unavailable
    return None if unavailable is None else unavailable()


def check_attention(name: str) -> str:
    """Return ``name`` if it is registered and can run on this machine. Raises AttentionError otherwise."""
    if not isinstance(name, str) or name not in _TABLE:
        hint = nearest(name, _TABLE) if isinstance(name, str) else ""
        raise AttentionError(
            f"unknown attention implementation {name!r}{hint} available: {', '.join(attention_names())}; "
            "register_attention(name, function) adds one"
        )
    if (reason := attention_unavailable(name)) is not None:
        raise AttentionError(f"attn_implementation={name!r} cannot run here: {reason}. Use 'sdpa'")
    return name


def returns_weights(name: str) -> bool:
    """Whether the implementation can return attention weights (``output_attentions=True``)."""
    return name in _TABLE and _TABLE[name].returns_weights


def attention(
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scaling: float,
    dropout: float = 0.0,
    score_precision: str = "softmax",
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) with grouped key and value heads.

    query: (batch, heads, query_length, head_dim); key, value: (batch, kv_heads, key_length, head_dim), where kv_heads
        divides heads and is not repeated by the caller; any strides; all of one float dtype.
    scaling: factor on query · key. dropout: probability on the weights, 0 outside training.
    score_precision: where an implementation that holds the scores works in fp32: "input" (nowhere), "softmax", or
        "scores" (the product too). Fused implementations accumulate in fp32 always.
    Returns (batch, heads, query_length, head_dim) in the query's dtype, and the weights
        (batch, heads, query_length, key_length) if asked for and available, else None.
    Raises AttentionError for an unknown implementation.
    """
    entry = _TABLE.get(implementation)
    if entry is None:
        check_attention(implementation)
        raise AssertionError  # check_attention raised
    return entry.function(
        query,
        key,
        value,
        mask,
        scaling=scaling,
        dropout=dropout,
        score_precision=score_precision,
        output_attentions=output_attentions,
    )
