"""examples/finetune.py learns, and a run that was interrupted and resumed equals one that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from examples.script import load

from loadstone import AutoModelForCausalLM
from loadstone.cli.place import DEMO
from loadstone.cli.rhymes import RHYMES

finetune = load("finetune")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "rhymes.txt"
    path.write_text("\n".join(RHYMES), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """accelerate keeps its precision for the life of the process; here several runs share one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(text: Path, out: Path, *options: str) -> None:
    finetune.main(
        ["--model", str(DEMO), "--text", str(text), "--out", str(out), "--block", "48", "--batch", "2", "--lr", "2e-3",
         "--steps", "8", "--warmup", "2", "--log-every", "2", "--eval-every", "4", "--save-every", "4",
         "--accumulate", "2", *options]
    )  # fmt: skip


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_resumed_run_is_the_unbroken_one_bit_for_bit(text: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(text, whole)
    train(text, broken, "--stop-after", "7")  # three steps beyond the last checkpoint are lost
    assert [path.name for path in finetune.checkpoints(broken)] == ["step-000004"]
    train(text, broken, "--resume")
    for name in ("model.safetensors", "config.json"):
        assert (whole / "step-000008" / name).read_bytes() == (broken / "step-000008" / name).read_bytes()
    states = [torch.load(out / "step-000008" / finetune.STATE, weights_only=True) for out in (whole, broken)]
    for left, right in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert torch.equal(states[0]["random"][0], states[1]["random"][0])
    timeless = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in log(o)] for o in (whole, broken)]
    assert timeless[0] == timeless[1]


def test_it_learns_and_its_checkpoints_are_models(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(text, out, "--keep", "1")
    losses = [row["loss"] for row in log(out) if "loss" in row]
    assert losses[-1] < losses[0]
    held = [row["held_out_loss"] for row in log(out) if "held_out_loss" in row]
    assert len(held) == 2
    assert [path.name for path in finetune.checkpoints(out)] == ["step-000008"]
    model, info = AutoModelForCausalLM.from_pretrained(out / "step-000008", output_loading_info=True)
    assert not any(info.values())
    before = AutoModelForCausalLM.from_pretrained(DEMO)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert (out / "step-000008" / "tokenizer_config.json").exists()


def test_bfloat16_and_gradient_checkpointing(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path / "out", "--bf16", "--gradient-checkpointing", "--stop-after", "4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "step-000004")
    assert model.dtype == torch.float32


def test_an_unfinished_checkpoint_is_not_resumed_from(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(text, out, "--stop-after", "4")
    (out / "step-000006").mkdir()
    assert [path.name for path in finetune.checkpoints(out)] == ["step-000004"]
    with pytest.raises(SystemExit, match="--resume"):
        train(text, out)


def test_every_block_once_an_epoch(text: Path) -> None:
    from loadstone.models.tokenizer import ByteTokenizer

    blocks = finetune.Blocks(text.read_text(), ByteTokenizer(), block=32, held_out=0.1, seed=3)
    count = len(blocks.train)
    for epoch in range(2):
        rows = torch.cat([blocks.batch(n, 1) for n in range(epoch * count, (epoch + 1) * count)])
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, blocks.train.tolist()))
    assert torch.equal(blocks.batch(1, 4), torch.cat([blocks.batch(n, 1) for n in range(4, 8)]))


def test_a_text_too_short_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(SystemExit, match="--block"):
        train(short, tmp_path / "out")
