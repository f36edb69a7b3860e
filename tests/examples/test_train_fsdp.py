"""examples/train_fsdp.py under torchrun: it resumes on other ranks; a rank that dies ends the run, not the files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loadstone import AutoModelForCausalLM
from loadstone.cli.place import DEMO
from loadstone.cli.rhymes import RHYMES

SCRIPT = Path(__file__).parents[2] / "examples" / "train_fsdp.py"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "rhymes.txt"
    path.write_text("\n".join(RHYMES), encoding="utf-8")
    return path


def start(count: int, text: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    arguments = ["--model", str(DEMO), "--text", str(text), "--out", str(out), "--block", "32", "--batch", "4"]
    arguments += ["--steps", "4", "--save-every", "2", "--lr", "2e-3", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, str(SCRIPT), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def train(count: int, text: Path, out: Path, *options: str) -> None:
    run = start(count, text, out, *options)
    printed, _ = run.communicate(timeout=240)
    assert run.returncode == 0, printed


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_resumed_on_another_number_of_ranks_it_is_the_unbroken_run(text: Path, tmp_path: Path) -> None:
    train(1, text, tmp_path / "whole")
    train(2, text, tmp_path / "broken", "--stop-after", "2")
    assert not (tmp_path / "broken" / "model").exists()
    train(2, text, tmp_path / "broken", "--resume", "--tp", "2")
    assert torch.allclose(
        torch.tensor(losses(tmp_path / "whole")), torch.tensor(losses(tmp_path / "broken")), atol=1e-4
    )
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "broken"))
    for (name, left), right in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-3), name


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_run_and_leaves_the_last_checkpoint(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = start(2, text, out, "--steps", "100000", "--save-every", "2", "--keep", "3")
    try:
        until = time.monotonic() + 120
        while not list(out.glob("step-*")) and time.monotonic() < until:
            time.sleep(0.1)
        ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        printed, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode != 0
    assert "SIGKILL" in printed or "Signal 9" in printed
    done = len(losses(out))
    last = sorted(out.glob("step-*"))[-1].name
    train(2, text, out, "--resume", "--steps", str(int(last[5:]) + 2))
    assert losses(out)[done:]
