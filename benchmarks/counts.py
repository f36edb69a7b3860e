"""How much work a computation is, counted and not measured: operations, and bytes that must move."""

from __future__ import annotations


def visible_pairs(queries: int, keys: int, causal: bool = False, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees; the last query sits at the last key.

    window: with ``causal``, the most keys a query sees, its own included.
    """
    if not causal:
        return queries * keys
    ends = (max(0, min(keys, keys - queries + place + 1)) for place in range(queries))
    return sum(end if window is None else min(end, window) for end in ends)


def attention_flops(batch: int, heads: int, head_dim: int, pairs: int, backward: bool = False) -> int:
    """Two products of 2 * head_dim operations for each visible pair; five of them backward, as the field counts."""
    return 4 * batch * heads * head_dim * pairs * (5 if backward else 2) // 2


def decode_bytes(batch: int, heads: int, kv_heads: int, head_dim: int, keys: int, itemsize: int) -> int:
    """What decoding one token must read and write: all keys and values once, the query and the output."""
    return batch * head_dim * itemsize * (2 * kv_heads * keys + 2 * heads)


def training_flops(parameters: int, tokens: int, layers: int, batch: int, heads: int, head_dim: int, pairs: int) -> int:
    """A training step: 6 operations for each parameter and token, and attention's, three times those of its forward.

    parameters: those that multiply, so without the embedding of the input. pairs: visible pairs of one sequence.
    Recomputation is not counted, which is what makes the quotient a model's FLOPs utilisation (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B).
    """
    return 6 * parameters * tokens + 3 * layers * attention_flops(batch, heads, head_dim, pairs)
