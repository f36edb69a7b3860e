"""Write the README's benchmark section from ``benchmarks/results``: no figure there is typed by hand."""

from __future__ import annotations

import json
import sys
from typing import Any

from .harness import RESULTS, ROOT

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
NAMES = ("imports", "loading", "forward", "quantization")
COMPACT = ("attention_cpu", "ops_cpu", "training_step_cpu")  # one line a row and peer


def section() -> str:
    """The section's Markdown."""
    results = [json.loads((RESULTS / f"{name}.json").read_text()) for name in NAMES]
    machine, versions = results[1]["machine"], results[1]["versions"]
    head = (
        f"Against transformers {versions['transformers']} (torch {versions['torch']}, {machine['cores']} cores, "
        f"{machine['memory_gb']:.0f} GB, no GPU), each side in fresh processes that take turns, page cache warm; "
        "medians. A ratio above 1 means that loadstone needs less; beside it the smallest and largest of the rounds."
    )
    lines = [
        head,
        "",
        "| work | figure | loadstone | transformers | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    for result in results:
        for row in result["rows"]:
            lines += _rows(row)
    explanation = (
        "`llama1b` is TinyLlama's shape with random weights in 5 shards, `smollm2` the real SmolLM2-135M-Instruct, "
        "`gpt2s` GPT-2's smallest shape. Fresh: the first load of a process, with the imports it needs; imported: the "
        "second. Private memory is anonymous memory, which mapped weights are not. The scripts: "
        "`python -m benchmarks.imports`, `python -m benchmarks.loading`, `python -m benchmarks.forward`, and for NF4 "
        "and int8 (`llama1b`, with bitsandbytes) `python -m benchmarks.quantization`; raw figures and charts in "
        "`benchmarks/results`."
    )
    return "\n".join([*lines, "", explanation, *_paths_section(), *_compact_section()])


def _paths_section() -> list[str]:
    """Every way of loading against its limit and other loaders: nothing if it has not been measured."""
    file = RESULTS / "loading_paths_cpu.json"
    if not file.exists():
        return []
    result = json.loads(file.read_text())
    peers = list(dict.fromkeys(row["peer"] for row in result["rows"] if row["peer"] != "limit"))
    absent = f" Not installed, and not measured: {', '.join(result['missing'])}." if result["missing"] else ""
    head = (
        "Every way that weights come by, everything imported. The limit is a bare loop over the same bytes in the same "
        "run; beside it what a load takes of it (1.00 would be as fast), what private memory it needs beyond the "
        "model's own, and how many times as long other loaders take, which bring tensors and no model: `python -m "
        f"benchmarks.loading_paths`.{absent}"
    )
    columns = ["checkpoint", "way", "s", "times the limit", "MB beyond", *peers]
    lines = ["", head, "", f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for name in dict.fromkeys(row["row"] for row in result["rows"]):
        rows = {row["peer"]: row for row in result["rows"] if row["row"] == name}
        lines += [_way(name, way, rows, peers) for way in next(iter(rows.values()))["work"]["ways"]]
    return lines


def _way(name: str, way: str, rows: dict[str, dict[str, Any]], peers: list[str]) -> str:
    first = next(iter(rows.values()))
    ours = first[f"{way}, s"]["loadstone"]
    limit = rows.get("limit", first)["targets"].get(f"{way}, times the limit")
    beyond = first["targets"].get(f"{way}, MB beyond the model")
    cells = [f"{limit['found']:.2f}" if limit else "", f"{max(beyond['found'], 0):.0f}" if beyond else ""]
    for peer in peers:
        value = rows[peer].get(f"{way}, s", {}) if peer in rows else {}
        cells.append(f"{value['ratio']:.2f} ({value['spread'][0]:.2f} to {value['spread'][1]:.2f})"
                     if value.get("ratio") else "")  # fmt: skip
    return f"| {name} | {way} | {_number(ours)} | {' | '.join(cells)} |"


def _compact_section() -> list[str]:
    """The kernels on the CPU: nothing if they have not been measured."""
    results = [json.loads(path.read_text()) for name in COMPACT if (path := RESULTS / f"{name}.json").exists()]
    if not results:
        return []
    head = (
        "Attention, the fused operations in their torch form, and a training step on the CPU, fp32. Of each figure the "
        "ratio, peer / loadstone, with the smallest and largest of the rounds, and both sides: `python -m "
        "benchmarks.attention`, `python -m benchmarks.ops`, `python -m benchmarks.training_step`, which on a GPU race "
        "the Triton kernels (not measured yet)."
    )
    lines = ["", head, "", "| work | against | ratios |", "|---|---|---|"]
    return lines + [_line(row) for result in results for row in result["rows"]]


def _line(row: dict[str, Any]) -> str:
    cells = []
    for figure, value in row.items():
        if isinstance(value, dict) and value.get("ratio"):
            low, high = value["spread"]
            sides = f"{_number(value['loadstone'])} against {_number(value[row['peer']])}"
            cells.append(f"{figure}: **{value['ratio']:.2f}** ({low:.2f} to {high:.2f}; {sides})")
    return f"| {row['row']} | {row['peer']} | {row['failed'] if 'failed' in row else '; '.join(cells)} |"


def _rows(row: dict[str, Any]) -> list[str]:
    if "seconds" in row and isinstance(row["seconds"], list):
        median = sorted(row["seconds"])[len(row["seconds"]) // 2]
        return [f"| {row['row']} | s | {median:.3f} | | |"]
    lines = []
    for figure, value in row.items():
        if isinstance(value, dict) and value.get("ratio"):
            low, high = value["spread"]
            lines.append(
                f"| {row['row']} | {figure} | {_number(value['loadstone'])} | {_number(value['transformers'])} "
                f"| {value['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
            )
    return lines


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def updated(text: str) -> str:
    """The README's text with its section renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def main() -> None:
    """Rewrite the README, or with ``--check`` exit with 1 if that would change it."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(updated(text) != text)
    readme.write_text(updated(text), encoding="utf-8")


if __name__ == "__main__":
    main()
