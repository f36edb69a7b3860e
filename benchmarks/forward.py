"""Computing against transformers on the CPU: prefill, greedy decode and a training step of SmolLM2-135M in fp32.

Each side runs in a fresh process, warms up once, and reports the median of its repetitions and the peak of its
private memory; sides alternate over the rounds.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from typing import Any

from . import harness, works

ROWS: list[tuple[str, dict[str, Any]]] = [
    ("prefill 512, sdpa", {"what": "prefill", "attn": "sdpa", "repeat": 5}),
    ("prefill 512, eager", {"what": "prefill", "attn": "eager", "repeat": 5}),
    ("prefill 4 x 128, padded, sdpa", {"what": "padded", "attn": "sdpa", "repeat": 5}),
    ("greedy decode 128 tokens", {"what": "decode", "attn": "sdpa", "repeat": 2}),
    ("beam search, 4 beams, 48 tokens", {"what": "beams", "attn": "sdpa", "repeat": 1}),
    ("training step 2 x 256, sdpa", {"what": "train", "attn": "sdpa", "repeat": 3}),
    ("training step 2 x 256, checkpointed", {"what": "train", "attn": "sdpa", "repeat": 3, "checkpointing": True}),
]


def measure(side: str, work: dict[str, Any]) -> dict[str, float]:
    """Median seconds of one repetition, and peak private memory beyond the loaded model's."""
    torch = importlib.import_module("torch")
    importlib.import_module("logging").disable(importlib.import_module("logging").WARNING)
    auto = importlib.import_module(side).AutoModelForCausalLM
    model = auto.from_pretrained(work["path"], dtype=torch.float32, attn_implementation=work["attn"])
    step = _step(torch, model, work)
    with harness.PrivateMemory() as memory:
        step()
        times = [harness.timed(step)[0] for _ in range(work["repeat"])]
    return {"seconds": statistics.median(times), "private memory, MB": memory.peak}


def _step(torch: Any, model: Any, work: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    what = work["what"]
    if what == "train":
        if work.get("checkpointing"):
            model.gradient_checkpointing_enable()
        return _training_step(torch, model)
    shape = {"prefill": (1, 512), "padded": (4, 128), "decode": (1, 32), "beams": (1, 32)}[what]
    ids = torch.randint(0, 40000, shape)
    mask = torch.ones_like(ids)
    if what == "padded":
        for row in range(4):
            mask[row, : 16 * row] = 0
    new = {"decode": 128, "beams": 48}.get(what)
    if new is None:
        return lambda: _no_grad(torch, lambda: model(ids, attention_mask=mask if what == "padded" else None))
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(
        ids, attention_mask=mask, num_beams=4 if what == "beams" else 1, eos_token_id=None, **options
    )


def _training_step(torch: Any, model: Any) -> Any:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, 40000, (2, 256))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _no_grad(torch: Any, function: Any) -> Any:
    with torch.no_grad():
        return function()


def run(arguments: argparse.Namespace) -> None:
    """All rows."""
    rows = []
    path = str(works.path_of("smollm2"))
    for name, work in ROWS:
        if arguments.only in name:
            rows.append(harness.race(__spec__.name, name, {**work, "path": path}, rounds=arguments.rounds, uncounted=0))
            rows[-1]["work"].pop("path")
    harness.write("forward", rows, merge=bool(arguments.only))


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run)
