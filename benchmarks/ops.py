"""Each fused operation against the same written out, torch.compile of that, and Liger-Kernel: time and peak memory.

On a GPU, bf16, all sides in one process: norms of 16k tokens of 4096, rotary of 4 x 4096 tokens with 32/8 heads of 128,
gates of 14336, the loss of 16k tokens of 4096 over a vocabulary of 128256. Fractions are of a large copy measured in
the same run, for the bytes that must move at least. Without a GPU, fp32 and smaller, torch's implementations race, each
side in fresh processes, with the peak of private memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
from collections.abc import Callable
from importlib import util
from typing import Any

import torch
from torch import Tensor

from . import harness, side_by_side
from .ops_cases import BY_NAME, OPERATIONS, Function, Operation, Place, sides

MODES = ("forward", "forward and backward")


def call_of(function: Function, mode: str, differentiable: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> Any:
    """What is timed: the call without, or with, the gradients of all differentiable inputs."""
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*differentiable, *others)

        return forward
    grads: list[Tensor] = []

    def both() -> tuple[Tensor, ...]:
        outputs = _tuple(function(*differentiable, *others))
        if not grads:
            grads.extend(torch.ones_like(output) for output in outputs)
        return torch.autograd.grad(outputs, differentiable, grads)

    return both


def race_on_gpu(
    operation: Operation, mode: str, place: torch.device, rounds: int, copy: float, quick: bool
) -> list[Any]:
    """All sides in this process."""
    torch._dynamo.reset()
    side_by_side.forget(place)
    differentiable, others = operation.inputs(Place(place, quick))
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, tuple[Tensor, ...]] = {}
    failed: dict[str, str] = {}
    for name, make in sides(operation, True).items():
        try:
            calls[name] = call_of(make(), mode, differentiable, others)
            results[name] = _tuple(calls[name]())
        except Exception as error:  # torch, its compiler and other packages raise what they like
            failed[name] = side_by_side.reason(error)
    side_by_side.refuse_wrong(results, failed, "eager")
    results.clear()
    calls = {name: call for name, call in calls.items() if name not in failed}
    memory = {name: {"memory, MB": _peak(call, place)} for name, call in calls.items()}
    seen = side_by_side.race(calls, place, rounds)
    moved = operation.moved(differentiable, mode != "forward")

    def derive(seconds: float) -> dict[str, float]:
        return {"GB/s": moved / seconds / 1e9, "of a copy": moved / seconds / copy} if moved else {}

    work = {"shapes": [list(tensor.shape) for tensor in (*differentiable, *others)], "mode": mode}
    return side_by_side.rows(f"{operation.name}, {mode}", work, seen, failed, derive, memory)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _peak(call: Callable[[], Any], place: torch.device) -> float:
    """Most memory that a call takes beyond what it was given, MB."""
    torch.cuda.synchronize(place)
    torch.cuda.reset_peak_memory_stats(place)
    before = torch.cuda.memory_allocated(place)
    call()
    torch.cuda.synchronize(place)
    return (torch.cuda.max_memory_allocated(place) - before) / 1e6


def measure(side: str, work: dict[str, Any]) -> dict[str, float]:
    """In a process of its own, on the CPU: seconds of both modes, and private memory beyond the inputs'."""
    operation = BY_NAME[work["operation"]]
    place = Place(torch.device("cpu"), work["quick"])
    torch.manual_seed(0)
    differentiable, others = operation.inputs(place)
    function = sides(operation, False)[side]()
    calls = {mode: call_of(function, mode, differentiable, others) for mode in MODES}
    for call in calls.values():
        call()
        call()
    figures = {}
    for mode, call in calls.items():
        first = harness.timed(call)[0]
        count = max(1, min(50, int(work["seconds"] / max(first, 1e-6))))
        figures[f"{mode}, s"] = statistics.median(harness.timed(call)[0] for _ in range(count))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free and kept would hide what the call takes
    with harness.PrivateMemory() as memory:
        before = memory.now()
        for _ in range(max(1, min(20, int(work["seconds"] / figures[f"{MODES[1]}, s"])))):
            calls[MODES[1]]()
    figures["private memory, MB"] = memory.peak - before
    return figures


def race_on_cpu(operation: Operation, rounds: int, quick: bool, copy: float) -> list[dict[str, Any]]:
    """All sides in fresh processes."""
    work = {"operation": operation.name, "quick": quick, "seconds": 0.05 if quick else 1.0}
    names = list(sides(operation, False))[: 2 if quick else None]  # the compiler takes its time
    rows = harness.race_all(
        __spec__.name, operation.name, work, rounds=rounds, sides=names, uncounted=0 if quick else 1
    )
    differentiable, _ = operation.inputs(Place(torch.device("cpu"), quick))
    for row in rows:
        for mode in MODES if operation.forward else ():
            moved = operation.moved(differentiable, mode != "forward")
            row[f"{mode}, of a copy"] = {
                side: moved / row[f"{mode}, s"][side] / copy for side in ("loadstone", row["peer"])
            }
    return rows


def run(arguments: argparse.Namespace) -> None:
    """All rows; exits with 1 if ours failed anywhere."""
    place = side_by_side.device()
    ceiling = side_by_side.ceilings(place, arguments.quick)
    copy = ceiling["copy, B/s"]
    print(f"a copy reads and writes {copy / 1e9:.4g} GB/s", flush=True)
    rounds = 1 if arguments.quick else arguments.rounds
    rows: list[dict[str, Any]] = []
    for operation in OPERATIONS:
        if place.type == "cpu":
            if arguments.only in operation.name:
                rows += race_on_cpu(operation, rounds, arguments.quick, copy)
            continue
        for mode in MODES:
            if arguments.only in f"{operation.name}, {mode}":
                rows += race_on_gpu(operation, mode, place, rounds, copy, arguments.quick)
    there = util.find_spec("liger_kernel") is not None
    missing = {} if there or place.type == "cpu" else {"liger": "liger-kernel is not installed"}
    for name, why in missing.items():
        print(f"not raced: {name}, {why}")
    harness.write(
        side_by_side.result_name("ops", place),
        rows,
        merge=bool(arguments.only),
        about=side_by_side.about(place, ceiling, missing),
    )
    side_by_side.exit_if_ours_failed(rows)


def options(parser: argparse.ArgumentParser) -> None:
    """More of the command line."""
    parser.add_argument("--quick", action="store_true", help="small tensors, one round: a test of the script")


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run, peer=None, options=options)
