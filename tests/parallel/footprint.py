"""How much memory each rank takes while it loads its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel import steps

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def peaks(rank: int, small: Path, large: Path, count: int) -> dict[str, tuple[int, int, int]]:
    """For each way of spreading: bytes added at the peak of a load, bytes held after it, bytes read."""
    told = {}
    for strategy in ("fsdp", "tp", "nf4"):
        mesh = steps.mesh("tp" if strategy == "tp" else "fsdp", (count,))
        options: dict[str, Any] = {"device_mesh": mesh, "disable_mmap": True}  # mapped pages are not always counted
        if strategy == "nf4":
            options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(small, **options)  # what is imported by the first load
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        model = AutoModelForCausalLM.from_pretrained(large, **options)
        told[strategy] = _status("VmHWM") - before, steps.held(model), model.load_report.bytes_total
        del model
    return told
