"""Write docs/benchmarks.md, and the README's section of it, from ``benchmarks/results``: no figure is typed by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .harness import RESULTS, ROOT

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
ABOUT = {  # result: title and what its rows are
    "imports": ("Imports", "What importing costs beyond torch."),
    "loading": (
        "Loading",
        (
            "`llama1b` is TinyLlama's shape with random weights in 5 shards, `smollm2` the real SmolLM2-135M-Instruct, "
            "`gpt2s` GPT-2's smallest shape. Fresh: the first load of a process, with the imports it needs; imported: "
            "the second."
        ),
    ),
    "forward": ("Forward, generation and training of SmolLM2", "On the same weights, fp32."),
    "quantization": ("Quantization", "`llama1b` against transformers with bitsandbytes."),
}
COMPACT = {  # one line a row and peer
    "attention_cpu": ("Attention", "fp32; on a GPU the script races the Triton kernels."),
    "ops_cpu": ("Operations", "In their torch form, fp32; on a GPU the script races the Triton kernels."),
    "training_step_cpu": (
        "Training steps",
        (
            "fp32, batch x tokens. The rows of growth: what a thousand more tokens take, by the least squares of the "
            "rows above."
        ),
    ),
    "qlora_cpu": ("QLoRA", "NF4 with double quantization, bf16; both sides begin with the same adapter."),
    "finetune_cpu": (
        "A fine-tune",
        "SmolLM2 on this repository's prose, three documents held out; both sides see the same data in one order.",
    ),
}
SHORT = (  # (result, row, figure) of the README
    ("imports", "import beyond torch", "with Llama, s"),
    ("loading", "llama1b bf16", "load, fresh, s"),
    ("loading", "llama1b bf16", "import + load + logits, s"),
    ("loading", "llama1b bf16 to fp32", "load, imported, s"),
    ("forward", "prefill 512, sdpa", "seconds"),
    ("forward", "greedy decode 128 tokens", "seconds"),
    ("forward", "training step 2 x 256, sdpa", "seconds"),
    ("training_step_cpu", "small Llama, 4 x 512", "seconds"),
    ("training_step_cpu", "small Llama, 4 x 512", "private memory, MB"),
    ("training_step_cpu", "growth with larger batches, 1 x 512 to 8 x 512", "MB for a thousand tokens"),
    ("finetune_cpu", "fine-tune, SmolLM2-135M, 32 steps of 2 x 128", "seconds a step"),
    ("finetune_cpu", "fine-tune, SmolLM2-135M, 32 steps of 2 x 128", "peak private memory, MB"),
    ("quantization", "NF4", "load, s"),
    ("quantization", "NF4", "forward of 1 tokens, s"),
    ("quantization", "NF4", "forward of 16 tokens, s"),
    ("quantization", "NF4", "forward of 512 tokens, s"),
    ("quantization", "int8", "load, s"),
    ("quantization", "int8", "forward of 1 tokens, s"),
    ("quantization", "NF4, from checkpoint to checkpoint", "peak private memory, MB"),
    ("qlora_cpu", "QLoRA, SmolLM2-135M, 2 x 256", "seconds a step"),
    ("qlora_cpu", "QLoRA, SmolLM2-135M, 2 x 256", "peak private memory, MB"),
)
_RATIO = "A ratio above 1 means that loadstone needs less; beside it the smallest and largest of the rounds."


def document() -> str:
    """The Markdown of docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        (
            "Written by `python -m benchmarks.table` from `benchmarks/results`, which has the raw figures and charts. "
            f"Each side runs in fresh processes that take turns, page cache warm; medians. {_RATIO} Private memory is "
            "anonymous memory, which mapped weights are not. Never measured so far: anything on a GPU."
        ),
    ]
    for name, (title, what) in ABOUT.items():
        result = _result(name)
        if result is not None:
            lines += _heading(title, name, result, what)
            lines += ["| work | figure | loadstone | transformers | ratio |", "|---|---|---:|---:|---:|"]
            lines += [line for row in result["rows"] for line in _rows(row)]
    lines += _paths_section()
    for name, (title, what) in COMPACT.items():
        result = _result(name)
        if result is not None:
            absent = "; ".join(f"{side}, {why}" for side, why in result.get("missing", {}).items())
            what += " Of each figure the ratio, peer / loadstone, and both sides." + f" Not raced: {absent}." * bool(
                absent
            )
            lines += _heading(title, name, result, what)
            lines += ["| work | against | ratios |", "|---|---|---|", *(_line(row) for row in result["rows"])]
    return "\n".join([*lines, ""])


def section() -> str:
    """The README's Markdown."""
    lines = [
        (
            f"Against transformers, with bitsandbytes and PEFT where the row is theirs, on two CPU cores. {_RATIO} "
            "Machines, versions and all rows: [docs/benchmarks.md](docs/benchmarks.md)."
        ),
        "",
        "| work | figure | loadstone | transformers | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    for name, title, figure in SHORT:
        rows = (_result(name) or {"rows": []})["rows"]
        lines += [line for row in rows if row["row"] == title for line in _rows({"row": title, figure: row[figure]})]
    return "\n".join(lines)


def _result(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _heading(title: str, name: str, result: dict[str, Any], what: str) -> list[str]:
    machine, versions = result["machine"], result["versions"]
    peers = ", ".join(f"{package} {versions[package]}" for package in ("torch", "transformers") if package in versions)
    told = (
        f"`python -m benchmarks.{name.removesuffix('_cpu')}`, {result['date'][:10]}, {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['memory_gb']:.0f} GB, {peers}. {what}"
    )
    return ["", f"## {title}", "", told, ""]


def _paths_section() -> list[str]:
    """Every way of loading against its limit and other loaders: nothing if it has not been measured."""
    result = _result("loading_paths_cpu")
    if result is None:
        return []
    peers = list(dict.fromkeys(row["peer"] for row in result["rows"] if row["peer"] != "limit"))
    absent = f" Not installed, and not measured: {', '.join(result['missing'])}." if result["missing"] else ""
    what = (
        "Every way that weights come by, everything imported. The limit is a bare loop over the same bytes in the same "
        "run; beside it what a load takes of it (1.00 would be as fast), what private memory it needs beyond the "
        "model's own, and how many times as long other loaders take, which bring tensors and no model."
        f"{absent}"
    )
    columns = ["checkpoint", "way", "s", "times the limit", "MB beyond", *peers]
    lines = [
        *_heading("Ways of loading", "loading_paths_cpu", result, what),
        f"| {' | '.join(columns)} |",
        "|---|---|" + "---:|" * (len(columns) - 2),
    ]
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


def _line(row: dict[str, Any]) -> str:
    cells = []
    if "held-out losses" in row:
        told = ("{} {:.4f}, then {:.4f}".format(side, *losses) for side, losses in row["held-out losses"].items())
        cells.append(f"held-out loss: {'; '.join(told)}")
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
    """Rewrite both documents, or with ``--check`` exit with 1 if that would change one."""
    readme = ROOT / "README.md"
    wanted: dict[Path, str] = {readme: updated(readme.read_text(encoding="utf-8")), DOCUMENT: document()}
    for path, text in wanted.items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not what the results say")


if __name__ == "__main__":
    main()
