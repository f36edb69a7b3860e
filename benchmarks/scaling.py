"""What spreading a model over ranks costs: counted for many GPUs, measured here on a few processes.

    python -m benchmarks.scaling                 # the paper model: bytes between GPUs in a step, and their time
    python -m benchmarks.scaling --measure       # loading and steps of a small Llama on 1, 2 and 4 CPU processes

Nothing of the paper model is measured. Its assumptions are the arguments below, with their sources in docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama, of which ``parameters`` multiply."""

    name: str
    parameters: float
    layers: int
    width: int


@dataclass(frozen=True)
class Machine:
    """A cluster: operations a second that a GPU reaches in training, bytes a second it sends in a node and beyond."""

    flops: float = 989e12 * 0.5
    within: float = 360e9
    beyond: float = 45e9
    node: int = 8


MODELS = (Model("7B", 6.6e9, 32, 4096), Model("70B", 68.5e9, 80, 8192))
MEASURED = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}  # fmt: skip


def fsdp_bytes(parameters: float, ranks: int, itemsize: int = 2, reduced: int = 4) -> float:
    """Bytes that a rank sends in a step: weights gathered forward and backward, gradients reduced, each by a ring."""
    return parameters * (2 * itemsize + reduced) * (ranks - 1) / ranks


def tensor_bytes(model: Model, tokens: int, ranks: int, itemsize: int = 2) -> float:
    """Bytes that a rank sends in a step: two sums of activations a layer, forward and backward, one for the embedding
    and one for the head; a ring sends each twice."""
    sums = 4 * model.layers + 2
    return sums * tokens * model.width * itemsize * 2 * (ranks - 1) / ranks


def step(model: Model, machine: Machine, ranks: int, tp: int, tokens: int) -> dict[str, float]:
    """Seconds of one step, ``tokens`` for each group of ``tp`` ranks: computing, and sending for either strategy.

    FSDP sends within a node as far as its ranks go, else at the speed between nodes; its traffic can hide behind
    computing, that of tensor parallelism cannot.
    """
    sharers = ranks // tp
    compute = 6 * model.parameters * tokens / tp / machine.flops
    apart = ranks > machine.node
    fsdp = fsdp_bytes(model.parameters / tp, sharers) / (machine.beyond if apart else machine.within)
    tensor = tensor_bytes(model, tokens, tp) / machine.within if tp > 1 else 0.0
    return {"compute": compute, "fsdp": fsdp, "tp": tensor, "step": max(compute, fsdp) + tensor}


def paper(tokens: int) -> str:
    """The model as a table: what share of a step computes, if FSDP's traffic hides as far as it can."""
    lines = ["| model | GPUs | tp | bytes sent, FSDP | bytes sent, tp | computing | FSDP | tp | computing of a step |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for ranks in (8, 64, 256, 1024):
            for tp in (1, 8):
                found = step(model, Machine(), ranks, tp, tokens)
                sent = fsdp_bytes(model.parameters / tp, ranks // tp), tensor_bytes(model, tokens, tp)
                cells = [model.name, ranks, tp, *(f"{size / 1e9:.1f} GB" for size in sent)]
                cells += [f"{found[name] * 1e3:.0f} ms" for name in ("compute", "fsdp", "tp")]
                cells.append(f"{found['compute'] / found['step']:.0%}")
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def worker(rank: int, count: int, place: str, strategy: str, told: str) -> None:
    """Load and train on one of ``count`` processes; what it took goes to a file."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from loadstone import AutoModelForCausalLM

    torch.set_num_threads(1)
    store = dist.FileStore(f"{place}/store-{strategy}-{count}", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,), mesh_dim_names=(strategy,))
    loads = []
    for _ in range(3):
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(place, device_mesh=mesh)
        loads.append(time.perf_counter() - started)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(MEASURED["vocab_size"], (4, 128), generator=generator)
    mine = batch.chunk(count)[rank] if strategy == "fsdp" else batch
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        model(mine, labels=mine, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    found = {
        "load_s": min(loads),
        "step_s": statistics.median(seconds[1:]),
        "read_mb": model.load_report.bytes_total / 1e6,
        "held_mb": sum(p.to_local().nbytes for p in model.parameters()) / 1e6,
    }
    if rank == 0:
        Path(told).write_text(json.dumps(found))
    dist.barrier()


def measured(counts: Sequence[int]) -> str:
    """Loading and steps of rank 0, as a table."""
    import torch.multiprocessing as mp

    from loadstone import AutoModelForCausalLM, LlamaConfig

    lines = ["| strategy | processes | load | step | read by a rank | held by a rank |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as place:
        AutoModelForCausalLM.from_config(LlamaConfig(**MEASURED)).save_pretrained(place)  # type: ignore[arg-type]
        for strategy in ("fsdp", "tp"):
            for count in counts:
                told = os.path.join(place, f"{strategy}-{count}.json")
                mp.spawn(worker, (count, place, strategy, told), nprocs=count)
                row: dict[str, Any] = json.loads(Path(told).read_text())
                times = f"{row['load_s'] * 1e3:.0f} ms | {row['step_s'] * 1e3:.0f} ms"
                lines.append(f"| {strategy} | {count} | {times} | {row['read_mb']:.1f} MB | {row['held_mb']:.1f} MB |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step for each group of tp GPUs")
    parser.add_argument("--measure", action="store_true", help="measure here instead")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args(argv)
    print(measured(args.processes) if args.measure else paper(args.tokens))


if __name__ == "__main__":
    main()
