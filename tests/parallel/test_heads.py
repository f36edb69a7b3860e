"""Which key heads each rank attends to, where they cannot be shared out whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from loadstone.errors import ParallelError
from loadstone.models import parallel_heads
from loadstone.models.parallel_heads import check_heads, key_heads


class Group:
    """A rank of a group of one machine's imagination."""

    def __init__(self, size: int, rank: int) -> None:
        self.sizes = size, rank

    def size(self) -> int:
        return self.sizes[0]

    def rank(self) -> int:
        return self.sizes[1]


@given(keys=st.integers(1, 8), sharing=st.integers(1, 6), size=st.integers(2, 8))
def test_every_query_head_finds_its_key_head(keys: int, sharing: int, size: int) -> None:
    """Attention pairs equal runs of query heads with each key head: whatever is chosen, the pairs are those of one
    process."""
    queries, width = keys * sharing, 4
    assume(queries % size == 0)
    assume(keys * width % size == 0)
    config = SimpleNamespace(num_attention_heads=queries, num_key_value_heads=keys, head_dim=width)
    check_heads(config, size, gathers=True)
    mine, rows = queries // size, keys * width // size
    whole = torch.arange(keys * width)
    patch = pytest.MonkeyPatch()
    patch.setattr(parallel_heads, "_subgroup", lambda group, count: Group(count, group.rank() % count))
    try:
        for rank in range(size):
            found = key_heads(config, Group(size, rank))
            if found is None:
                here = whole[rank * rows : (rank + 1) * rows]
            else:
                together = found.group.size()
                first = rank // together * together
                gathered = whole[first * rows : (first + together) * rows]
                patch.setattr(parallel_heads.Gather, "apply", lambda states, group, all_=gathered: all_)
                here = found.gather(whole[rank * rows : (rank + 1) * rows])
            heads = (here.view(-1, width)[:, 0] // width).tolist()
            assert mine % len(heads) == 0
            attended = [heads[place // (mine // len(heads))] for place in range(mine)]
            assert attended == [head // sharing for head in range(rank * mine, (rank + 1) * mine)]
    finally:
        patch.undo()


@pytest.mark.parametrize(
    ("heads", "gathers", "says"),
    [
        ((6, 2, 4), True, "num_attention_heads=6"),
        ((8, 2, 4), False, "colwise_key_heads"),
        ((4, 1, 2), True, "1 * 2 rows"),
    ],
)
def test_heads_that_cannot_be_shared_out(heads: tuple[int, int, int], gathers: bool, says: str) -> None:
    queries, keys, width = heads
    config: Any = SimpleNamespace(num_attention_heads=queries, num_key_value_heads=keys, head_dim=width)
    with pytest.raises(ParallelError, match=says.replace("*", r"\*")):
        check_heads(config, 4, gathers)
