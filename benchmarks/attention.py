"""Attention against torch's backends, FlexAttention and flash-attn: forward, backward, decoding; the card's limits.

On a GPU, in bf16: hidden size 2048, batch * seq = 16k tokens (the field's choice, so that published figures compare),
head_dim 64 and 128, causal and full, as many key heads as query heads and a quarter, and a window of 4096; decoding at
1k to 128k keys. FLOPs are those of visible pairs, 2.5 times as many backward; decoding is counted in bytes. Fractions
are of a large matmul and a large copy, measured in the same run. All sides get the tensors that a model has: views of
(batch, seq, heads, head_dim), and a cache laid out (batch, heads, seq, head_dim). Results are written case by case;
`--only forward`, then backward, then decode fills one file in three shorter runs.

Without a GPU, in fp32, what models use there: our "sdpa" against torch's called directly.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import attention_peers, counts, harness, side_by_side
from .attention_peers import Case, Forward

HIDDEN, TOKENS, WINDOW = 2048, 16384, 4096
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
# FlashAttention-3's paper (arXiv:2407.08608), H100 SXM, forward, not causal, head_dim 128, hidden 2048, 16k tokens
PUBLISHED = {512: 467, 1024: 565, 2048: 625, 4096: 638, 8192: 646, 16384: 648}


def gpu_cases(quick: bool) -> Iterator[Case]:
    """The grid."""
    for length in (2048,) if quick else LENGTHS:
        for head_dim in (128,) if quick else (64, 128):
            heads, batch = HIDDEN // head_dim, max(1, TOKENS // length)
            for kv_heads in (heads, heads // 4):
                sees: list[tuple[bool, int | None]] = [(False, None), (True, None)]
                if length > WINDOW:
                    sees.append((True, WINDOW))
                for causal, window in sees:
                    for what in ("forward", "backward"):
                        yield Case(what, batch, heads, kv_heads, length, length, head_dim, causal, window)
    for keys in (1024,) if quick else CONTEXTS:
        for batch in (1, 8):
            for head_dim, kv_heads in ((128, 8), (128, 32), (64, 8)):
                yield Case("decode", batch, 32, kv_heads, 1, keys, head_dim)


def cpu_cases(quick: bool) -> Iterator[Case]:
    """A few shapes of small models."""
    for length in (64,) if quick else (512, 1024, 2048):
        for kv_heads in (8, 2):
            yield Case("forward", 1, 8, kv_heads, length, length, 64)
        yield Case("backward", 1, 8, 8, length, length, 64)
    for keys in (256,) if quick else (1024, 8192, 32768):
        yield Case("decode", 1, 32, 8, 1, keys, 64)


def tensors(case: Case, place: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, laid out as a model has them."""
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    generator = torch.Generator(place).manual_seed(0)

    def drawn(heads: int, length: int, cached: bool) -> Tensor:
        shape = (case.batch, heads, length, case.head_dim) if cached else (case.batch, length, heads, case.head_dim)
        made = torch.randn(shape, generator=generator, device=place, dtype=dtype)
        return (made if cached else made.transpose(1, 2)).requires_grad_(case.what == "backward")

    cached = case.what == "decode"
    key, value = (drawn(case.kv_heads, case.keys, cached) for _ in range(2))
    return drawn(case.heads, case.queries, cached=False), key, value


def call_of(case: Case, forward: Forward, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed."""
    if case.what != "backward":

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(*inputs),)

        return run
    output = forward(*inputs)
    generator = torch.Generator(output.device).manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def race(
    case: Case, place: torch.device, rounds: int, only: list[str], ceiling: dict[str, float]
) -> list[dict[str, Any]]:
    """All sides on one case."""
    sides = attention_peers.on_gpu() if place.type == "cuda" else attention_peers.on_cpu(case)
    side_by_side.forget(place)
    inputs = tensors(case, place)
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, tuple[Tensor, ...]] = {}
    failed: dict[str, str] = {}
    for name, make in sides.items():
        if only and name != "loadstone" and not any(part in name for part in only):
            continue
        try:
            calls[name] = call_of(case, make(case, place), inputs)
            results[name] = tuple(tensor.detach() for tensor in calls[name]())
        except attention_peers.NotApplicable as error:
            failed[name] = str(error)
        except Exception as error:  # torch, its compiler and other packages raise what they like
            failed[name] = side_by_side.reason(error)
    side_by_side.refuse_wrong(results, failed, "sdpa")
    calls = {name: call for name, call in calls.items() if name not in failed}
    del results
    seen = side_by_side.race(calls, place, rounds)
    return side_by_side.rows(case.name, case.to_dict(), seen, failed, lambda seconds: derived(case, seconds, ceiling))


def derived(case: Case, seconds: float, ceiling: dict[str, float]) -> dict[str, float]:
    """Speed, and its fraction of what the device does at most."""
    if case.what == "decode":
        itemsize = 2 if torch.cuda.is_available() else 4
        moved = counts.decode_bytes(case.batch, case.heads, case.kv_heads, case.head_dim, case.keys, itemsize)
        return {"GB/s": moved / seconds / 1e9, "of a copy": moved / seconds / ceiling["copy, B/s"]}
    pairs = counts.visible_pairs(case.queries, case.keys, case.causal, case.window)
    flops = counts.attention_flops(case.batch, case.heads, case.head_dim, pairs, case.what == "backward")
    return {"TFLOP/s": flops / seconds / 1e12, "of a matmul": flops / seconds / ceiling["matmul, FLOP/s"]}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """TFLOP/s against sequence length for heads of 128, and decoding's GB/s against context, a line for each side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 3, figsize=(16, 9))
    panels = [("forward", False), ("forward", True), ("backward", False), ("backward", True), ("decode", True)]
    for axes, (what, causal) in zip(grid.flat, panels, strict=False):
        length, unit = ("keys", "GB/s") if what == "decode" else ("queries", "TFLOP/s")
        points: dict[str, dict[int, float]] = {}
        for row in rows:
            work = row["work"]
            whole = work["what"] == "decode" or work["kv_heads"] == work["heads"]
            same = work["what"] == what and work["causal"] == causal and work["window"] is None and whole
            if not (same and work["head_dim"] == 128 and unit in row) or (what == "decode" and work["batch"] != 8):
                continue
            if what == "decode" and work["kv_heads"] == work["heads"]:
                continue
            for side, value in row[unit].items():
                points.setdefault(side, {})[work[length]] = value
        if (what, causal) == ("forward", False):
            axes.plot(list(PUBLISHED), list(PUBLISHED.values()), "k--", linewidth=1, label="FA3, published, H100 SXM")
        for side, values in points.items():
            style: dict[str, Any] = {"linewidth": 2.5, "color": "#b03030"} if side == "loadstone" else {"linewidth": 1}
            axes.plot(sorted(values), [values[x] for x in sorted(values)], marker="o", label=side, **style)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{what}, {'' if what == 'decode' else 'causal, ' if causal else 'full, '}head_dim 128")
        axes.set_ylabel(unit)
        axes.set_xlabel("cached keys (batch 8, 32/8 heads)" if what == "decode" else "sequence (batch * seq = 16k)")
        if axes.has_data():
            axes.legend(fontsize=8)
    grid.flat[-1].axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def summary(rows: list[dict[str, Any]]) -> None:
    """A table for the terminal: a line for each case, a column for each side."""
    sides = list(
        dict.fromkeys(side for row in rows for side in row.get("seconds", {}) if side not in ("ratio", "spread"))
    )
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        for unit in ("TFLOP/s", "GB/s"):
            cases.setdefault(row["row"], {}).update(row.get(unit, {}))
    width = max((len(name) for name in cases), default=0)
    print(f"\n{'TFLOP/s, decode GB/s':<{width}}  " + "  ".join(f"{side:>14}" for side in sides))
    for name, values in cases.items():
        cells = (f"{values[side]:14.3g}" if side in values else f"{'-':>14}" for side in sides)
        print(f"{name:<{width}}  " + "  ".join(cells))


def run(arguments: argparse.Namespace) -> None:
    """All rows; exits with 1 if ours failed anywhere."""
    place = side_by_side.device()
    ceiling = side_by_side.ceilings(place, arguments.quick)
    print(f"at most {ceiling['matmul, FLOP/s'] / 1e12:.3g} TFLOP/s, {ceiling['copy, B/s'] / 1e9:.4g} GB/s", flush=True)
    only = [part for part in arguments.peers.split(",") if part]
    on_gpu = place.type == "cuda"
    missing = attention_peers.missing() if on_gpu else {}
    name, about = side_by_side.result_name("attention", place), side_by_side.about(place, ceiling, missing)
    merge = bool(arguments.only or only)
    rows: list[dict[str, Any]] = []
    for case in (gpu_cases if on_gpu else cpu_cases)(arguments.quick):
        if arguments.only in case.name:
            rows += race(case, place, 1 if arguments.quick else arguments.rounds, only, ceiling)
            harness.save(name, rows, merge=merge, about=about)
    summary(rows)
    for peer, why in missing.items():
        print(f"not raced: {peer}, {why}")
    harness.write(name, rows, merge=merge, about=about, chart=lines if on_gpu else None)
    ratios = [row["seconds"]["ratio"] for row in rows if row.get("seconds", {}).get("ratio")]
    if ratios:
        print(f"median of {len(ratios)} ratios: {statistics.median(ratios):.2f}")
    side_by_side.exit_if_ours_failed(rows)


def options(parser: argparse.ArgumentParser) -> None:
    """More of the command line."""
    parser.add_argument("--quick", action="store_true", help="a few small cases, one round: a test of the script")
    parser.add_argument("--peers", default="", metavar="PART,PART", help="only peers whose name contains one of these")


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", None, run, peer=None, options=options)
