"""A training step of a Llama in alternating fresh processes: time, tokens/s, FLOPs utilisation and peak memory.

On a GPU a model of a billion parameters (TinyLlama's shape) in bf16 with AdamW, 4 x 4096 and 1 x 16384 tokens: our
kernels against transformers with sdpa, the same with Liger-Kernel, and ourselves with torch's operations. Utilisation
is 6 operations a parameter and token, and attention's, by a large matmul measured in the same run and the data sheet.
On a CPU small models in fp32 with a real vocabulary, where the chunked loss counts most.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from importlib import util
from typing import Any

from . import counts, harness, works

SMALL = {
    "vocab_size": 49152, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {**SMALL, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_NOT_OF_THE_SHAPE = ("architectures", "model_type", "dtype")
LARGE = {key: value for key, value in works.LLAMA_1B.items() if key not in _NOT_OF_THE_SHAPE}

CPU_ROWS = [
    ("small Llama, 2 x 256", {"shape": SMALL, "batch": 2, "length": 256, "repeat": 5}),
    ("small Llama, 4 x 512", {"shape": SMALL, "batch": 4, "length": 512, "repeat": 3}),
]
QUICK_ROWS = [("tiny Llama, 2 x 32", {"shape": TINY, "batch": 2, "length": 32, "repeat": 1})]
GPU_ROWS = [
    ("1B Llama, 4 x 4096", {"shape": LARGE, "batch": 4, "length": 4096, "repeat": 5}),
    ("1B Llama, 1 x 16384", {"shape": LARGE, "batch": 1, "length": 16384, "repeat": 5}),
]


def measure(side: str, work: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step, those of the first, and the peak of memory, in this process."""
    torch = importlib.import_module("torch")
    importlib.import_module("logging").disable(importlib.import_module("logging").WARNING)
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    model = _model(torch, side, work)
    step = _step(torch, model, work)

    def timed() -> float:
        return harness.timed(lambda: (step(), on_gpu and torch.cuda.synchronize()))[0]

    with harness.PrivateMemory() as memory:
        first = timed()
        times = [timed() for _ in range(work["repeat"])]
    figures = {"seconds": statistics.median(times), "first step, s": first}
    if on_gpu:
        return {**figures, "memory, MB": torch.cuda.max_memory_allocated() / 1e6}
    return {**figures, "private memory, MB": memory.peak}


def _model(torch: Any, side: str, work: dict[str, Any]) -> Any:
    on_gpu = torch.cuda.is_available()
    shape = {**work["shape"], "max_position_embeddings": max(2048, work["length"])}
    dtype = torch.bfloat16 if on_gpu else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if on_gpu else "cpu"):
            if side.startswith("loadstone"):
                package = importlib.import_module("loadstone")
                model = package.LlamaForCausalLM(package.LlamaConfig(**shape))
                flash = on_gpu and side == "loadstone"
                model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
                model.set_kernels("auto" if side == "loadstone" else "torch")
            else:
                if side.endswith("liger"):
                    importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
                package = importlib.import_module("transformers")
                model = package.LlamaForCausalLM(package.LlamaConfig(**shape, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(before)
    return model.train()


def _step(torch: Any, model: Any, work: dict[str, Any]) -> Any:
    place = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=place.type == "cuda")
    ids = torch.randint(0, work["shape"]["vocab_size"], (work["batch"], work["length"]), device=place)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops(work: dict[str, Any]) -> int:
    """Operations of a step, nothing counted twice."""
    shape, batch, length = work["shape"], work["batch"], work["length"]
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    head_dim = hidden // heads
    per_layer = 2 * hidden * head_dim * (heads + shape["num_key_value_heads"]) + 3 * hidden * shape["intermediate_size"]
    parameters = layers * per_layer + hidden * shape["vocab_size"]
    pairs = counts.visible_pairs(length, length, causal=True)
    return counts.training_flops(parameters, batch * length, layers, batch, heads, head_dim, pairs)


def derive(row: dict[str, Any], peaks: dict[str, float]) -> None:
    """Add tokens/s and FLOPs utilisation, by each of ``peaks`` (FLOP/s), to a row."""
    sides, work = ("loadstone", row["peer"]), row["work"]
    seconds = {side: row["seconds"][side] for side in sides}
    row["tokens/s"] = {side: work["batch"] * work["length"] / seconds[side] for side in sides}
    for name, peak in peaks.items():
        row[f"utilisation by {name}"] = {side: flops(work) / seconds[side] / peak for side in sides}
    told = ", ".join(
        f"{figure} {row[figure][side]:.3g} ({side})" for side in sides for figure in list(row)[-1 - len(peaks) :]
    )
    print(f"    {told}", flush=True)


def sides_there(on_gpu: bool) -> tuple[list[str], dict[str, str]]:
    """The sides that this machine can run, ours first, and why the others cannot."""
    sides, missing = ["loadstone"], {}
    if util.find_spec("transformers") is None:
        missing["transformers"] = "transformers is not installed"
    else:
        sides.append("transformers")
    if on_gpu and util.find_spec("liger_kernel") is None:
        missing["transformers with liger"] = "liger-kernel is not installed"
    elif on_gpu and "transformers" in sides:
        sides.append("transformers with liger")
    if on_gpu or len(sides) == 1:
        sides.append("loadstone, torch operations")
    return sides, missing


def run(arguments: argparse.Namespace) -> None:
    """All rows."""
    from . import side_by_side

    place = side_by_side.device()
    on_gpu = place.type == "cuda"
    ceiling = side_by_side.ceilings(place, arguments.quick)
    peaks = {"a matmul": ceiling["matmul, FLOP/s"]}
    if (sheet := side_by_side.data_sheet(place)) is not None:
        peaks["the data sheet"] = sheet
    sides, missing = sides_there(on_gpu)
    for name, why in missing.items():
        print(f"not raced: {name}, {why}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, work in QUICK_ROWS if arguments.quick else GPU_ROWS if on_gpu else CPU_ROWS:
        if arguments.only in name:
            rounds, uncounted = (1, 0) if arguments.quick else (arguments.rounds, 0)
            made = harness.race_all(__spec__.name, name, work, rounds=rounds, uncounted=uncounted, sides=sides)
            for row in made:
                derive(row, peaks)
            rows += made
    harness.write(
        side_by_side.result_name("training_step", place),
        rows,
        merge=bool(arguments.only),
        about=side_by_side.about(place, ceiling, missing),
    )


def options(parser: argparse.ArgumentParser) -> None:
    """More of the command line."""
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: a test of the script")


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run, peer=None, options=options)
