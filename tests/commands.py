"""What the tests of commands that write checkpoints ask of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def refused(run: Any, says: str, *arguments: Any) -> None:
    status, _, error = run(*arguments)
    assert status == 2, error
    assert says in error, error
