"""What a load did: the report that stays on the model, and the short tables in which plans and reports print."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import Plan

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_ROWS = 30


@dataclass(frozen=True, eq=False)
class LoadReport:
    """What was loaded, from where, how fast, and what did not fit.

    ``mismatched`` holds (name, checkpoint shape, model shape); ``tied`` maps each tied weight to the one it shares;
    ``bytes_mapped`` were mapped without being read, ``bytes_copied`` cast or copied, ``bytes_quantized`` made into
    codes and scales of ``bytes_packed``. ``not_mapped``: why files were read where they could have been mapped.
    """

    name: str
    model_class: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    bytes_total: int = 0
    bytes_mapped: int = 0
    bytes_copied: int = 0
    bytes_quantized: int = 0
    bytes_packed: int = 0
    not_mapped: str | None = None
    seconds: float = 0.0
    device_map: dict[str, int | str] | None = None

    @property
    def gb_per_second(self) -> float:
        """Gigabytes (10^9) of checkpoint brought in per second."""
        return self.bytes_total / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def fits(self) -> bool:
        """Whether checkpoint and model had exactly the same weights."""
        return not (self.missing or self.unexpected or self.mismatched)

    def loading_info(self) -> dict[str, Any]:
        """The dict that ``output_loading_info=True`` returns: sets of names, and a list of messages."""
        return {
            "missing_keys": set(self.missing),
            "unexpected_keys": set(self.unexpected),
            "mismatched_keys": set(self.mismatched),
            "error_msgs": [],
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "name": self.name,
            "model_class": self.model_class,
            "loaded": self.loaded,
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "mismatched": [[name, list(found), list(wanted)] for name, found, wanted in self.mismatched],
            "tied": dict(self.tied),
            "ignored": list(self.ignored),
            "bytes_total": self.bytes_total,
            "bytes_mapped": self.bytes_mapped,
            "bytes_copied": self.bytes_copied,
            "bytes_quantized": self.bytes_quantized,
            "bytes_packed": self.bytes_packed,
            "not_mapped": self.not_mapped,
            "seconds": self.seconds,
            "gb_per_second": self.gb_per_second,
            "device_map": self.device_map,
        }

    def __str__(self) -> str:
        how = [f"{human(self.bytes_mapped)} mapped"] if self.bytes_mapped else []
        how += [f"{human(self.bytes_copied)} copied"] if self.bytes_copied else []
        if self.bytes_quantized:
            how.append(f"{human(self.bytes_quantized)} quantized to {human(self.bytes_packed)}")
        speed = f", {self.gb_per_second:.1f} GB/s" if self.bytes_copied or self.bytes_quantized else ""
        head = (
            f"{self.model_class} from {self.name}: {self.loaded} tensors, {human(self.bytes_total)} "
            f"({', '.join(how) or 'nothing to load'}) in {self.seconds:.3f} s{speed}"
        )
        rows = [("read, not mapped", self.not_mapped)] if self.not_mapped else []
        rows += [("tied", f"{target} = {source}") for target, source in self.tied.items()]
        rows += [("MISSING, initialised", name) for name in merge_numbers(self.missing)]
        rows += [("UNEXPECTED, left out", name) for name in merge_numbers(self.unexpected)]
        shapes = [f"{name}: {found} in the checkpoint, {wanted} here" for name, found, wanted in self.mismatched]
        rows += [("MISMATCHED, initialised", line) for line in merge_numbers(shapes)]
        return table(head, rows)


def merge_numbers(names: Iterable[str]) -> list[str]:
    """Names that differ in one number only become one line: ``layers.{0-21}.mlp.up_proj.weight``."""
    lines: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        numbers = list(_NUMBER.finditer(name))
        if not numbers:
            lines.setdefault((name,), set())
            continue
        first = numbers[0]
        lines.setdefault((name[: first.start()], name[first.end() :]), set()).add(int(first[0]))
    return [key[0] if len(key) == 1 else f"{key[0]}{_ranges(sorted(found))}{key[1]}" for key, found in lines.items()]


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[str] = []
    start = end = numbers[0]
    for number in [*numbers[1:], -1]:
        if number == end + 1:
            end = number
            continue
        parts.append(str(start) if start == end else f"{start}, {end}" if end == start + 1 else f"{start}-{end}")
        start = end = number
    return "{" + ", ".join(parts) + "}"


def table(head: str, rows: Sequence[tuple[str, str]]) -> str:
    """A heading and labelled rows, cut where they get too many."""
    width = max((len(label) for label, _ in rows), default=0)
    lines = [f"  {label:<{width}}  {text}" for label, text in rows[:_ROWS]]
    if len(rows) > _ROWS:
        lines.append(f"  and {len(rows) - _ROWS} more")
    return "\n".join([head, *lines])


def human(size: int) -> str:
    """Bytes in decimal units, as file sizes are given."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def describe_plan(plan: Plan) -> str:
    """A plan as a short table."""
    entries = sum(move.entry.nbytes for move in plan.moves)
    files = len({move.entry.file for move in plan.moves})
    head = f"{plan.model_class} from {plan.name}: {len(plan.moves)} tensors, {human(entries)} in {files} files"
    rows = [(f"on {device}", human(size)) for device, size in plan.memory_by_device().items()]
    rows += [(f"as {dtype}", human(size)) for dtype, size in plan.memory_by_dtype().items()]
    rows += [(f"to {transform}", human(size)) for transform, size in plan.bytes_by_transform().items()]
    before, after = plan.bytes_quantized()
    rows += [("quantized", f"{human(before)} to {human(after)}")] if before else []
    rows += [("tied", f"{target} = {source}") for target, source in plan.tied.items()]
    rows += [("tied if equal", f"{target} = {source}") for target, source in plan.compare.items()]
    rows += [("MISSING", name) for name in merge_numbers(plan.missing)]
    rows += [("UNEXPECTED", name) for name in merge_numbers(plan.unexpected)]
    rows += [("MISMATCHED", str(mismatch)) for mismatch in plan.mismatched]
    rows += [("ignored", name) for name in merge_numbers(plan.ignored)]
    return table(head, rows)
