"""A fine-tune that means something: SmolLM2-135M on this repository's own prose, against transformers.

All weights, AdamW with a warm-up and a linear end, the same blocks in the same order on both sides, each in fresh
processes that take turns: the loss on held-out blocks before and after, the curve of the training losses, seconds a
step, tokens/s, and the peak of memory beyond what was there before the model. There is nothing random: no dropout, and
the order of blocks is drawn once. The two curves must lie on each other: a race whose curves do not is no race, and
ends with status 1. The text is the README, CONTRIBUTING and the docs that are prose (tables of figures and of errors
are left out, and the licence, which the model knows); three documents are held out whole. On a CPU every block is seen
at most once. fp32 there; bf16 with autocast over fp32 weights on a GPU. On two cores the whole takes about six minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import statistics
import sys
from pathlib import Path
from typing import Any

from . import harness, works

SIZES = {  # device: blocks a batch, tokens a block, steps, rounds, learning rate
    "cpu": {"batch": 2, "length": 128, "steps": 32, "rounds": 2, "rate": 1e-4},
    "cuda": {"batch": 4, "length": 512, "steps": 30, "rounds": 3, "rate": 1e-4},
}
QUICK = {"batch": 2, "length": 32, "steps": 3, "rounds": 1, "rate": 1e-3}
HELD_OUT = ("docs/adapters.md", "docs/formats.md", "docs/kernels.md")
_TABLES = ("docs/bad_input.md", "docs/benchmarks.md")
_HELD_BLOCKS = 24  # at most
_WARMUP = 5
_ROUNDING = {"cpu": 0.002, "cuda": 0.03}  # of a loss: fp32, whose order of additions differs, and bf16


def texts() -> tuple[str, str]:
    """The prose of the checkout in one order: to train on, held out."""
    names = sorted(str(path.relative_to(harness.ROOT)) for path in harness.ROOT.glob("docs/*.md"))
    names = ["README.md", "CONTRIBUTING.md", *(name for name in names if name not in (*_TABLES, *HELD_OUT))]
    train, held = (
        "\n\n".join((harness.ROOT / name).read_text(encoding="utf-8") for name in part) for part in (names, HELD_OUT)
    )
    return train, held


def blocks(work: dict[str, Any]) -> tuple[Any, Any]:
    """(blocks to train on, held-out blocks), (count, length) tokens: words where the model has them, else bytes."""
    torch = importlib.import_module("torch")
    words, length = Path(work["path"]) / "tokenizer.json", work["length"]
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(words)) if words.exists() else None

    def rows(text: str) -> Any:
        ids = list(text.encode()) if tokenizer is None else tokenizer.encode(text).ids
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    train, held = map(rows, texts())
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    spread = torch.linspace(0, len(held) - 1, min(len(held), _HELD_BLOCKS)).round().long()
    return train[order], held[spread]


def measure(side: str, work: dict[str, Any]) -> dict[str, Any]:
    """The figures of one fine-tune in this process."""
    torch, device = importlib.import_module("torch"), work["device"]
    package = importlib.import_module(side)
    train, held = (part.to(device) for part in blocks(work))
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # its imports wait for the first
    before = harness.memory_on(device).now()
    model = package.AutoModelForCausalLM.from_pretrained(work["path"], dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["rate"], weight_decay=0.01, fused=device == "cuda")

    def loss_of(tokens: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def held_out() -> float:
        model.eval()
        with torch.no_grad():
            found = [float(loss_of(part)) * len(part) for part in held.split(work["batch"])]
        model.train()
        return sum(found) / len(held)

    def step(number: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate(number, work)
        places = torch.arange(number * work["batch"], (number + 1) * work["batch"]) % len(train)
        loss = loss_of(train[places.to(device)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())  # which waits for the device

    first = held_out()
    with harness.memory_on(device) as memory:
        steps = [harness.timed(lambda number=number: step(number)) for number in range(work["steps"])]
    seconds, losses = ([each[part] for each in steps] for part in (0, 1))
    return {
        "seconds a step": statistics.median(seconds[1:]),
        "first step, s": seconds[0],
        f"peak {'device' if device == 'cuda' else 'private'} memory, MB": memory.peak - before,
        "held-out losses": [first, held_out()],
        "losses": losses,
    }


def rate(number: int, work: dict[str, Any]) -> float:
    """The learning rate of a step: up over the first few, then down in a line to a tenth."""
    if number < _WARMUP:
        return work["rate"] * (number + 1) / _WARMUP
    left = (work["steps"] - number) / max(1, work["steps"] - _WARMUP)
    return work["rate"] * (0.1 + 0.9 * left)


def derive(row: dict[str, Any]) -> None:
    """Add tokens/s and how far apart the curves are; "failed" if nothing was learned, or not the same on both sides."""
    sides, work = [side for side in ("loadstone", row["peer"]) if side is not None], row["work"]
    row["tokens/s"] = {side: work["batch"] * work["length"] / row["seconds a step"][side] for side in sides}
    before, after = row["held-out losses"]["loadstone"]
    told = ", ".join(f"{side} {row['tokens/s'][side]:.4g}" for side in sides)
    losses = "; ".join("{} {:.4f} before, {:.4f} after".format(side, *row["held-out losses"][side]) for side in sides)
    print(f"    tokens/s: {told}; held-out losses: {losses}", flush=True)
    if not after < before:
        row["failed"] = f"nothing was learned: the held-out loss was {before:.4f} and is {after:.4f}"
    if row["peer"] is None:
        return
    pairs = [
        (ours, theirs)
        for name in ("losses", "held-out losses")
        for ours, theirs in zip(row[name]["loadstone"], row[name][row["peer"]], strict=True)
    ]
    row["losses apart"] = apart = max(abs(ours - theirs) / theirs for ours, theirs in pairs)
    print(f"    losses apart by at most {100 * apart:.2g} %", flush=True)
    if not apart <= _ROUNDING[work["device"]]:
        row["failed"] = f"the sides train different things: losses apart by up to {100 * apart:.2g} %"


def chart(path: Path, rows: list[dict[str, Any]]) -> None:
    """Both curves of each row, and beside them what the peer needs of time and memory for one of ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 2, figsize=(10, 3.6 * len(rows)), width_ratios=(3, 2), squeeze=False)
    for (left, right), row in zip(axes, rows, strict=True):
        for side, losses in row["losses"].items():
            width = 3.5 if side == "loadstone" else 1.2
            left.plot(range(1, len(losses) + 1), losses, linewidth=width, alpha=0.8, label=side)
        told = ("{}: {:.3f}, then {:.3f}".format(side, *losses) for side, losses in row["held-out losses"].items())
        left.set_title(f"{row['row']}\nheld-out loss, {'; '.join(told)}", fontsize=9)
        left.set_xlabel("step")
        left.set_ylabel("training loss a token")
        left.legend(fontsize=8)
        ratios = {
            name: value
            for name, value in row.items()
            if isinstance(value, dict) and value.get("ratio") and value.get("spread")
        }
        for place, value in enumerate(ratios.values()):
            low, high = value["spread"]
            bars = [[value["ratio"] - low], [high - value["ratio"]]]
            right.barh(place, value["ratio"], xerr=bars, color="#3b6ea5", ecolor="#888888", height=0.6)
        right.axvline(1.0, color="#b03030", linewidth=1)
        right.set_yticks(range(len(ratios)), list(ratios), fontsize=8)
        right.invert_yaxis()
        right.set_xlabel(f"{row['peer'] or 'no peer'} / loadstone", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(arguments: argparse.Namespace) -> None:
    """The row of this machine; exits with 1 if the sides train different things, or nothing is learned."""
    from . import side_by_side

    place = side_by_side.device()
    missing = harness.missing(["transformers"])
    sides = ["loadstone"] if missing else ["loadstone", "transformers"]
    for package, why in missing.items():
        print(f"not raced: {package}, {why}", flush=True)
    given = dict(QUICK if arguments.quick else SIZES[place.type])
    rounds = given.pop("rounds")
    try:
        path = works.path_of("llama_tiny" if arguments.quick else "smollm2")
    except RuntimeError as error:
        sys.exit(f"not measured: {error}")
    name = "tiny Llama" if arguments.quick else "SmolLM2-135M"
    name = f"fine-tune, {name}, {given['steps']} steps of {given['batch']} x {given['length']}"
    work = {**given, "device": place.type}
    row = harness.race_all(__spec__.name, name, {**work, "path": str(path)}, rounds=rounds, uncounted=0, sides=sides)[0]
    row["work"] = work
    train, held = blocks({**work, "path": str(path)})
    row["text"] = {
        "sha256": hashlib.sha256("\0".join(texts()).encode()).hexdigest(),
        "blocks": len(train),
        "held-out blocks": len(held),
        "held-out documents": list(HELD_OUT),
    }
    derive(row)
    about = side_by_side.about(place, {}, missing)
    harness.write(side_by_side.result_name("finetune", place), [row], about=about, chart=chart)
    if "failed" in row:
        sys.exit(row["failed"])


def options(parser: argparse.ArgumentParser) -> None:
    """More of the command line; rounds are those of `SIZES`, as each is a whole fine-tune."""
    parser.add_argument("--quick", action="store_true", help="a tiny model, three steps: a test of the script")


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run, peer=None, options=options)
