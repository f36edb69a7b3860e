"""The examples of docs/device_maps.md run, one after the other, on a small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from simulated import accelerator

DOCUMENT = Path(__file__).parents[2] / "docs" / "device_maps.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.checkpoint(tmp_path / "my-model", "llama", num_hidden_layers=4)
    monkeypatch.chdir(tmp_path)
    assert accelerator.COUNT > 1
    names: dict[str, Any] = {"ids": torch.arange(12).view(1, 12)}
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    trained = [name for name, parameter in names["model"].named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    assert (tmp_path / "saved" / "model.safetensors").exists()
