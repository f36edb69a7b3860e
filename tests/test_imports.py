"""What importing and using loadstone imports: no peer, and nothing before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
"""
OPTIONAL = ("transformers", "bitsandbytes", "accelerate", "huggingface_hub", "tqdm", "rich", "tokenizers", "gguf",
            "triton", "numpy", "tests", "kernels")  # fmt: skip


def run(code: str, tmp_path: Path, block: tuple[str, ...] = ()) -> str:
    """Standard output of a fresh interpreter, away from the repository."""
    program = BLOCK.format(names=set(block)) + code if block else code
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loads_generates_trains_and_saves_with_torch_and_safetensors_alone(tmp_path: Path) -> None:
    for kind in tiny.KINDS:
        tiny.checkpoint(tmp_path / kind, kind)
    code = f"""
import torch, loadstone
from loadstone import AutoModelForCausalLM
for kind in {tiny.KINDS!r}:
    model = AutoModelForCausalLM.from_pretrained(kind)
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, min_new_tokens=5)
    assert out.shape == (1, 8), out.shape
    model.train()
    model(out, labels=out).loss.backward()
    model.save_pretrained(kind + "-saved")
    again = AutoModelForCausalLM.from_pretrained(kind + "-saved", dtype="bfloat16")
    assert again.load_report.fits
print("done", [n for n in {OPTIONAL!r} if n in __import__("sys").modules])
"""
    assert run(code, tmp_path, block=OPTIONAL) == "done []\n"


def test_importing_costs_nothing(tmp_path: Path) -> None:
    """Not even torch: names are imported when first used."""
    code = "import sys, loadstone; print([n for n in sys.modules if n.split('.')[0] in %r])"
    assert run(code % ((*OPTIONAL, "torch", "safetensors"),), tmp_path) == "[]\n"


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_local_load_imports_one_architecture_and_nothing_optional(kind: str, tmp_path: Path) -> None:
    """Beyond torch itself, whose own imports do not count."""
    tiny.checkpoint(tmp_path / kind, kind)
    code = f"""
import sys, torch
before = set(sys.modules)
from loadstone import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({kind!r})
new = set(sys.modules) - before
optional = {OPTIONAL!r}
print(sorted(n for n in new if n.split(".")[0] in optional))
print(sorted(n for n in new if n in ("loadstone.models.gpt2", "loadstone.models.llama", "loadstone.models.mistral")))
print(sorted(n for n in new if n.startswith(("torch._dynamo", "torch._inductor", "sympy", "torch.distributed"))))
"""
    needed = {"gpt2": ["gpt2"], "llama": ["llama"], "mistral": ["llama", "mistral"]}[kind]
    assert run(code, tmp_path).splitlines() == ["[]", str([f"loadstone.models.{n}" for n in needed]), "[]"]
