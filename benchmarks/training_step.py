"""A training step of a Llama in alternating fresh processes: time, tokens/s, FLOPs utilisation and peak memory.

On a GPU a model of a billion parameters (TinyLlama's shape) in bf16 with AdamW, at growing sequences and batches: our
kernels against transformers with sdpa, the same with Liger-Kernel, and ourselves with torch's operations. Utilisation
is 6 operations a parameter and token, and attention's, by a large matmul measured in the same run and the data sheet.
On a CPU small models in fp32 with a real vocabulary, where the chunked loss counts most. Rows with LoRA train adapters
on all projections: ours against PEFT on transformers' model. Rows of growth, one for more tokens in a sequence and one
for more sequences, hold what a thousand more tokens take of memory and time, by the least squares of the others.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Sequence
from importlib import util
from pathlib import Path
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

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}  # fmt: skip


def works_of(name: str, shape: dict[str, Any], sizes: Sequence[tuple[int, int]], repeat: int) -> list[Any]:
    """(name, work) of rows of one shape, by sizes of batch and sequence; the last one with LoRA too."""
    rows = [
        (f"{name}, {batch} x {length}", {"shape": shape, "batch": batch, "length": length, "repeat": repeat})
        for batch, length in sizes
    ]
    last, work = rows[-1]
    return [*rows, (last.replace(",", " with LoRA,"), {**work, "lora": LORA})]


CPU_ROWS = works_of(
    "small Llama", SMALL, [(1, 128), (1, 512), (1, 1024), (1, 2048), (2, 256), (2, 512), (4, 512), (8, 512)], 3
)
QUICK_ROWS = works_of("tiny Llama", TINY, [(1, 32), (2, 32)], 1)
GPU_ROWS = works_of("1B Llama", LARGE, [(1, 2048), (1, 4096), (1, 8192), (1, 16384), (2, 4096), (4, 4096)], 5)
PEERS = {"transformers": "transformers", "transformers with liger": "liger_kernel", "transformers with peft": "peft"}


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
            if "lora" in work:
                model = _adapted(model, side, work)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def _adapted(model: Any, side: str, work: dict[str, Any]) -> Any:
    """The side's model with adapters, which alone are trained."""
    if side.startswith("loadstone"):
        model.add_adapter(importlib.import_module("loadstone").LoraConfig(**work["lora"]))
        return model
    peft = importlib.import_module("peft")
    return peft.get_peft_model(model, peft.LoraConfig(**work["lora"], task_type="CAUSAL_LM"))


def _step(torch: Any, model: Any, work: dict[str, Any]) -> Any:
    place = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=place.type == "cuda")
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
    found = counts.training_flops(parameters, batch * length, layers, batch, heads, head_dim, pairs)
    return found - 2 * parameters * batch * length if "lora" in work else found  # no gradients of frozen weights


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


def sides_there(on_gpu: bool, lora: bool = False) -> tuple[list[str], dict[str, str]]:
    """The sides that this machine can run, ours first, and why the others cannot."""
    sides, missing = ["loadstone"], {}
    for side, package in PEERS.items():
        if lora != (package == "peft"):
            continue
        absent = [name for name in dict.fromkeys(("transformers", package)) if util.find_spec(name) is None]
        if absent:
            missing[side] = f"{' and '.join(absent)} not installed"
        elif package == "liger_kernel" and not on_gpu:
            missing[side] = "Liger-Kernel runs on GPUs"
        else:
            sides.append(side)
    if on_gpu or len(sides) == 1:
        sides.append("loadstone, torch operations")
    return sides, missing


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of what a thousand more tokens take, in longer sequences and in more of them, of rows that are measured."""
    made = []
    plain = [row for row in rows if "work" in row and "lora" not in row["work"] and "failed" not in row]
    for peer in dict.fromkeys(row["peer"] for row in plain):
        mine = [row for row in plain if row["peer"] == peer]
        lengths = [row for row in mine if row["work"]["batch"] == 1]
        most = max((row["work"]["length"] for row in mine if row["work"]["batch"] > 1), default=0)
        batches = [row for row in mine if row["work"]["length"] == most]
        for what, series in (("longer sequences", lengths), ("larger batches", batches)):
            if len(series) < 2:
                continue
            series = sorted(series, key=lambda row: row["work"]["batch"] * row["work"]["length"])
            tokens = [row["work"]["batch"] * row["work"]["length"] for row in series]
            told = [f"{row['work']['batch']} x {row['work']['length']}" for row in series]
            row = {"row": f"growth with {what}, {told[0]} to {told[-1]}", "peer": peer}
            for figure, unit, scale in ((_memory_of(series[0]), "MB", 1e3), ("seconds", "s", 1e3)):
                slopes = [_slope(tokens, [one[figure][side] for one in series]) * scale for side in ("loadstone", peer)]
                ratio = slopes[1] / slopes[0]
                row[f"{unit} for a thousand tokens"] = {
                    "loadstone": slopes[0], peer: slopes[1], "ratio": ratio, "spread": [ratio, ratio],
                }  # fmt: skip
            made.append(row)
    return made


def _memory_of(row: dict[str, Any]) -> str:
    return next(name for name in row if name.endswith("memory, MB"))


def _slope(places: Sequence[float], values: Sequence[float]) -> float:
    return statistics.linear_regression(places, values).slope


def chart(path: Path, rows: list[dict[str, Any]]) -> None:
    """Memory and tokens/s of every side by the tokens of a step, in longer sequences and in larger batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = [row for row in rows if "work" in row and "lora" not in row["work"] and "failed" not in row]
    most = max((row["work"]["length"] for row in plain if row["work"]["batch"] > 1), default=0)
    kinds = (("one sequence, tokens", "batch", 1, "length"), (f"sequences of {most}", "length", most, "batch"))
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6.4))
    for column, (title, fixed, value, by) in zip(panels.T, kinds, strict=True):
        series = sorted((row for row in plain if row["work"][fixed] == value), key=lambda row: row["work"][by])
        for axes, name in zip(column, (_memory_of(plain[0]), "tokens/s"), strict=True):
            lines: dict[str, dict[int, float]] = {}
            for row in series:
                for side in ("loadstone", row["peer"]):
                    lines.setdefault(side, {})[row["work"][by]] = row[name][side]
            for side, points in lines.items():
                axes.plot(list(points), list(points.values()), marker="o", label=side)
            axes.set_xlabel(title)
            axes.set_ylabel(name)
            axes.set_ylim(bottom=0)
            if lines:
                axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
    sides_of_lora, missing_of_lora = sides_there(on_gpu, lora=True)
    missing |= missing_of_lora
    for name, why in missing.items():
        print(f"not raced: {name}, {why}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, work in QUICK_ROWS if arguments.quick else GPU_ROWS if on_gpu else CPU_ROWS:
        if arguments.only in name:
            rounds, uncounted = (1, 0) if arguments.quick else (arguments.rounds, 0)
            those = sides_of_lora if "lora" in work else sides
            made = harness.race_all(__spec__.name, name, work, rounds=rounds, uncounted=uncounted, sides=those)
            for row in made:
                derive(row, peaks)
            rows += made
    result = side_by_side.result_name("training_step", place)
    about = side_by_side.about(place, ceiling, missing)
    _, rows = harness.save(result, rows, merge=bool(arguments.only), about=about)
    grown = growth(rows)
    for row in grown:
        harness.print_row(row, ("loadstone", row["peer"]))
    harness.write(result, grown, merge=True, chart=chart)


def options(parser: argparse.ArgumentParser) -> None:
    """More of the command line."""
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: a test of the script")


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run, peer=None, options=options)
