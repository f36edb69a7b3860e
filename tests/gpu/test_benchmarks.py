"""The benchmarks and the search on a GPU: each runs, agrees with its peers, and says what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loadstone.kernels import search, tuning

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("attention", ("--only", "2048", "--peers", "sdpa")),
        ("attention", ("--only", "decode", "--peers", "sdpa")),
        ("ops", ()),
        ("training_step", ()),
        ("first_call", ()),
        ("quantization", ()),
        ("qlora", ()),
    ],
)
def test_quick_runs(name: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", *arguments],
        cwd=ROOT, env={**os.environ, "LOADSTONE_BENCH_RESULTS": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(tmp_path.glob(f"{name}_*.json")).read_text())
    assert result["gpu"]["name"] == torch.cuda.get_device_name()
    assert result["rows"]
    figures = {"seconds", "first call, s", "load, s", "seconds a step"}
    assert any(figures & set(row) for row in result["rows"])
    assert all("failed" not in row for row in result["rows"] if name in ("quantization", "qlora"))
    if name == "quantization":
        assert all(row["decode in a CUDA graph, tokens/s"] for row in result["rows"] if row["work"]["bits"] == 4)


def test_quick_run_of_the_ways_of_loading(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading_paths", "--quick", "--rounds", "1", "--only", "fp32"],
        cwd=ROOT, env={**os.environ, "LOADSTONE_BENCH_RESULTS": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(tmp_path.glob("loading_paths_*.json")).read_text())
    assert result["gpu"]["name"] == torch.cuda.get_device_name()
    targets = result["rows"][-1]["targets"]
    for way in ("GPU", "GPU, cast", "cold, GPU"):
        assert targets[f"{way}, times the limit"]["found"] > 0
        assert all(row[f"{way}, MB on the device"]["loadstone"] > 0 for row in result["rows"])


@pytest.mark.parametrize("kernel", ["flash_forward", "flash_backward_keys", "flash_decode", "norm_forward", "gate"])
def test_a_search_ends_with_sizes_that_run(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADSTONE_CACHE", str(tmp_path))
    tuning.tuned_table.cache_clear()
    tuning._blocks.cache_clear()
    device = search.gpu_to_tune()
    chosen = search.selection(device, [kernel])[:1]
    try:
        found = next(search.tune(device, chosen, timer=search.gpu_timer(device), quick=True))
        assert found.before.failed is None
        assert found.after.seconds <= found.before.seconds
        wrong = [attempt.failed for attempt in found.attempts if "something else" in (attempt.failed or "")]
        assert not wrong
        assert dict(tuning.blocks(*chosen[0], device)) == (found.after if found.improved else found.before).sizes
    finally:
        monkeypatch.undo()
        tuning.tuned_table.cache_clear()
        tuning._blocks.cache_clear()
