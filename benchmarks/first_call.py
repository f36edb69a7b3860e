"""What the first call of a fused operation costs: importing, compiling, and the second call beside it.

Each measurement is a fresh process. On a GPU twice over: with an empty cache of compiled kernels, and with the one that
this leaves; nothing is searched for at run time, so a kernel is compiled once for a shape class and never tuned. On a
CPU the operations are torch's, and the row shows that nothing waits for a compiler.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import harness

OPERATIONS = (
    "flash_attention",
    "flash_attention backward",
    "rms_norm",
    "apply_rotary",
    "gated",
    "linear_cross_entropy",
)


def measure(side: str, work: dict[str, Any]) -> dict[str, float]:
    """Seconds of the import beyond torch, of the first call and of the second, in this process."""
    torch = importlib.import_module("torch")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.ones(64, 64, device=place).matmul(torch.ones(64, 64, device=place)).sum().item()  # the device's own start
    imported, kernels = harness.timed(lambda: importlib.import_module("loadstone.kernels"))
    call = _call(torch, kernels, work["operation"], place)

    def once() -> None:
        call()
        if place.type == "cuda":
            torch.cuda.synchronize()

    return {"import, s": imported, "first call, s": harness.timed(once)[0], "second call, s": harness.timed(once)[0]}


def _call(torch: Any, kernels: Any, operation: str, place: Any) -> Callable[[], Any]:
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32

    def drawn(*shape: int, grad: bool = False) -> Any:
        return torch.randn(shape, device=place, dtype=dtype, requires_grad=grad)

    if operation.startswith("flash_attention"):
        grad = operation.endswith("backward")
        inputs = drawn(1, 8, 256, 128, grad=grad), *(drawn(1, 2, 256, 128, grad=grad) for _ in range(2))
        if not grad:
            return lambda: kernels.flash_attention(*inputs, causal=True)
        output = kernels.flash_attention(*inputs, causal=True)
        return lambda: torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    if operation == "rms_norm":
        hidden, weight = drawn(256, 2048), drawn(2048)
        return lambda: kernels.rms_norm(hidden, weight, 1e-6)
    if operation == "apply_rotary":
        query, key = drawn(1, 8, 256, 128), drawn(1, 2, 256, 128)
        cos, sin = drawn(1, 1, 256, 128), drawn(1, 1, 256, 128)
        return lambda: kernels.apply_rotary(query, key, cos, sin)
    if operation == "gated":
        gate, up = drawn(256, 5632), drawn(256, 5632)
        return lambda: kernels.gated("silu", gate, up)
    hidden, weight = drawn(1, 256, 256, grad=True), drawn(32000, 256, grad=True)
    labels = torch.randint(0, 32000, (1, 256), device=place)
    return lambda: kernels.linear_cross_entropy(hidden, weight, labels).backward()


def run(arguments: argparse.Namespace) -> None:
    """A row for each operation; on a GPU one with an empty cache and one with what that left."""
    from . import side_by_side

    place = side_by_side.device()
    rows: list[dict[str, Any]] = []
    rounds = 1 if arguments.quick else arguments.rounds
    for operation in OPERATIONS[2:3] if arguments.quick else OPERATIONS:
        if arguments.only in operation:
            rows += _rows(operation, rounds, place.type == "cuda")
    name = side_by_side.result_name("first_call", place)
    about = side_by_side.about(place, {}, {})
    harness.write(name, rows, merge=bool(arguments.only), about=about, chart=lambda path, rows: None)


def _rows(operation: str, rounds: int, on_gpu: bool) -> list[dict[str, Any]]:
    seen: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="loadstone-bench-") as cache:
            for state in ("empty cache", "warm cache") if on_gpu else ("torch",):
                seen.setdefault(state, []).append(_child(operation, Path(cache)))
    rows = []
    for state, figures in seen.items():
        row: dict[str, Any] = {"row": f"{operation}, {state}", "rounds": rounds}
        row |= {"commit": harness.commit(), "date": harness.now()}
        for figure in figures[0]:
            values = sorted(each[figure] for each in figures)
            row[figure] = {"loadstone": statistics.median(values), "spread": [values[0], values[-1]]}
        told = ", ".join(f"{figure} {row[figure]['loadstone']:.4f}" for figure in figures[0])
        print(f"{row['row']}: {told}", flush=True)
        rows.append(row)
    return rows


def _child(operation: str, cache: Path) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--child", "loadstone", json.dumps({"operation": operation})]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, cwd=harness.ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the first call of {operation} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def options(parser: argparse.ArgumentParser) -> None:
    """More of the command line."""
    parser.add_argument("--quick", action="store_true", help="one operation, one round: a test of the script")


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run, peer=None, options=options)
