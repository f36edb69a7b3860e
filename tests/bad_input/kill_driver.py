"""Like tests/loading/crash_driver.py, for the other writers: ``loadstone quantize`` and adapters.

Started as ``python kill_driver.py <directory> <scenario> <kill|full>``; prints what was found after each attempt, a
checkpoint as the hashes of its files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch

from loadstone import LlamaForCausalLM, LoraConfig
from loadstone.loading.atomic import sync_directory
from loadstone.loading.source import resolve_source
from loadstone.models.transcode import quantize_checkpoint

_HERE = Path(__file__).resolve()
OLD, NEW = {"quant_method": "weight_only", "bits": 8}, {"quant_method": "bitsandbytes", "load_in_4bit": True}
FILES = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "quantize": ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
}


def crash_driver() -> Any:
    spec = importlib.util.spec_from_file_location("crash_driver", _HERE.parents[1] / "loading" / "crash_driver.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantize(source: Path, target: Path, config: dict[str, Any], shard: int | str) -> None:
    quantize_checkpoint(LlamaForCausalLM, resolve_source(source), target, config, max_shard_size=shard)


def adapter(target: Path, rank: int) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    torch.manual_seed(rank)
    model.add_adapter(LoraConfig(r=rank, target_modules=["q_proj"]))
    model.save_adapter(target)


def hashes(directory: Path) -> dict[str, str] | None:
    """The checkpoint's files with their hashes; None if there is none."""
    if not directory.is_dir():
        return None
    found = {path.name: path for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")}
    if not {"config.json", "adapter_config.json"} & found.keys():
        return None
    kept = {name: path for name, path in found.items() if name not in ("tokenizer.json",)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(kept.items())}


def writers(scenario: str, source: Path) -> tuple[Callable[[Path], None] | None, Callable[[Path], None]]:
    """What wrote the old checkpoint, and what writes the new one."""
    if scenario == "adapter over adapter":
        return (lambda target: adapter(target, 2)), (lambda target: adapter(target, 4))
    new = {"quantize over single": "1GB", "quantize over shards": "1GB", "quantize to shards": 20_000}
    old = {"quantize over shards": 20_000}.get(scenario, "1GB")
    first = None if scenario == "quantize anew" else lambda target: quantize(source, target, OLD, old)
    return first, lambda target: quantize(source, target, NEW, new.get(scenario, "1GB"))


def main(base: Path, scenario: str, how: str) -> None:
    crash = crash_driver()
    source = base.parent / f"{base.name}-source"
    tiny.checkpoint(source, "llama", num_hidden_layers=1)
    first, then = writers(scenario, source)

    def prepare(target: Path, _: str) -> None:
        if first is not None:
            (target / "sub" / "deep").mkdir(parents=True)
            first(target) if scenario.startswith("adapter") else _beside(first, target)
            for name in ("tokenizer.json", "sub/log", "sub/deep/log"):
                (target / name).write_text(name)
            sync_directory(target)

    crash.prepare, crash.read = prepare, hashes
    crash.new_save = lambda target, _: then(target)
    crash.main(base, scenario, how)


def _beside(first: Callable[[Path], None], target: Path) -> None:
    """A directory without a configuration is no checkpoint that may be replaced: write, then add the rest."""
    for path in sorted(target.rglob("*"), reverse=True):
        path.rmdir()
    first(target)
    (target / "sub" / "deep").mkdir(parents=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3])
