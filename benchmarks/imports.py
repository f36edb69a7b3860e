"""What importing costs beyond torch: ``from X import AutoModelForCausalLM``, and with the Llama module."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from . import harness

LLAMA = {"loadstone": "loadstone.models.llama", "transformers": "transformers.models.llama.modeling_llama"}


def measure(side: str, work: dict[str, Any]) -> dict[str, float]:
    """Seconds for the auto class, and for it and the Llama module, after torch is imported."""
    importlib.import_module("torch")
    before = set(sys.modules)
    auto, _ = harness.timed(lambda: importlib.import_module(side).AutoModelForCausalLM)
    llama, _ = harness.timed(lambda: importlib.import_module(LLAMA[side]))
    return {"auto class, s": auto, "with Llama, s": auto + llama, "modules imported": len(set(sys.modules) - before)}


def run(arguments: argparse.Namespace) -> None:
    """One row, many rounds: imports are short."""
    row = harness.race(__spec__.name, "import beyond torch", {}, rounds=max(arguments.rounds, 7))
    harness.write("imports", [row])


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run)
