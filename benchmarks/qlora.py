"""QLoRA training steps against transformers with bitsandbytes and PEFT: time, tokens/s, memory, and the losses.

NF4 with double quantization, products in bf16, LoRA of rank 8 on all projections of attention and MLP, AdamW; ours with
`loadstone.LoraConfig` and ``add_adapter``, as in ``examples/qlora.py``. Both sides begin with the same adapter, drawn
here, and are fed the same tokens, so the curves of their losses lie on each other; a race whose curves do not is no
race, and ends with status 1. The tokens are this repository's LICENSE: its words where the model has a tokenizer, its
bytes where the weights are random. Each side runs in fresh processes that take turns. Memory is what the work takes
beyond the imports: private memory on a CPU, that of torch's tensors on a GPU; the base's weights are part of it, the
peak of loading them is not (`python -m benchmarks.quantization` has that).

PEFT's ``prepare_model_for_kbit_training`` is left out: it would cast embedding, head and norms of the peer to fp32 and
recompute activations, for more memory and time than ours.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from . import harness, quantization, works

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS}
BASE = {"bits": 4, "options": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
MODELS = {  # model: its directory's name, its name for people, and (batch, length) on each device
    "tiny": ("llama_tiny", "tiny Llama", {"cpu": (2, 32), "cuda": (2, 32)}),
    "small": ("llama_small", "small Llama", {"cpu": (4, 256), "cuda": (16, 512)}),
    "smollm2": ("smollm2", "SmolLM2-135M", {"cpu": (2, 256), "cuda": (8, 512)}),
    "llama1b": ("llama1b", "1B Llama", {"cpu": (1, 256), "cuda": (4, 1024)}),
    "llama8b": ("llama8b", "8B Llama", {"cpu": (1, 64), "cuda": (1, 2048)}),
}
DEFAULT = {"cpu": ("small", "smollm2"), "cuda": ("llama1b",)}
RATE = 1e-3
_PEERS = ("transformers", "bitsandbytes", "peft")
_ROUNDING = 0.03  # of a loss, between two implementations in bf16


def measure(side: str, work: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a step after the first, the first's, the peak of memory, and all losses, in this process."""
    torch = imported(side)
    device = work["device"]
    before = harness.memory_on(device).now()
    model = adapted(side, work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=device == "cuda")

    def step(tokens: Any) -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    with harness.memory_on(device) as memory:
        steps = [harness.timed(lambda: step(tokens)) for tokens in batches(work)]  # noqa: B023
    seconds, losses = ([each[part] for each in steps] for part in (0, 1))
    return {
        "seconds a step": statistics.median(seconds[1:]),
        "first step, s": seconds[0],
        f"peak {'device' if device == 'cuda' else 'private'} memory, MB": memory.peak - before,
        "losses": losses,
    }


def imported(side: str) -> Any:
    """Do the imports of the side, those of its adapters and of torch's optimizers, which wait for the first; torch."""
    torch = quantization.imported(side)
    adapters = importlib.import_module("loadstone" if side == "loadstone" else "peft")
    adapters.LoraConfig(**ADAPTER)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    return torch


def adapted(side: str, work: dict[str, Any]) -> Any:
    """The side's quantized base with the adapter that both sides begin with, in training mode."""
    model = quantization.load(side, work)
    if side == "loadstone":
        model.add_adapter(importlib.import_module("loadstone").LoraConfig(**ADAPTER))
    else:
        peft = importlib.import_module("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(**ADAPTER, task_type="CAUSAL_LM"))
    draw(model)
    return model.train()


def draw(model: Any) -> None:
    """Set the adapter as LoRA begins, the same on both sides: A uniform by layers in the order of their names, B zeros.

    Raises RuntimeError unless every projection has an adapter, and nothing else is trained.
    """
    torch = importlib.import_module("torch")
    matrices = {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = 2 * len(TARGETS) * model.config.num_hidden_layers
    if trained != set(matrices) or len(trained) != wanted:
        raise RuntimeError(f"{len(matrices)} matrices of adapters and {len(trained)} trained tensors, not {wanted}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(matrices, key=lambda name: name[name.index("layers.") :]):
            matrix, bound = matrices[name], 1 / math.sqrt(matrices[name].shape[1])
            if ".lora_A." in name:
                matrix.copy_(torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator))
            else:
                matrix.zero_()


def batches(work: dict[str, Any]) -> list[Any]:
    """The tokens of each step, (batch, length) on the device: pieces of the licence from places drawn by a seed."""
    torch = importlib.import_module("torch")
    text = (harness.ROOT / "LICENSE").read_text(encoding="utf-8")
    words = Path(work["path"]) / "tokenizer.json"
    if words.exists():
        ids = importlib.import_module("tokenizers").Tokenizer.from_file(str(words)).encode(text).ids
    else:
        ids = list(text.encode())
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(ids) - work["length"], (work["steps"], work["batch"]), generator=generator)
    tokens = torch.tensor(ids).unfold(0, work["length"], 1)[starts]
    return list(tokens.to(work["device"]))


def derive(row: dict[str, Any]) -> None:
    """Add tokens/s to a row, and how far apart the curves are; "failed" if the sides train different things."""
    sides, work = [side for side in ("loadstone", row["peer"]) if side is not None], row["work"]
    row["tokens/s"] = {side: work["batch"] * work["length"] / row["seconds a step"][side] for side in sides}
    print("    tokens/s: " + ", ".join(f"{side} {row['tokens/s'][side]:.4g}" for side in sides), flush=True)
    if row["peer"] is None:
        return
    curves = zip(row["losses"]["loadstone"], row["losses"][row["peer"]], strict=True)
    row["losses apart"] = apart = max(abs(ours - theirs) / theirs for ours, theirs in curves)
    print(f"    losses apart by at most {100 * apart:.2g} %", flush=True)
    if not apart <= _ROUNDING:
        row["failed"] = f"the sides train different things: losses apart by up to {100 * apart:.2g} %"


def chosen(arguments: argparse.Namespace, device: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """{name of the row: (name of its checkpoint, its work)}."""
    models = ("tiny",) if arguments.quick else (arguments.model,) if arguments.model else DEFAULT[device]
    rows = {}
    for model in models:
        checkpoint, name, sizes = MODELS[model]
        batch, length = sizes[device]
        work = {**BASE, "device": device, "batch": batch, "length": length}
        work["steps"] = 2 if arguments.quick else arguments.steps
        rows[f"QLoRA, {name}, {batch} x {length}"] = (checkpoint, work)
    return {name: row for name, row in rows.items() if arguments.only in name}


def run(arguments: argparse.Namespace) -> None:
    """All rows; exits with 1 if the two sides of one train different things."""
    if arguments.steps < 2:
        sys.exit(f"--steps {arguments.steps}: it takes at least 2, for the first is not counted")
    from . import side_by_side

    place = side_by_side.device()
    missing = harness.missing(_PEERS)
    sides = ["loadstone"] if missing else ["loadstone", "transformers"]
    for package, why in missing.items():
        print(f"not raced: {package}, {why}", flush=True)
    result, merge = side_by_side.result_name("qlora", place), bool(arguments.only or arguments.model)
    made: list[dict[str, Any]] = []
    for name, (checkpoint, work) in chosen(arguments, place.type).items():
        try:
            path = str(works.path_of(checkpoint))
        except RuntimeError as error:
            missing[name] = str(error)
            print(f"not measured: {name}, {error}", flush=True)
            continue
        rounds = 1 if arguments.quick else arguments.rounds
        given = {**work, "path": path}
        row = harness.race_all(__spec__.name, name, given, rounds=rounds, uncounted=0, sides=sides)[0]
        row["work"] = work
        derive(row)
        made.append(row)
        harness.save(result, made, merge=merge, about=side_by_side.about(place, {}, missing))
    harness.write(result, made, merge=merge, about=side_by_side.about(place, {}, missing))
    if failed := [f"{row['row']}: {row['failed']}" for row in made if "failed" in row]:
        sys.exit("\n".join(failed))


def options(parser: argparse.ArgumentParser) -> None:
    """More of the command line."""
    parser.add_argument("--model", choices=tuple(MODELS), help="one of these instead of what the device is given")
    parser.add_argument("--steps", type=int, default=8, help="training steps of each run (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two steps, one round: a test of the script")


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run, peer=None, options=options)
