"""Quantized models against transformers with bitsandbytes: loading, memory, forward, the command; decoding on a GPU.

TinyLlama's shape with random bf16 weights, quantized while it is loaded. Each side runs in a fresh process with its
imports done. On a CPU it reports the load, the bytes its weights take, the peak of its private memory while loading,
and the median of a forward of 1, 16 and 512 tokens; ``command``: `loadstone quantize`, streaming, beside loading and
saving.

On a GPU (without one these rows are named as not measured): the load onto it, prefill of 512 and 2048 tokens, decoding
at batch 1 as models come (a growing cache, step by step) and in a CUDA graph over a static cache, and the peaks of its
memory. A decoded token reads all weights once: the share of a large copy's bandwidth, measured in the same run, counts
these bytes and no others. The same token is fed at every step, so that no near tie leads two ways apart. Logits of the
two sides are compared. Of a side that cannot be captured in a graph, the row says why.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from . import harness, works

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "NF4": {"bits": 4, "options": {"bnb_4bit_quant_type": "nf4"}},
    "NF4, double quantization": {
        "bits": 4,
        "options": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    },
    "int8": {"bits": 8, "options": {}},
}
CPU_ROWS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"what": "load", **quantization}) for name, quantization in QUANTIZATIONS.items()),
    ("NF4, from checkpoint to checkpoint", {**QUANTIZATIONS["NF4"], "what": "convert"}),
]
GPU_WORK = {"what": "generate", "device": "cuda", "prefill": [512, 2048], "prompt": 128, "steps": 64, "repeat": 5}
QUICK = {"prefill": [32, 64], "prompt": 16, "steps": 4, "repeat": 1}
TOKENS = (1, 16, 512)
EAGER, GRAPH = "decode, s a token", "decode in a CUDA graph, s a token"
WANTED_OF_A_COPY, WANTED_OF_THE_PEER = 0.8, 1.5
_UNSEEN = 4  # steps before any is timed: three that warm up, and the one whose logits are compared
# Of the logits of a whole model, between two implementations: llama1b's are 0.03 and 0.10 apart on a CPU, as int8 turns
# a last bit of an activation into a step of 1/127 of its row. Logits that have nothing to do with each other: 1.4.
_ROUNDING = {4: 0.1, 8: 0.3}
_PEERS = ("transformers", "bitsandbytes")


def configuration(side: str, work: dict[str, Any]) -> Any:
    """The side's own BitsAndBytesConfig for a row."""
    torch = importlib.import_module("torch")
    options = dict(work["options"])
    if work["bits"] == 4:
        options |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    else:
        options |= {"load_in_8bit": True}
    return importlib.import_module(side).BitsAndBytesConfig(**options)


def imported(side: str) -> Any:
    """Do the side's imports, and keep it from logging; torch."""
    importlib.import_module("logging").disable(importlib.import_module("logging").WARNING)
    importlib.import_module(side).AutoModelForCausalLM  # noqa: B018
    importlib.import_module("loadstone.models.llama" if side == "loadstone" else "transformers.models.llama")
    if side == "transformers":
        importlib.import_module("bitsandbytes")
    return importlib.import_module("torch")


def load(side: str, work: dict[str, Any]) -> Any:
    """The side's model, quantized while it is loaded, in bf16 otherwise."""
    options = {"quantization_config": configuration(side, work), "device_map": work.get("device", "cpu")}
    auto = importlib.import_module(side).AutoModelForCausalLM
    return auto.from_pretrained(work["path"], dtype=importlib.import_module("torch").bfloat16, **options)


def measure(side: str, work: dict[str, Any]) -> dict[str, float]:
    """Figures of one side in this process, on the CPU."""
    torch = imported(side)
    harness.warm_memory(2.5)
    before = harness.PrivateMemory.now()
    with harness.PrivateMemory() as memory:
        seconds, model = harness.timed(lambda: load(side, work))
    held = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    figures = {
        "load, s": seconds,
        "peak private memory while loading, MB": memory.peak - before,
        "parameters and buffers, MB": held / 1e6,
    }
    for count in TOKENS:
        ids = torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(ids)
            times = [harness.timed(lambda: model(ids))[0] for _ in range(1 if count == TOKENS[-1] else 3)]  # noqa: B023
        figures[f"forward of {count} tokens, s"] = statistics.median(times)
    return figures


def generate(side: str, work: dict[str, Any]) -> dict[str, Any]:
    """Figures of one side in this process, on a GPU; its last logits go to a file of ``work["logits"]``."""
    torch = imported(side)
    device = work["device"]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device)).sum().item()  # the device's own start
    with harness.memory_on(device) as memory:
        before = memory.now()
        seconds, model = harness.timed(lambda: (load(side, work), wait())[0])
        held = memory.now() - before
    figures: dict[str, Any] = {
        "load, s": seconds,
        "peak device memory while loading, MB": memory.peak - before,
        "device memory loaded, MB": held,
    }
    generator = torch.Generator().manual_seed(0)
    length = max(*work["prefill"], work["prompt"])
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(device)

    def median(call: Callable[[], Any]) -> float:
        call()
        return statistics.median(harness.timed(lambda: (call(), wait()))[0] for _ in range(work["repeat"]))

    with torch.no_grad():
        with harness.memory_on(device) as memory:
            for count in work["prefill"]:
                call = partial(model, input_ids=ids[:, :count], use_cache=True, logits_to_keep=1)
                figures[f"prefill of {count} tokens, s"] = median(call)
            torch.save(call().logits.float().cpu(), Path(work["logits"]) / f"{side}.pt")
            package, prompt = importlib.import_module(side), ids[:, : work["prompt"]]
            decoding = Decoding(torch, package, model, prompt, _ROUNDING[work["bits"]])
            figures[EAGER] = decoding.eager(work["steps"], median)
        figures["peak device memory while generating, MB"] = memory.peak - before
        figures[GRAPH] = decoding.captured(work["steps"], work["repeat"], median)
    return figures


class Decoding:
    """Steps of one row after a prompt: the forward of a token and the choice of the next.

    package: what the model and its caches are of. prompt: (1, tokens), whose last token is fed again and again.
    rounding: how far apart the logits of two ways may be.
    """

    def __init__(self, torch: Any, package: Any, model: Any, prompt: Any, rounding: float) -> None:
        self.torch, self.package, self.model, self.prompt, self.rounding = torch, package, model, prompt, rounding
        self.token = prompt[:, -1:].clone()
        parameters = inspect.signature(model.forward).parameters
        self._keyword = "cache" if "cache" in parameters else "past_key_values"  # the name changed in transformers
        self._expected: Any = None

    def feed(self, tokens: Any, cache: Any) -> Any:
        """(1, vocabulary): the logits after these tokens."""
        outputs = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{self._keyword: cache})
        return outputs.logits[:, -1]

    def step(self, cache: Any) -> Any:
        """One step; its logits."""
        logits = self.feed(self.token, cache)
        logits.argmax(-1)
        return logits

    def eager(self, steps: int, median: Callable[[Callable[[], Any]], float]) -> float:
        """Seconds of a step in a growing cache."""
        cache = self.package.DynamicCache(config=self.model.config)
        self.feed(self.prompt, cache)
        for _ in range(_UNSEEN):
            self._expected = self.step(cache)
        return median(lambda: again(steps, lambda: self.step(cache))) / steps

    def captured(self, steps: int, repeat: int, median: Callable[[Callable[[], Any]], float]) -> float | str:
        """Seconds of a step in a CUDA graph over a static cache; or why there is none. After `eager`, and the last that
        is asked of a process: a capture that failed leaves its mark on the device."""
        cuda = self.torch.cuda
        if not cuda.is_available():
            return "no CUDA graph: no CUDA device"
        room = self.prompt.shape[1] + _UNSEEN + (repeat + 1) * steps
        try:
            cache = self.package.StaticCache(config=self.model.config, max_cache_len=room)
            self.feed(self.prompt, cache)
            side = cuda.Stream()
            side.wait_stream(cuda.current_stream())
            with cuda.stream(side):
                for _ in range(_UNSEEN - 1):
                    self.step(cache)
            cuda.current_stream().wait_stream(side)
            graph = cuda.CUDAGraph()
            with cuda.graph(graph):
                logits = self.step(cache)
            graph.replay()
            off = difference(logits, self._expected)
            if not off <= self.rounding:
                return f"the CUDA graph computes something else than eager steps: logits off by {off:.3g} of their size"
            return median(lambda: again(steps, graph.replay)) / steps
        except Exception as error:  # torch and the peers raise what they like
            return f"no CUDA graph: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def again(times: int, call: Callable[[], Any]) -> None:
    """Call ``times`` times, and let go of each result before the next call."""
    for _ in range(times):
        call()


def difference(one: Any, other: Any) -> float:
    """The norm of the difference of two tensors in that of the second."""
    one, other = one.float(), other.float()
    return float((one - other).norm() / other.norm())


def convert(side: str, work: dict[str, Any]) -> dict[str, float]:
    """`loadstone quantize` against the peer's way: load quantized, then save."""
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "out")
        if side == "loadstone":
            main = importlib.import_module("loadstone.cli.main").main
            argv = ["quantize", work["path"], target, "--nf4", "--compute-dtype", "bfloat16", "--json"]
            importlib.import_module("torch")
            with harness.PrivateMemory() as memory:
                sys.stdout, kept = sys.stderr, sys.stdout
                try:
                    seconds, status = harness.timed(lambda: main(argv))
                finally:
                    sys.stdout = kept
            if status:
                raise RuntimeError(f"loadstone quantize ended with {status}")
        else:
            auto = importlib.import_module(side).AutoModelForCausalLM
            importlib.import_module("bitsandbytes")
            with harness.PrivateMemory() as memory:
                options = {"quantization_config": configuration(side, work), "device_map": "cpu"}

                def run() -> None:
                    auto.from_pretrained(work["path"], **options).save_pretrained(target)

                seconds, _ = harness.timed(run)
        return {"checkpoint to checkpoint, s": seconds, "peak private memory, MB": memory.peak}


def side_figures(side: str, work: dict[str, Any]) -> dict[str, Any]:
    """What a child process reports."""
    return {"load": measure, "convert": convert, "generate": generate}[work["what"]](side, work)


def bytes_a_token(shape: Mapping[str, Any], work: Mapping[str, Any]) -> int:
    """Bytes of a Llama's weights that decoding a token must read: codes and scales of the projections, the head and
    the norms in bf16; of the embedding next to nothing."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    projections = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    packed = 0
    for rows, columns in projections:
        if work["bits"] == 8:
            packed += rows * columns + 4 * rows
            continue
        blocks = -(-rows * columns // 64)
        double = work["options"].get("bnb_4bit_use_double_quant", False)
        packed += -(-rows * columns // 2) + (blocks + 4 * -(-blocks // 256) if double else 4 * blocks)
    return layers * packed + 2 * hidden * (shape["vocab_size"] + 2 * layers + 1)


def derive(row: dict[str, Any], needed: int, copy: float) -> None:
    """Add tokens/s of both ways of decoding, their shares of a copy, and what was wanted of the better way, to a row.

    needed: bytes a token. copy: bytes/s of a large copy, read and written.
    """
    sides = [side for side in ("loadstone", row["peer"]) if side is not None]
    best: dict[str, float] = {}
    for way in (EAGER, GRAPH):
        seconds = {side: row[way][side] for side in sides if not isinstance(row[way][side], str)}
        name = way.removesuffix(", s a token")
        row[f"{name}, tokens/s"] = {side: 1 / value for side, value in seconds.items()}
        row[f"{name}, of a copy"] = {side: needed / value / copy for side, value in seconds.items()}
        for side, value in seconds.items():
            best[side] = min(value, best.get(side, value))
    ours = best["loadstone"]
    row["bytes a token"] = needed
    row["targets"] = {"of a copy": {"wanted": WANTED_OF_A_COPY, "found": needed / ours / copy}}
    if row["peer"] in best:
        row["targets"]["times the peer's tokens/s"] = {"wanted": WANTED_OF_THE_PEER, "found": best[row["peer"]] / ours}
    for side in best:
        told = (f"{figure} {values[side]:.3g}" for figure, values in row.items() if is_derived(figure, values, side))
        print(f"    {side}: " + "; ".join(told), flush=True)
    for name, target in row["targets"].items():
        met = "met" if target["found"] >= target["wanted"] else "missed"
        print(f"    target {target['wanted']:g} {name}: {target['found']:.3g}, {met}", flush=True)


def is_derived(figure: str, values: Any, side: str) -> bool:
    """Whether `derive` made it, for this side."""
    return figure.endswith((", tokens/s", ", of a copy")) and side in values


def compare_logits(row: dict[str, Any], folder: Path) -> None:
    """Add to a row how far apart the two sides' logits are; "failed" if they compute different things."""
    torch = importlib.import_module("torch")
    if row["peer"] is None:
        return
    ours, theirs = (torch.load(folder / f"{side}.pt", weights_only=True) for side in ("loadstone", row["peer"]))
    row["logits apart"] = off = difference(ours, theirs)
    if not off <= _ROUNDING[row["work"]["bits"]]:
        row["failed"] = f"the sides compute different things: logits off by {off:.3g} of their size"
        print(f"    {row['failed']}", flush=True)


def run_on_cpu(arguments: argparse.Namespace, unmeasured: dict[str, str]) -> None:
    """All rows for the CPU."""
    path = works.path_of("llama_tiny" if arguments.quick else "llama1b")
    written = False
    for name, work in CPU_ROWS:
        if arguments.only in name:
            rounds = 1 if arguments.quick else arguments.rounds
            row = harness.race(__spec__.name, name, {**work, "path": str(path)}, rounds=rounds, uncounted=0)
            row["work"].pop("path")
            merge = bool(arguments.only) or written
            harness.write("quantization", [row], merge=merge, about={"missing": unmeasured})
            written = True


def run_on_gpu(arguments: argparse.Namespace, rows: dict[str, dict[str, Any]], absent: dict[str, str]) -> None:
    """All rows for a GPU; exits with 1 if the two sides differ in what they compute."""
    from . import side_by_side

    place = side_by_side.device()
    ceiling = side_by_side.ceilings(place, arguments.quick)
    side_by_side.forget(place)
    print(f"a copy reads and writes {ceiling['copy, B/s'] / 1e9:.4g} GB/s", flush=True)
    for package, why in absent.items():
        print(f"not raced: {package}, {why}", flush=True)
    about = side_by_side.about(place, ceiling, absent)
    path = works.path_of("llama_tiny" if arguments.quick else arguments.model)
    shape = json.loads((path / "config.json").read_text(encoding="utf-8"))
    sides = ["loadstone"] if absent else ["loadstone", "transformers"]
    made: list[dict[str, Any]] = []
    for name, work in rows.items():
        with tempfile.TemporaryDirectory(prefix="loadstone-bench-") as folder:
            given = {**work, "path": str(path), "logits": folder}
            rounds, uncounted = (1, 0) if arguments.quick else (arguments.rounds, 1)
            row = harness.race_all(__spec__.name, name, given, rounds=rounds, uncounted=uncounted, sides=sides)[0]
            row["work"] = work
            compare_logits(row, Path(folder))
        derive(row, bytes_a_token(shape, work), ceiling["copy, B/s"])
        merge = bool(arguments.only) or bool(made)
        harness.write(side_by_side.result_name("quantization", place), [row], merge=merge, about=about)
        made.append(row)
    if failed := [f"{row['row']}: {row['failed']}" for row in made if "failed" in row]:
        sys.exit("\n".join(failed))


def run(arguments: argparse.Namespace) -> None:
    """The rows for the GPU if there is one, else those for the CPU."""
    from . import side_by_side

    more = QUICK if arguments.quick else {}
    model = "tiny Llama" if arguments.quick else arguments.model
    on_gpu = {f"{name}, {model} on a GPU": {**part, **GPU_WORK, **more} for name, part in QUANTIZATIONS.items()}
    on_gpu = {name: work for name, work in on_gpu.items() if arguments.only in name}
    absent = harness.missing(_PEERS)
    if side_by_side.device().type == "cuda":
        run_on_gpu(arguments, on_gpu, absent)
        return
    unmeasured = dict.fromkeys(on_gpu, "no CUDA device")
    for name, why in unmeasured.items():
        print(f"not measured: {name}, {why}", flush=True)
    if absent:
        sys.exit(f"{', '.join(absent)}, the peer of this race, is missing: pip install 'loadstone[bench]'")
    run_on_cpu(arguments, unmeasured)


def options(parser: argparse.ArgumentParser) -> None:
    """More of the command line."""
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: a test of the script")
    parser.add_argument("--model", choices=("llama1b", "llama8b"), default="llama1b",
                        help="shape on a GPU (default %(default)s); the other is 16 GB of weights in bf16")  # fmt: skip


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", side_figures, run, peer=None, options=options)
