"""Runs one save again and again, each time broken off at another step, and prints what a reader finds afterwards.

Started by test_save_atomic as ``python crash_driver.py <directory> <scenario> <kill|full>``. torch is imported once;
every attempt is a forked child that kills itself, or meets a full disk, at its k-th step on the file system.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from loadstone.loading import atomic, save, writer

EVENTS = {"open", "os.chmod", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}
EVENTS |= {"os.utime", "os.chown", "os.symlink", "shutil.rmtree"}
OLD = {name: torch.full((8,), value) for name, value in {"a": 1.0, "b": 2.0, "c": 3.0}.items()}
NEW = {name: torch.full((8,), value) for name, value in {"a": 4.0, "b": 5.0, "c": 6.0}.items()}
OLD_TEXTS = {"config.json": "old config", "generation_config.json": "old"}
NEW_TEXTS = {"config.json": "new config", "generation_config.json": "new"}
SHARD = 32  # bytes: one tensor each
SCENARIOS: dict[str, tuple[int | None, int]] = {  # shard sizes of the old and of the new checkpoint
    "shards over shards": (SHARD, SHARD),
    "shards over single": (1000, SHARD),
    "single over shards": (SHARD, 1000),
    "single over single": (1000, 1000),
    "new directory": (None, SHARD),
    "no checkpoint yet": (None, SHARD),
    "in place, more shards": (2 * SHARD, SHARD),
    "in place, to single": (SHARD, 1000),
    "in place, to shards": (1000, SHARD),
}


def read(directory: Path) -> dict[str, Any] | None:
    """The checkpoint as a reader finds it: config, then model.safetensors, else the index; None if there is none."""
    if not (directory / "config.json").exists():
        return None
    if (directory / "model.safetensors").exists():
        tensors = load_file(directory / "model.safetensors")
    else:
        weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = {name: load_file(directory / file)[name] for name, file in weight_map.items()}
    texts = {name: (directory / name).read_text() for name in OLD_TEXTS}
    return {"texts": texts, "weights": {name: tensor.tolist() for name, tensor in sorted(tensors.items())}}


def prepare(target: Path, scenario: str) -> None:
    old, _ = SCENARIOS[scenario]
    if scenario == "new directory":
        return
    (target / "sub" / "deep").mkdir(parents=True)
    for name in ("tokenizer.json", "sub/log", "sub/deep/log"):
        (target / name).write_text(name)
    if old is not None:
        save.save_checkpoint(target, OLD, texts=OLD_TEXTS, max_shard_size=old)


def new_save(target: Path, scenario: str) -> None:
    save.save_checkpoint(target, NEW, texts=NEW_TEXTS, max_shard_size=SCENARIOS[scenario][1])


def watch(root: Path, at_step: Callable[[], None]) -> None:
    """Call ``at_step`` before every operation on the file system below ``root``."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.remove", "os.rmdir") or (event in EVENTS and str(root) in str(arguments[0])):
            at_step()

    def stepped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            at_step()
            return function(*arguments)

        return call

    def pieces(*arguments: Any) -> Iterator[memoryview]:
        for piece in plain(*arguments):
            at_step()
            yield piece

    plain = writer.pieces_of
    writer.pieces_of = pieces
    os.fsync, os.fdatasync = stepped(os.fsync), stepped(os.fdatasync)
    atomic._exchange = stepped(atomic._exchange)
    sys.addaudithook(hook)


def attempt(target: Path, scenario: str, how: str, step: int) -> dict[str, Any]:
    """One save, broken off at ``step``; how it ended and what is there now."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            count = 0

            def at_step() -> None:
                nonlocal count
                count += 1
                if count == step:
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            if scenario.startswith("in place"):
                os.chdir(target)
            watch(target.parent, at_step)
            try:
                new_save(target, scenario)
                code = 0 if count < step else 1
            except OSError as error:
                code = 2 if error.errno == errno.ENOSPC else 71
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    left = [name for name in os.listdir(target.parent) if name != target.name] if target.parent.is_dir() else []
    left += [name for name in os.listdir(target) if name.startswith(".saving-")] if target.is_dir() else []
    foreign = [name for name in ("tokenizer.json", "sub/log", "sub/deep/log") if (target / name).is_file()]
    ended = "killed" if os.WIFSIGNALED(status) else {0: "finished", 1: "finished all the same", 2: "full"}
    outcome = ended if isinstance(ended, str) else ended.get(os.WEXITSTATUS(status), f"broke: {status}")
    return {"step": step, "ended": outcome, "found": read(target), "left": left, "foreign": foreign}


def main(base: Path, scenario: str, how: str) -> None:
    logging.disable(logging.WARNING)
    os.fsync = os.fdatasync = lambda descriptor: None  # steps all the same; a killed process needs no disk
    outcomes: list[dict[str, Any]] = []
    while not outcomes or outcomes[-1]["ended"] != "finished":
        root = base / f"step-{len(outcomes) + 1}"
        target = root / "model"
        root.mkdir(parents=True)
        prepare(target, scenario)
        outcomes.append(attempt(target, scenario, how, len(outcomes) + 1))
        if outcomes[-1]["ended"].startswith("broke"):
            sys.exit(f"the save itself failed: {outcomes[-1]}")
        new_save(target, scenario)
        outcomes[-1]["again"] = read(target)
        outcomes[-1]["left again"] = [name for name in os.listdir(root) if name != "model"]
        outcomes[-1]["files again"] = sorted(os.listdir(target))
        shutil.rmtree(root)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3])
