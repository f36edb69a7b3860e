"""Repositories whose own code makes the model, for the tests of trust_remote_code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save

from loadstone.registry.remote_package import PREFIX

MODEL_TYPE = "tiny-remote"
AUTO_MAP = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
CONFIGURATION = """
from typing import ClassVar
from loadstone import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type: ClassVar[str] = "tiny-remote"
    flavour: str = "plain"
"""
MODELING = """
from loadstone import LlamaForCausalLM
from .configuration_tiny import TinyConfig
from .parts.scale import SCALE

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
    scale = SCALE

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.scale
        return output
"""
CODE = {
    "configuration_tiny.py": CONFIGURATION,
    "modeling_tiny.py": MODELING,
    "parts/scale.py": "from ..constants import BASE\nfrom . import more\nSCALE = BASE * more.FACTOR\n",
    "parts/more.py": "FACTOR = 3\n",
    "constants.py": "BASE = 2.0\n",
}


def files(seed: int = 0, auto_map: Any = AUTO_MAP, code: dict[str, str] = CODE, **values: Any) -> dict[str, bytes]:
    """A whole repository: weights of a small Llama, config.json and code."""
    sizes = {name: value for name, value in values.items() if name == "vocab_size"}
    tensors = {name: tensor.clone() for name, tensor in tiny.model("llama", seed, **sizes).state_dict().items()}
    config = {**tiny.values("llama"), "model_type": MODEL_TYPE, "auto_map": auto_map, **values}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
        **{name: text.encode() for name, text in code.items()},
    }


def write(directory: Path, seed: int = 0, **options: Any) -> Path:
    """`files` in a directory."""
    for name, content in files(seed, **options).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def loaded() -> list[str]:
    """The modules of repositories' code in this process."""
    return sorted(name for name in sys.modules if name.startswith(PREFIX))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3, 4]])).logits
