"""Key heads that tensor parallelism does not divide: ranks whose queries share a head put its parts together.

The rows of a key or value projection are shared out evenly, through the heads if it must be: weights, gradients, norms
and checkpoints are those of any layer that is cut by rows. What the rows give is gathered over the ranks that need it,
and its gradients are summed over them. For each token and layer that sends a head's width, where the rows themselves
would be of a size that is the model's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..errors import ParallelError
from .collectives import Copy, Gather


class KeyHeads(NamedTuple):
    """Where this rank's key heads come from. ``group``: the ranks that put their outputs together. ``width``: of a
    head. ``chosen``: the heads, of those gathered, that this rank's queries attend to; None: all, there is one."""

    group: Any
    width: int
    chosen: tuple[int, ...] | None

    def gather(self, states: Tensor) -> Tensor:
        """(batch, seq, this rank's rows) → (batch, seq, heads * width)."""
        found: Tensor = Copy.apply(Gather.apply(states, self.group), self.group)
        if self.chosen is None:
            return found
        heads = found.unflatten(-1, (-1, self.width))
        return heads[..., list(self.chosen), :].flatten(-2)


def check_heads(config: Any, size: int, gathers: bool) -> None:
    """ParallelError if the heads cannot be shared out over ``size`` ranks. gathers: whether the plan has layers of the
    style ``colwise_key_heads``, which need not be divided at heads."""
    queries, keys = _heads(config)
    if queries % size:
        raise ParallelError(
            f"tp={size} cannot share out num_attention_heads={queries}: every rank needs whole query heads; use a tp "
            "size that divides them"
        )
    if keys % size and not gathers:
        raise ParallelError(
            f"tp={size} cannot share out num_key_value_heads={keys}: use a tp size that divides them, or give the key "
            "and value projections the style 'colwise_key_heads' in the plan, which puts heads together again"
        )
    if keys % size and keys * _width(config) % size:
        raise ParallelError(
            f"tp={size} cannot share out num_key_value_heads={keys}: not even their {keys} * {_width(config)} rows; "
            "use another tp size"
        )


def key_heads(config: Any, group: Any) -> KeyHeads | None:
    """How this rank of a tp group gets its key heads; None if it has them by itself. All ranks call it together."""
    queries, keys = _heads(config)
    size, rank = group.size(), group.rank()
    if keys % size == 0:
        return None
    if size % keys == 0:
        return KeyHeads(_subgroup(group, size // keys), _width(config), None)
    mine, sharing = queries // size, queries // keys
    wanted = [head // sharing for head in range(rank * mine, (rank + 1) * mine)]
    heads = sorted(set(wanted))
    alike = len({wanted.count(head) for head in heads}) == 1
    return KeyHeads(group, _width(config), tuple(heads if alike else wanted))


@lru_cache(maxsize=16)
def _subgroup(group: Any, size: int) -> Any:
    """The ``size`` neighbours in a group that this rank is one of."""
    ranks, first = dist.get_process_group_ranks(group), group.rank() // size * size
    return dist.new_group(ranks[first : first + size], use_local_synchronization=True)


def _heads(config: Any) -> tuple[int, int]:
    """Query and key heads; 0 for a configuration that names none."""
    queries = getattr(config, "num_attention_heads", None)
    keys = getattr(config, "num_key_value_heads", None)
    if not isinstance(queries, int):
        return 0, 0
    return queries, keys if isinstance(keys, int) else queries


def _width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
