"""Files cut by another program after the load: what was read does not notice, what is mapped ends the process."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import gguf_files
import pytest
import tiny
import torch

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, LoraConfig

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SIGBUS, as Linux sends it")
CHILD = """
import os, resource, sys
from pathlib import Path
import torch
from loadstone import AutoModelForCausalLM, BitsAndBytesConfig

def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3, 4]])).logits

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
root = Path(sys.argv[1])
common = {"mapped": {"disable_mmap": False}, "read": {"disable_mmap": True},
          "disk": {"disable_mmap": True, "device_map": "disk"}}[sys.argv[2]]
options = {"cast": {"dtype": "bfloat16"}, "pickled": {"use_safetensors": False}, "gguf": {"gguf_file": "model.gguf"},
           "quantized": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}}
models = {}
for name in sys.argv[3:]:
    models[name] = AutoModelForCausalLM.from_pretrained(root / name, **common, **options.get(name, {}))
before = {name: logits(model) for name, model in models.items()}
for path in root.rglob("*"):
    if path.suffix in (".safetensors", ".bin", ".gguf"):
        os.truncate(path, 10)
print("cut", flush=True)
for name, model in models.items():
    assert torch.equal(logits(model), before[name]), name
    print(name, flush=True)
"""
KINDS = ["plain", "cast", "quantized", "packed", "shards", "pickled", "adapter"]
KINDS += ["gguf"] if importlib.util.find_spec("gguf") else []


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for name in ("plain", "cast", "quantized", "base", "pickled"):
        model = tiny.checkpoint(tmp_path / name, "llama", hidden_size=64)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    config = BitsAndBytesConfig(load_in_4bit=True)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    based = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    based.add_adapter(LoraConfig(target_modules="all-linear"))
    based.save_adapter(tmp_path / "adapter")
    if "gguf" in KINDS:
        gguf_files.save(tiny.model("llama", **gguf_files.SIZES), tmp_path / "gguf" / "model.gguf")
    return tmp_path


def child(root: Path, way: str, *kinds: str) -> tuple[int, list[str], str]:
    done = subprocess.run([sys.executable, "-c", CHILD, str(root), way, *kinds], capture_output=True, text=True)
    return done.returncode, done.stdout.split(), done.stderr


def test_what_was_read_does_not_notice(checkpoints: Path) -> None:
    status, said, error = child(checkpoints, "read", *KINDS)
    assert status == 0, error
    assert said == ["cut", *KINDS]


@pytest.mark.parametrize(("way", "kind"), [("mapped", "plain"), ("mapped", "packed"), ("disk", "plain")])
def test_what_is_mapped_ends_the_process(checkpoints: Path, way: str, kind: str) -> None:
    """The check of the check, and what docs/loading.md says: on disk weights are mapped whatever is asked for."""
    status, said, _ = child(checkpoints, way, kind)
    assert said == ["cut"]
    assert status == -signal.SIGBUS
