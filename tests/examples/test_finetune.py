"""examples/finetune.py learns, and a run that was interrupted and resumed equals one that was not."""

from __future__ import annotations

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from examples.script import load
from loadstone import AutoModelForCausalLM
from loadstone.cli.place import DEMO
from loadstone.cli.rhymes import RHYMES

finetune = load("finetune")
watch = load("watch")
OF_THE_MACHINE = ("tokens_per_second", "tflops", "mfu", "memory_mb")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rhymes.txt"
    path.write_text("\n".join(RHYMES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(text, out)
    return out


def train(text: Path, out: Path, *options: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # which keeps its precision for the life of the process
    GradientState._reset_state()
    finetune.main(
        ["--model", str(DEMO), "--text", str(text), "--out", str(out), "--block", "48", "--batch", "2", "--lr", "2e-3",
         "--steps", "8", "--warmup", "2", "--log-every", "2", "--eval-every", "4", "--save-every", "4",
         "--accumulate", "2", *options]
    )  # fmt: skip


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict[str, float]]:
    return [{name: v for name, v in row.items() if name not in OF_THE_MACHINE} for row in log(out)]


def test_resumed_run_is_the_unbroken_one_bit_for_bit(text: Path, whole: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    train(text, broken, "--stop-after", "7")  # three steps beyond the last checkpoint are lost
    assert [path.name for path in finetune.checkpoints(broken)] == ["step-000004"]
    train(text, broken, "--resume")
    for name in ("model.safetensors", "config.json"):
        assert (whole / "step-000008" / name).read_bytes() == (broken / "step-000008" / name).read_bytes()
    states = [torch.load(out / "step-000008" / finetune.STATE, weights_only=True) for out in (whole, broken)]
    for left, right in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert torch.equal(states[0]["random"][0], states[1]["random"][0])
    assert timeless(whole) == timeless(broken)


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


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_after_the_step_and_resuming_is_unbroken(
    name: str, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    step = finetune.train_step

    def interrupted(*arguments: Any) -> float:
        if arguments[3] == 4:
            os.kill(os.getpid(), getattr(signal, name))
        return step(*arguments)

    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train_step", interrupted)
        with pytest.raises(SystemExit, match="after step 5 of 8"):
            train(text, broken)
    assert signal.getsignal(getattr(signal, name)) is before
    assert [path.name for path in finetune.checkpoints(broken)][-1] == "step-000005"
    if name == "SIGTERM":
        return
    train(text, broken, "--resume")
    assert timeless(whole) == timeless(broken)
    weights = [(out / "step-000008" / "model.safetensors").read_bytes() for out in (whole, broken)]
    assert weights[0] == weights[1]


def test_what_is_to_be_seen(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    train(text, out, "--peak-tflops", "0.5")
    rows = [row for row in log(out) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    for row in rows:
        assert row["tflops"] == pytest.approx(row["tokens_per_second"] * watch.operations_a_token(model, 48) / 1e12)
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5)
        assert row["memory_mb"] > 10
    told = capsys.readouterr().out
    assert "tokens_per_second" in told
    assert "held_out_loss" in told
    if find_spec("matplotlib") is not None:
        assert (out / "log.png").stat().st_size > 1000
    if find_spec("tensorboard") is not None:
        assert list((out / "tensorboard").iterdir())


def test_operations_are_those_of_the_products() -> None:
    """6 a number of every matrix that multiplies, the tied head too, and attention's."""
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_pretrained(DEMO, attn_implementation="eager").train()
    length = 64
    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros(1, length, dtype=torch.long)
        model(ids, labels=ids, skip_logits=False, use_cache=False).loss.backward()
    attention = 6 * 4 * 160 * length * length  # of which the counter counts both halves
    assert counter.get_total_flops() == pytest.approx(
        length * watch.operations_a_token(model, length) + attention, rel=0.02
    )


def test_lines_of_a_broken_run_are_cut(tmp_path: Path) -> None:
    lines = ['{"step": 2, "loss": 1.0}', '{"step": 4, "loss": 0.5}', '{"step": 6, "lo']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    log_of = watch.Watch(tmp_path, 4, 8, 1, 1.0, None)
    log_of.log(5, loss=0.25)
    log_of.close()
    assert [row["step"] for row in log(tmp_path)] == [2, 4, 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "find_spec", lambda name: None)
        assert watch.plot(tmp_path) is None
