"""Ranks that load one model tell each other how it goes, so that all of them fail if one does, and none waits.

Nothing else may be collective before they have agreed. Each rank goes through the same points; one that fails before a
point comes to it all the same, with its error, and leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from ..errors import ParallelError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_LONGEST = 600


class Failure(NamedTuple):
    """What one rank tells of its error."""

    text: str


class Agreement:
    """The points at which the ranks of a mesh meet."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        self.over = False

    def gather(self, mine: Any) -> dict[int, Any]:
        """What each rank of the mesh gives, by its number in the world."""
        found: list[tuple[int, Any]] = [(dist.get_rank(), mine)]
        try:
            for group in self._groups:
                boxes: list[Any] = [None] * group.size()
                dist.all_gather_object(boxes, found, group=group)
                found = [pair for box in boxes for pair in box]
        except (RuntimeError, ValueError) as error:  # a rank is gone, or was lost on the way
            self.over = True
            raise ParallelError(
                f"the ranks of the mesh cannot reach each other: {_short(error)}. One of them may have been killed; "
                "its own output says why"
            ) from error
        return dict(sorted(found))

    def meet(self, **facts: Any) -> dict[int, dict[str, Any]]:
        """Everyone's facts. Raises ParallelError if some rank has failed, or the facts differ that are given here."""
        gathered = self.gather(facts)
        failed = {rank: told for rank, told in gathered.items() if isinstance(told, Failure)}
        if failed:
            self.over = True
            first = min(failed)
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise ParallelError(f"loading ended on all ranks because rank {first} failed{more}: {failed[first].text}")
        return gathered

    def same(self, group: int = 0, **facts: Any) -> None:
        """`meet`, and ParallelError on all ranks if one has other facts than the others of its ``group``."""
        gathered = self.meet(group=group, **facts)
        for name in facts:
            held: dict[tuple[int, str], list[int]] = {}
            for rank, told in gathered.items():
                held.setdefault((told.get("group", 0), str(told.get(name))), []).append(rank)
            if len(held) > len({where for where, _ in held}):
                self.over = True
                found = "; ".join(f"{_ranks(ranks)}: {value[:_LONGEST]}" for (_, value), ranks in held.items())
                raise ParallelError(f"the ranks do not agree about the {name.replace('_', ' ')}: {found}")

    def fail(self, error: BaseException) -> None:
        """Tell the others at the next point; nothing once all know."""
        if self.over:
            return
        self.over = True
        try:
            self.gather(Failure(f"{type(error).__name__}: {_short(error)}"))
        except ParallelError:  # nobody left to be told
            return


@contextmanager
def together(layout: Any) -> Iterator[Agreement | None]:
    """What all ranks of a model's mesh do at once: if it fails on one, it does on all. layout: None for no mesh."""
    if layout is None:
        yield None
        return
    agreement = Agreement(layout.mesh)
    try:
        yield agreement
        agreement.meet()
    except BaseException as error:
        agreement.fail(error)
        raise


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))}"
