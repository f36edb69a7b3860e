"""A rank that dies is an error on the others within a bounded time, and the last checkpoint is whole."""

from __future__ import annotations

from pathlib import Path

import torch
from parallel import moments, ranks

from loadstone import AutoModelForCausalLM

BOUND = 20.0  # seconds for which ranks wait for each other in these tests


def test_killed_in_a_step(places: dict[str, Path], tmp_path: Path) -> None:
    survivor, dead = ranks.run(moments.killed, 2, places["llama"], tmp_path / "out", timeout=BOUND)
    assert dead is None
    assert isinstance(survivor, ranks.Raised)
    assert survivor.startswith(("RuntimeError", "DistBackendError", "ParallelError"))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    before = AutoModelForCausalLM.from_pretrained(places["llama"])
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_killed_while_saving(places: dict[str, Path], tmp_path: Path) -> None:
    survivor, dead = ranks.run(moments.killed_while_saving, 2, places["llama"], tmp_path / "out", timeout=BOUND)
    assert dead is None
    assert isinstance(survivor, ranks.Raised)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(places["llama"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_killed_before_loading(places: dict[str, Path]) -> None:
    survivor, dead = ranks.run(moments.killed_before_loading, 2, places["llama"], timeout=BOUND)
    assert dead is None
    assert survivor.startswith("ParallelError")
    assert "killed" in survivor
