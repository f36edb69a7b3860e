"""examples/qlora.py trains an adapter over a 4-bit base, says what it saves, and what it wrote is an adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from examples.script import load
from loadstone import AutoModelForCausalLM
from loadstone.cli.rhymes import RHYMES

qlora = load("qlora")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "rhymes.txt"
    path.write_text("\n".join(RHYMES), encoding="utf-8")
    return path


def run(text: Path, out: Path, *options: str) -> None:
    qlora.main(["--text", str(text), "--out", str(out), "--block", "48", "--batch", "2", "--steps", "12", *options])


def test_it_prints_memory_trains_and_saves(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(text, tmp_path / "out")
    said = capsys.readouterr().out
    memory = re.search(r"memory of the model: ([\d.]+) MiB as float32, ([\d.]+) MiB in 4 bits", said)
    assert memory is not None
    assert float(memory[2]) < float(memory[1]) / 3
    trained = re.search(r"trained: ([\d,]+) of ([\d,]+) parameters", said)
    assert trained is not None
    assert int(trained[1].replace(",", "")) < int(trained[2].replace(",", "")) / 5
    losses = re.search(r"loss ([\d.]+) before, ([\d.]+) after, ([\d.]+) loaded back", said)
    assert losses is not None
    assert float(losses[2]) < float(losses[1]) - 0.05
    assert losses[2] == losses[3]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # the base in full precision this time
    assert model.active_adapters() == ["default"]


def test_two_runs_are_equal_bit_for_bit_and_checkpointing_is_none_of_the_adapters_business(
    text: Path, tmp_path: Path
) -> None:
    for name, options in (("a", ()), ("b", ()), ("c", ("--gradient-checkpointing",))):
        run(text, tmp_path / name, "--steps", "3", *options)
    first, second, third = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert first == second == third


def test_dropout_and_bfloat16(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "out", "--steps", "2", "--dropout", "0.2", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.adapters["default"].lora_dropout == 0.2


def test_a_text_too_short_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(SystemExit, match="--block"):
        run(short, tmp_path / "out")
