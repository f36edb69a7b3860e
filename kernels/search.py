"""The search behind `loadstone tune`: from the sizes in use, step by step, to the fastest that compute the same.

A step halves or doubles one block size or the number of warps, or takes one stage more or less; of all steps the best
is taken, until none helps. What does not compile, needs more shared memory than the GPU has, or computes something
else is named and passed over. The winner is timed against the sizes in use once more before it is kept.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError, LoadstoneError, nearest
from . import support, timing, tuning
from .search_calls import Call, call_of
from .tuning import Blocks

Timer = Callable[[Callable[[], Any]], float]
"""Seconds that a call takes."""

COMMON = ("d64-16", "d128-16", "h2048", "h4096", "h8192", "any", "row")
"""Classes of shapes that are searched unless others are asked for."""

# BLOCK_M and BLOCK_N are sides of matrix products, whose least is 16; other blocks may be a single row.
_LIMITS = {"num_warps": (1, 16), "num_stages": (1, 5), "BLOCK_M": (16, 256), "BLOCK_N": (16, 256)}
_OTHER_LIMITS = (1, 1 << 15)
_GAIN = 0.98  # less of a difference is noise
_ROUNDS = 6
_TOLERANCE = 0.02  # relative, of a whole tensor: other block sizes only change the order of sums


@dataclass(frozen=True)
class Attempt:
    """Sizes that were tried: the seconds they took, or why they failed."""

    sizes: dict[str, int]
    seconds: float = math.inf
    failed: str | None = None


@dataclass(frozen=True)
class Found:
    """What the search for a kernel and a class of shapes ended with; ``seconds`` are inf where nothing ran."""

    kernel: str
    shape_class: str
    before: Attempt
    after: Attempt
    attempts: tuple[Attempt, ...] = field(repr=False)

    @property
    def improved(self) -> bool:
        """Whether the sizes found are faster than those in use."""
        return self.after.seconds < _GAIN * self.before.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON; seconds that are not finite are None."""
        return {
            "kernel": self.kernel,
            "shape_class": self.shape_class,
            "improved": self.improved,
            "before": _described(self.before),
            "after": _described(self.after),
            "attempts": [_described(attempt) for attempt in self.attempts],
        }


def _described(attempt: Attempt) -> dict[str, Any]:
    seconds = attempt.seconds if math.isfinite(attempt.seconds) else None
    return {"sizes": attempt.sizes, "seconds": seconds, "failed": attempt.failed}


def gpu_to_tune(index: int | None = None) -> torch.device:
    """The GPU of that number, by default the current one. Raises KernelError if kernels do not run on it."""
    if support.interpreting():
        raise KernelError("there is nothing to tune in Triton's interpreter; unset TRITON_INTERPRET")
    if (reason := support.no_gpu_at_all()) is not None:
        raise KernelError(f"block sizes are tuned on the GPU that will use them: {reason}")
    if index is not None and index >= torch.cuda.device_count():
        raise KernelError(f"there is no GPU {index}; torch sees {torch.cuda.device_count()}")
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    if (reason := support.why_not(device)) is not None:
        raise KernelError(f"block sizes are tuned on the GPU that will use them: {reason}")
    return device


def gpu_timer(device: torch.device) -> Timer:
    """Median of 20 calls, caches emptied before each."""
    return lambda call: statistics.median(timing.times(call, device, 20))


def selection(
    device: torch.device, kernels: Iterable[str] = (), shape_classes: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """(kernel, class of shapes) to search. kernels: all by default. shape_classes: `COMMON` by default, or what there
    is if a kernel has none of them; "all" for all. Raises KernelError for names that the tables do not have."""
    table = tuning.shipped_table(tuning.generation(device))
    kernels, wanted = list(kernels) or sorted(table), set(shape_classes)
    for kernel in kernels:
        if kernel not in table:
            raise KernelError(f"unknown kernel {kernel!r}{nearest(kernel, table)} kernels: {', '.join(sorted(table))}")
    there = {name for kernel in kernels for name in table[kernel]}
    for name in sorted(wanted - there - {"all"}):
        raise KernelError(
            f"unknown shape class {name!r}{nearest(name, there)} of {', '.join(kernels)}: {', '.join(sorted(there))}"
        )
    chosen = []
    for kernel in kernels:
        row = table[kernel]
        usual = [name for name in row if name in COMMON] or list(row)
        classes = row if "all" in wanted else [name for name in row if name in wanted] if wanted else usual
        chosen += [(kernel, name) for name in classes]
    return chosen


def tune(
    device: torch.device,
    chosen: Iterable[tuple[str, str]],
    *,
    timer: Timer,
    quick: bool = False,
    keep: bool = True,
    calls: Callable[[str, str, torch.device], Call] = call_of,
) -> Iterator[Found]:
    """Search for each (kernel, class of shapes) in turn, and keep each improvement as soon as it is complete.

    timer: how calls are timed, on a GPU `gpu_timer`. quick: one step from the sizes in use. keep: False searches only.
    Raises KernelError if the tuned file of this kind of GPU is malformed.
    """
    for kernel, shape_class in chosen:
        found = search(kernel, shape_class, device, calls(kernel, shape_class, device), timer, 1 if quick else _ROUNDS)
        if keep and found.improved:
            _keep(device, found)
        yield found


def search(
    kernel: str, shape_class: str, device: torch.device, call: Call, timer: Timer, rounds: int = _ROUNDS
) -> Found:
    """The fastest sizes within ``rounds`` steps of those in use."""
    before = dict(tuning.blocks(kernel, shape_class, device))
    trial = _Trial(kernel, shape_class, call, timer)
    best = first = trial.attempt(before)
    for _ in range(rounds):
        leader = min((trial.attempt(sizes) for sizes in steps(best.sizes, call.most)), key=lambda each: each.seconds)
        if not leader.seconds < _GAIN * best.seconds:
            break
        best = leader
    if best is not first:  # the winner of many is partly lucky: both once more
        first, best = trial.again(first), trial.again(best)
    if not best.seconds < first.seconds:
        best = first
    return Found(kernel, shape_class, first, best, tuple(trial.seen.values()))


def steps(sizes: Blocks, most: Blocks) -> Iterator[dict[str, int]]:
    """Sizes one step away: one of them changed, or a block size and the warps together."""
    for name, value in sizes.items():
        for other in (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2):
            if not _within(name, other, most):
                continue
            yield {**sizes, name: other}
            warps = sizes["num_warps"] * other // value
            if name.startswith("BLOCK") and _within("num_warps", warps, most):
                yield {**sizes, name: other, "num_warps": warps}


def _within(name: str, value: int, most: Blocks) -> bool:
    low, high = _LIMITS.get(name, _OTHER_LIMITS)
    return low <= value <= min(high, most.get(name, high))


class _Trial:
    """Tries sizes for one kernel, each once, and remembers what came of it."""

    def __init__(self, kernel: str, shape_class: str, call: Call, timer: Timer) -> None:
        self.kernel, self.shape_class, self.call, self.timer = kernel, shape_class, call, timer
        self.seen: dict[tuple[tuple[str, int], ...], Attempt] = {}
        self.expected: tuple[Tensor, ...] | None = None

    def attempt(self, sizes: dict[str, int]) -> Attempt:
        key = tuple(sorted(sizes.items()))
        if key not in self.seen:
            self.seen[key] = self._attempt(sizes)
        return self.seen[key]

    def again(self, attempt: Attempt) -> Attempt:
        return attempt if attempt.failed else self._attempt(attempt.sizes)

    def _attempt(self, sizes: dict[str, int]) -> Attempt:
        with tuning.trying(self.kernel, self.shape_class, sizes):
            try:
                result = self.call.run()
                if self.expected is None:
                    self.expected = result
                elif (wrong := _difference(result, self.expected)) is not None:
                    return Attempt(sizes, failed=wrong)
                return Attempt(sizes, self.timer(self.call.run))
            except LoadstoneError:
                raise
            except Exception as error:  # Triton raises what its compiler, its driver and torch raise
                return Attempt(sizes, failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _difference(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """What tells two results apart beyond rounding, None if nothing does."""
    for place, (one, other) in enumerate(zip(result, expected, strict=True)):
        off = float(torch.linalg.vector_norm(one.float() - other.float()))
        size = float(torch.linalg.vector_norm(other.float()))
        if not off <= _TOLERANCE * size:
            return f"computes something else: result {place} is off by {off:.3g} of {size:.3g}"
    return None


def _keep(device: torch.device, found: Found) -> None:
    name = tuning.device_name(device)
    if name is None:
        raise KernelError(f"block sizes are kept for GPUs, not for {device}")
    tuning.tuned_table.cache_clear()  # another search may have written since
    table = {kernel: dict(row) for kernel, row in tuning.tuned_table(name).items()}
    table.setdefault(found.kernel, {})[found.shape_class] = found.after.sizes
    tuning.keep_tuned(name, table, _about())


def _about() -> dict[str, Any]:
    versions = {}
    for package in ("loadstone", "torch", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {"versions": versions, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
