"""What spreading a model over ranks costs: counted for many GPUs, measured here on a few processes.

    python -m benchmarks.scaling                 # the paper model: bytes between GPUs in a step, and their time
    python -m benchmarks.scaling --measure       # loading and steps of a small Llama on 1, 2 and 4 CPU processes

Nothing of the paper model (`paper.py`) is measured. What is goes to ``benchmarks/results/scaling_cpu.json``, and from
there to docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import harness, paper

SHAPE = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}  # fmt: skip
BATCH, LENGTH, STEPS, LOADS = 4, 128, 8, 4
STRATEGIES = ("fsdp", "tp", "pp", "fsdp, NF4 and LoRA")
DOCUMENT = harness.ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def measure(side: str, work: dict[str, Any]) -> dict[str, float]:
    """Load and train as one rank of several; what it took. side: the number of the rank."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, LoraConfig

    rank, count, strategy, place = int(side), work["processes"], work["strategy"], work["place"]
    torch.set_num_threads(1)
    store = dist.FileStore(f"{place}/store-{STRATEGIES.index(strategy)}-{count}", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    options: dict[str, Any] = {
        "device_mesh": init_device_mesh("cpu", (count,), mesh_dim_names=(strategy.split(",")[0],))
    }
    if "NF4" in strategy:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    loads = []
    for _ in range(LOADS):
        dist.barrier()
        took, model = harness.timed(lambda: AutoModelForCausalLM.from_pretrained(place, **options))
        loads.append(took)
    if "LoRA" in strategy:
        model.add_adapter(LoraConfig(r=8, target_modules="all-linear"))
    step = _step(model.train(), strategy, rank, count)
    seconds = []
    for _ in range(STEPS):
        dist.barrier()
        seconds.append(harness.timed(step)[0])
    parts = [getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in model.parameters()]
    dist.barrier()
    dist.destroy_process_group()
    return {
        "load, s": statistics.median(loads[1:]),
        "step, s": statistics.median(seconds[2:]),
        "read, MB": model.load_report.bytes_total / 1e6,
        "held, MB": sum(part.nbytes for part in parts) / 1e6,
    }


def _step(model: Any, strategy: str, rank: int, count: int) -> Any:
    """One step of training on the same batch of texts, however it is spread."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH), generator=generator)
    if strategy == "pp":
        from torch.distributed.pipelining import Schedule1F1B

        stage = model.pipeline_stage()
        schedule = Schedule1F1B(stage, n_microbatches=BATCH, loss_fn=stage.loss)

    def step() -> None:
        if strategy == "pp":
            schedule.step(*((batch,) if stage.is_first else ()), **({"target": batch} if stage.is_last else {}))
        else:
            mine = batch.chunk(count)[rank] if strategy.startswith("fsdp") else batch
            model(mine, labels=mine, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(strategies: Sequence[str], counts: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each strategy and number of processes: of each figure that of the rank which has the most."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks.scaling", "--make", place], cwd=harness.ROOT, check=False
        )
        if made.returncode:
            sys.exit("the model to be loaded could not be made")
        for strategy in strategies:
            for count in counts:
                work = {"strategy": strategy, "processes": count, "place": place}
                ranks = _ranks(work)
                figures = {name: {"loadstone": max(rank[name] for rank in ranks)} for name in ranks[0]}
                row = {"row": f"{strategy}, {count}", "peer": None, "strategy": strategy, "processes": count, **figures}
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def _ranks(work: dict[str, Any]) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--child"]
    started = [
        subprocess.Popen([*command, str(rank), json.dumps(work)], cwd=harness.ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(work["processes"])
    ]
    told = [process.communicate(timeout=300)[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"a rank failed in {work}")
    return [json.loads(out.splitlines()[-1]) for out in told]


def make(place: str) -> None:
    """Write the checkpoint that is loaded."""
    harness.importable()
    from loadstone import AutoModelForCausalLM, LlamaConfig

    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(place)  # type: ignore[arg-type]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measured figures in Markdown."""
    lines = ["| spread by | processes | load | step | read by a rank | held by a rank |", "|---|---|---|---|---|---|"]
    for row in rows:
        load, step, read, held = (row[name]["loadstone"] for name in ("load, s", "step, s", "read, MB", "held, MB"))
        cells = (row["strategy"], row["processes"], f"{load * 1e3:.0f} ms", f"{step * 1e3:.0f} ms", f"{read:.1f} MB",
                 f"{held:.1f} MB")  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def chart(path: Path, rows: list[dict[str, Any]]) -> None:
    """Seconds of loading and of a step, and megabytes of a rank, by the number of processes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.4))
    for axes, name in zip(panels, ("load, s", "step, s", "read, MB"), strict=True):
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            mine = [row for row in rows if row["strategy"] == strategy]
            counts = [row["processes"] for row in mine]
            axes.plot(counts, [row[name]["loadstone"] for row in mine], marker="o", label=strategy)
        axes.set_xticks(counts)
        axes.set_xlabel("processes on two cores")
        axes.set_title(f"{name}, of the rank with the most", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def updated(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """The document with its measured table renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def run(arguments: argparse.Namespace) -> None:
    """Print the paper model, or measure and write results and document."""
    if arguments.make:
        make(arguments.make)
        return
    if not arguments.measure:
        print(paper.table(arguments.tokens))
        return
    strategies = [strategy for strategy in STRATEGIES if arguments.only in strategy]
    rows = measured(strategies, arguments.processes)
    path = harness.write("scaling_cpu", rows, merge=bool(arguments.only), chart=chart)
    rows = json.loads(path.read_text())["rows"]
    print(table(rows))
    if harness.RESULTS == harness.ROOT / "benchmarks" / "results":
        DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8"), rows), encoding="utf-8")


def options(parser: argparse.ArgumentParser) -> None:
    """More of the command line."""
    parser.add_argument("--tokens", type=int, default=paper.TOKENS, help="tokens of a step for each GPU, on paper")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help="measure here instead")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run, peer=None, options=options)
