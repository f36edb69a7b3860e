"""The benchmarks: what they count, that nothing wrong is timed, and that each runs and writes its results."""

from __future__ import annotations

import importlib
import json
import logging
import mmap
import os
import subprocess
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import examples

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def module(name: str) -> Any:
    """A module of the benchmarks, which are no part of the package, without the repository's root on the path."""
    if "benchmarks" not in sys.modules:
        package = types.ModuleType("benchmarks")
        package.__path__ = [str(ROOT / "benchmarks")]
        sys.modules["benchmarks"] = package
    return importlib.import_module(f"benchmarks.{name}")


def run(name: str, results: Path, *arguments: str, without: tuple[str, ...] = ()) -> str:
    """`python -m benchmarks.<name>` on the CPU; ``without``: packages that are not there."""
    (results / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_some(name, path=None, target=None):\n"
        f"    return None if name.split('.')[0] in {without!r} else find(name, path, target)\n"
        "PathFinder.find_spec = find_some\n"
    )
    environment = {**os.environ, "LOADSTONE_BENCH_RESULTS": str(results), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(results), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# What is counted


@given(st.integers(1, 40), st.integers(1, 60), st.booleans(), st.none() | st.integers(1, 70))
@examples(60)
def test_visible_pairs(queries: int, keys: int, causal: bool, window: int | None) -> None:
    places = torch.arange(keys - queries, keys)[:, None]
    column = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen = column <= places
        if window is not None:
            seen &= column > places - window
    assert module("counts").visible_pairs(queries, keys, causal, window) == int(seen.sum())


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 17)])
def test_pairs_are_those_that_attention_sees(causal: bool, window: int | None) -> None:
    """By the kernel's own reference: with values of one, a row's log-sum-exp of equal scores counts its keys."""
    from loadstone.kernels import flash_attention

    query, key = torch.zeros(1, 1, 40, 16), torch.zeros(1, 1, 64, 16)
    _, lse = flash_attention(query, key, key, causal=causal, window=window, return_lse=True)
    assert float(lse.double().exp().sum()) == pytest.approx(
        module("counts").visible_pairs(40, 64, causal, window), 1e-5
    )


def test_flops_are_those_of_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = module("counts")
    query = torch.randn(2, 3, 32, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        weights = torch.softmax(query @ torch.randn(2, 3, 16, 48), -1)
        output = weights @ torch.randn(2, 3, 48, 16)
    pairs = counts.visible_pairs(32, 48)
    assert counts.attention_flops(2, 3, 16, pairs) == counter.get_total_flops()
    assert counts.attention_flops(2, 3, 16, pairs, backward=True) == 2.5 * counter.get_total_flops()
    assert output.shape == query.shape


def test_training_flops_are_those_of_a_real_step() -> None:
    """Against torch's count of a step without causality: half of attention's work is what differs."""
    from torch.utils.flop_counter import FlopCounterMode

    from loadstone import LlamaConfig, LlamaForCausalLM

    training, counts = module("training_step"), module("counts")
    work = {"shape": training.TINY, "batch": 2, "length": 32}
    model = LlamaForCausalLM(LlamaConfig(**training.TINY, attn_implementation="eager"))
    ids = torch.randint(0, 512, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    heads, layers = training.TINY["num_attention_heads"], training.TINY["num_hidden_layers"]
    square = 3 * layers * counts.attention_flops(2, heads, 8, 32 * 32)
    causal = 3 * layers * counts.attention_flops(2, heads, 8, counts.visible_pairs(32, 32, causal=True))
    counted = training.flops(work) - causal + square
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)  # the first layer's input needs no gradient


def test_decode_bytes() -> None:
    tensors = [torch.empty(3, 8, 100, 64), torch.empty(3, 8, 100, 64), *(torch.empty(3, 32, 1, 64) for _ in range(2))]
    assert module("counts").decode_bytes(3, 32, 8, 64, 100, 4) == sum(t.numel() * t.itemsize for t in tensors)


# What is raced


def test_the_grid_is_what_was_promised() -> None:
    cases = list(module("attention").gpu_cases(quick=False))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    passes = [case for case in cases if case.what != "decode"]
    assert {case.queries for case in passes} == {512, 1024, 2048, 4096, 8192, 16384, 32768}
    assert {case.head_dim for case in passes} == {64, 128}
    assert all(case.heads * case.head_dim == 2048 for case in passes)
    assert all(case.batch * case.queries == max(16384, case.queries) for case in passes)
    assert {case.heads // case.kv_heads for case in passes} == {1, 4}
    assert {case.window for case in passes} == {None, 4096}
    decode = [case for case in cases if case.what == "decode"]
    assert (min(case.keys for case in decode), max(case.keys for case in decode)) == (1024, 131072)


def masked(case: Any, place: torch.device) -> Any:
    mask = module("attention_peers")._window_mask(case, place)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda query, key, value: attend(query, key, value, attn_mask=mask, enable_gqa=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="races the GPU's sides in Triton's interpreter")
@pytest.mark.parametrize("what", ["forward", "backward", "decode", "window"])
def test_the_sides_of_a_gpu_compute_the_same(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, peers = module("attention"), module("attention_peers")
    sides = {name: make for name, make in peers.on_gpu().items() if name != "flex"}
    if what == "window":  # the mask that torch's efficient kernel gets on a GPU, by whatever runs here
        sides = {"loadstone": sides["loadstone"], "sdpa": masked}
    monkeypatch.setattr(peers, "on_cpu", lambda case: sides)
    queries, window = (1 if what == "decode" else 24), (9 if what == "window" else None)
    case = peers.Case("forward" if window else what, 1, 4, 2, queries, 24, 16, True, window)
    rows = attention.race(case, CPU, 1, [], {"copy, B/s": 1e9, "matmul, FLOP/s": 1e9})
    raced = [row for row in rows if "seconds" in row]
    assert [row["peer"] for row in raced] == (["sdpa"] if window else ["sdpa flash"])
    assert {row["peer"] for row in rows if "failed" in row} == (set() if window else {"sdpa cudnn", "sdpa efficient"})
    unit = "GB/s" if what == "decode" else "TFLOP/s"
    assert raced[0][unit]["loadstone"] > 0
    json.dumps(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="races the GPU's sides on the CPU")
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "apply_rotary",
                                  "gated silu", "gated gelu", "linear_cross_entropy"])  # fmt: skip
def test_operations_compute_the_same_as_written_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, cases = module("ops"), module("ops_cases")
    monkeypatch.setattr(ops, "_peak", lambda call, place: 1.0)
    kept = {side: make for side, make in cases.sides(cases.BY_NAME[name], True).items() if side != "torch.compile"}
    monkeypatch.setattr(ops, "sides", lambda operation, on_gpu: kept)
    for mode in ops.MODES:
        rows = ops.race_on_gpu(cases.BY_NAME[name], mode, CPU, 1, 1e9, True)
        assert [row["peer"] for row in rows] == ["eager"]
        assert rows[0]["memory, MB"]["ratio"] == 1.0
        assert ("of a copy" in rows[0]) == (name != "linear_cross_entropy")


def test_all_operations_with_kernels_are_raced() -> None:
    from loadstone import kernels

    raced = {name.split()[0] for name in module("ops_cases").BY_NAME}
    elsewhere = {
        "flash_attention",
        "cross_entropy",
        "dequantize_4bit",
        "dequantize_absmax",
        "linear_4bit",
        "linear_int8",
    }
    assert set(kernels.operations()) - raced <= elsewhere  # attention.py, quantization.py


def test_bytes_of_an_operation_are_those_of_its_tensors() -> None:
    """Forward: what goes in and what comes out, but for the vectors that every row shares."""
    cases = module("ops_cases")
    place = cases.Place(CPU, quick=True)
    for operation in cases.OPERATIONS:
        if operation.forward:
            differentiable, others = operation.inputs(place)
            outputs = operation.eager(*differentiable, *others)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            wide = [tensor for tensor in (*differentiable, *outputs) if tensor.dim() > 1]
            assert operation.moved(differentiable, backward=False) == sum(t.numel() * t.itemsize for t in wide)


def test_wrong_results_are_not_timed() -> None:
    side_by_side = module("side_by_side")
    right, failed = (torch.randn(50),), {}
    results = {"loadstone": (right[0] * 1.5,), "sdpa flash": right, "other": (right[0] * torch.nan,), "close": right}
    side_by_side.refuse_wrong(results, failed, "sdpa")
    assert set(failed) == {"loadstone", "other"}
    rows = side_by_side.rows("name", {}, {"sdpa flash": [1.0], "close": [1.0]}, failed, lambda seconds: {})
    assert {row["peer"] for row in rows} == {"loadstone", "other"}
    with pytest.raises(SystemExit, match="computes something else"):
        side_by_side.exit_if_ours_failed(rows)


def test_ratios_are_taken_round_by_round() -> None:
    found = module("harness").compared([(1.0, 2.0), (10.0, 30.0), (2.0, 2.0)], ("loadstone", "peer"))
    assert found == {"loadstone": 2.0, "peer": 2.0, "ratio": 2.0, "spread": [1.0, 3.0]}
    assert module("harness").compared([(0.0, 2.0)], ("loadstone", "peer"))["ratio"] is None


def test_figures_that_are_no_numbers_have_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = module("harness")
    found = harness.summarized({"loadstone": [1.0, 3.0, 2.0], "peer": [1.0, "why", "why not"]})
    assert found == {"loadstone": 2.0, "peer": "why not"}
    assert harness.summarized({"loadstone": [1.0, 2.0], "peer": [2.0, 2.0]})["ratio"] == 1.5
    figures = iter([{"s": 1.0, "curve": [3.0, 2.0]}, {"s": 3.0, "curve": [3.0, 1.0]}])
    monkeypatch.setattr(harness, "_child", lambda module, side, work: next(figures))
    [row] = harness.race_all("module", "alone", {}, rounds=2, uncounted=0, sides=["loadstone"])
    assert (row["peer"], row["s"], row["curve"]) == (None, {"loadstone": 2.0}, {"loadstone": [3.0, 1.0]})


def test_renewed_rows_replace_those_of_the_same_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = module("harness")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    nothing: Any = lambda path, rows: None  # noqa: E731
    harness.write("x", [{"row": "a", "peer": p, "value": 1} for p in "pq"] + [{"row": "b", "value": 1}], chart=nothing)
    harness.write("x", [{"row": "a", "peer": "q", "value": 2}], merge=True, chart=nothing)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["row"], row.get("peer"), row["value"]) for row in rows] == [
        ("a", "p", 1),
        ("a", "q", 2),
        ("b", None, 1),
    ]


def test_the_chart_of_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    attention = module("attention")
    rows = []
    for case in attention.gpu_cases(quick=True):
        unit = "GB/s" if case.what == "decode" else "TFLOP/s"
        rows.append({"row": case.name, "work": case.to_dict(), unit: {"loadstone": 300.0, "sdpa flash": 310.0}})
    attention.lines(tmp_path / "chart.png", rows)
    assert (tmp_path / "chart.png").stat().st_size > 10_000


# Quantized models


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Llama of two layers; the sides of a race may be called in this process, which they would keep from logging."""
    monkeypatch.setattr(module("works"), "CACHE", tmp_path / "works")
    monkeypatch.setattr(logging, "disable", lambda level: None)
    return str(module("works").path_of("llama_tiny"))


@pytest.mark.parametrize("name", ["NF4", "NF4, double quantization", "int8"])
def test_bytes_of_a_token_are_those_of_the_layers(name: str, tiny_checkpoint: str) -> None:
    quantization = module("quantization")
    work = {**quantization.QUANTIZATIONS[name], "path": tiny_checkpoint}
    model = quantization.load("loadstone", work)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unread = ("embed_tokens.weight", "quant_map", "quant_state", "weight_format", "inv_freq")
    read = sum(tensor.nbytes for key, tensor in tensors.items() if not key.endswith(unread))
    assert quantization.bytes_a_token(module("works").LLAMA_TINY, work) == read


def measured(quantization: Any, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """A row of both sides, called in this process."""
    found = {side: [quantization.generate(side, given)] for side in ("loadstone", "transformers")}
    row: dict[str, Any] = {"row": name, "peer": "transformers", "work": given}
    for figure in found["loadstone"][0]:
        row[figure] = module("harness").summarized({side: [seen[0][figure]] for side, seen in found.items()})
    return row


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs a GPU's rows on the CPU")
def test_a_gpus_rows_on_the_cpu(tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides load, continue a prompt and compute the same; the shares and targets follow; all is written."""
    pytest.importorskip("bitsandbytes")
    quantization, harness = module("quantization"), module("harness")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "race_all", lambda _, name, given, **rest: [measured(quantization, name, given)])
    work = {**quantization.GPU_WORK, **quantization.QUICK, "device": "cpu"}
    rows = {name: {**part, **work} for name, part in quantization.QUANTIZATIONS.items()}
    quantization.run_on_gpu(Namespace(quick=True, only="", rounds=1), rows, {})
    result = json.loads((tmp_path / "quantization_cpu.json").read_text())
    assert [row["row"] for row in result["rows"]] == list(rows)
    for row in result["rows"]:
        assert row["decode, s a token"]["ratio"] > 0
        assert row["prefill of 64 tokens, s"]["ratio"] > 0
        assert set(row["decode in a CUDA graph, s a token"].values()) == {"no CUDA graph: no CUDA device"}
        share, speed = (row[f"decode, {figure}"]["loadstone"] for figure in ("of a copy", "tokens/s"))
        assert share == pytest.approx(row["bytes a token"] * speed / result["ceilings"]["copy, B/s"])
        assert row["targets"]["of a copy"] == {"wanted": 0.8, "found": pytest.approx(share)}
        assert row["targets"]["times the peer's tokens/s"]["wanted"] == 1.5
        assert 0 <= row["logits apart"] < 0.1  # some come out the same to the last bit
        assert set(row["work"]) == set(rows[row["row"]])


def test_targets_take_the_better_way_of_each_side() -> None:
    row: dict[str, Any] = {
        "row": "x", "peer": "transformers", "work": {},
        "decode, s a token": {"loadstone": 4e-3, "transformers": 2e-3},
        "decode in a CUDA graph, s a token": {"loadstone": 1e-3, "transformers": "no CUDA graph: why"},
    }  # fmt: skip
    module("quantization").derive(row, 6_000_000, 1e10)
    assert row["decode in a CUDA graph, of a copy"] == {"loadstone": pytest.approx(0.6)}
    assert row["decode, of a copy"]["transformers"] == pytest.approx(0.3)
    assert [target["found"] for target in row["targets"].values()] == [pytest.approx(0.6), pytest.approx(2.0)]


def test_sides_that_compute_different_things_are_refused(tmp_path: Path) -> None:
    for side, logits in (("loadstone", torch.ones(1, 1, 9)), ("transformers", torch.arange(9.0).view(1, 1, 9))):
        torch.save(logits, tmp_path / f"{side}.pt")
    row: dict[str, Any] = {"row": "x", "peer": "transformers", "work": {"bits": 8}}
    module("quantization").compare_logits(row, tmp_path)
    assert "different things" in row["failed"]


class Recorder:
    """What `captured` uses of torch: a capture runs, and a replay leaves what the capture computed."""

    def __init__(self, error: str = "") -> None:
        self.error, self.replays, self.cuda = error, 0, self

    def is_available(self) -> bool:
        return True

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        yield
        if self.error:
            raise RuntimeError(self.error)

    def Stream(self) -> Recorder:
        return self

    current_stream = CUDAGraph = Stream

    def wait_stream(self, stream: Any) -> None:
        pass

    def replay(self) -> None:
        self.replays += 1


@pytest.mark.parametrize("side", ["loadstone", "transformers"])
@torch.no_grad()
def test_decoding_in_a_static_cache_is_that_in_a_growing_one(side: str, tiny_checkpoint: str) -> None:
    package = pytest.importorskip(side)
    quantization = module("quantization")
    model = package.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    prompt = torch.arange(5, 17)[None]

    def captured(recorder: Recorder, expected: float = 1.0) -> float | str:
        decoding = quantization.Decoding(recorder, package, model, prompt, 1e-4)
        assert decoding.eager(3, lambda call: call() or 6.0) == 2.0
        decoding._expected = decoding._expected * expected
        return decoding.captured(3, 2, lambda call: call() or 6.0)

    assert captured(recorder := Recorder()) == 2.0
    assert recorder.replays == 4
    assert captured(Recorder("capture\nfailed")) == "no CUDA graph: RuntimeError: capture"
    assert "something else than eager" in str(captured(Recorder(), 2.0))


def test_without_a_gpu_its_rows_are_named_as_not_measured(
    tiny_checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantization, harness = module("quantization"), module("harness")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "missing", lambda packages: {})
    monkeypatch.setattr(harness, "race", lambda _, name, work, **rest: {"row": name, "work": dict(work)})
    monkeypatch.setattr(module("side_by_side"), "device", lambda: CPU)
    quantization.run(Namespace(quick=True, only="", rounds=1, model="llama1b"))
    result = json.loads((tmp_path / "quantization.json").read_text())
    assert [row["row"] for row in result["rows"]] == [name for name, _ in quantization.CPU_ROWS]
    out = capsys.readouterr().out
    assert len(result["missing"]) == 3
    for name in result["missing"]:
        assert name.endswith("on a GPU")
        assert f"not measured: {name}, no CUDA device" in out


def test_qlora_begins_with_the_same_adapter_and_learns_the_same(tiny_checkpoint: str) -> None:
    for package in ("transformers", "bitsandbytes", "peft"):
        pytest.importorskip(package)
    qlora, harness = module("qlora"), module("harness")
    work = {**qlora.BASE, "device": "cpu", "batch": 2, "length": 32, "steps": 3, "path": tiny_checkpoint}
    sides = ("loadstone", "transformers")
    adapters = []
    for side in sides:
        named = qlora.adapted(side, work).named_parameters()
        adapters.append({name[name.index("layers.") :]: p.detach() for name, p in named if p.requires_grad})
    assert adapters[0].keys() == adapters[1].keys()
    assert len(adapters[0]) == 2 * 2 * 7
    for name, matrix in adapters[0].items():
        assert torch.equal(matrix, adapters[1][name])
        assert bool(matrix.any()) == (".lora_A." in name)
    found = {side: [qlora.measure(side, work)] for side in sides}
    row: dict[str, Any] = {"row": "x", "peer": "transformers", "work": work}
    row |= {
        figure: harness.summarized({side: [found[side][0][figure]] for side in sides}) for figure in found[sides[0]][0]
    }
    qlora.derive(row)
    assert row["losses apart"] < 0.01
    assert row["losses"]["loadstone"][0] != row["losses"]["loadstone"][2]
    assert row["tokens/s"]["loadstone"] == pytest.approx(64 / row["seconds a step"]["loadstone"])
    assert "failed" not in row
    row["losses"]["loadstone"][2] *= 1.1
    qlora.derive(row)
    assert "train different things" in row["failed"]
    json.dumps(row)


def test_a_layer_without_an_adapter_is_no_race(tiny_checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qlora = module("qlora")
    monkeypatch.setitem(qlora.ADAPTER, "target_modules", ["q_proj", "v_proj"])
    with pytest.raises(RuntimeError, match="not 28"):
        qlora.adapted("loadstone", {**qlora.BASE, "path": tiny_checkpoint})


def test_models_of_qlora() -> None:
    qlora = module("qlora")
    asked = {"quick": False, "only": "", "steps": 4}
    for device in ("cpu", "cuda"):
        rows = qlora.chosen(Namespace(model=None, **asked), device)
        assert len(rows) == len(qlora.DEFAULT[device])
        assert all(work["device"] == device and work["steps"] == 4 for _, work in rows.values())
        for model, (checkpoint, name, sizes) in qlora.MODELS.items():
            [(row, (found, work))] = qlora.chosen(Namespace(model=model, **asked), device).items()
            assert found == checkpoint
            assert name in row
            assert (work["batch"], work["length"]) == sizes[device]


# Ways of loading


def test_ways_against_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is derived, written, drawn and put into the README's table."""
    pytest.importorskip("matplotlib")
    paths, table = module("loading_paths"), module("table")
    work = {"stored": "float32", "dtype": "bfloat16", "bytes": 10_000_000, "ways": ["mapped", "cast"]}
    seconds = {"loadstone": 1.0, "ratio": 2.0, "spread": [1.5, 2.5]}
    rows: list[dict[str, Any]] = []
    for peer, ratio in (("transformers", 2.0), ("limit", 0.8)):
        row = {"row": "one", "peer": peer, "work": work, "cast, s": {**seconds, peer: ratio, "ratio": ratio}}
        row["mapped, s"] = {"loadstone": 0.01, peer: "nothing has to be moved"}
        row["mapped, MB"] = {"loadstone": 0.25, peer: 1.0, "ratio": 4.0, "spread": [4.0, 4.0]}
        row["cast, MB"] = {"loadstone": 7.0, peer: "not counted"}
        rows.append(row)
    paths.derive(rows, work)
    targets = rows[1]["targets"]
    assert targets["cast, times the limit"] == {"wanted": 1.2, "found": pytest.approx(1.25)}
    assert targets["cast, MB beyond the model"] == {"wanted": 256.0, "found": pytest.approx(2.0)}
    assert targets["mapped, MB beyond the model"]["found"] == 0.25
    assert "mapped, times the limit" not in targets
    assert "ratio" not in rows[0]["mapped, MB"]
    paths.chart(tmp_path / "chart.png", rows)
    assert (tmp_path / "chart.png").stat().st_size > 5_000
    (tmp_path / "loading_paths_cpu.json").write_text(
        json.dumps(
            {
                "rows": rows,
                "missing": {"fastsafetensors": "why"},
                "machine": {"cpu": "some", "cores": 2, "memory_gb": 25.3},
                "versions": {"torch": "2"},
                "date": "2026-01-01T00:00",
            }
        )
    )
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines = table._paths_section()
    assert "Not installed, and not measured: fastsafetensors." in lines[3]
    assert lines[-2:] == ["| one | mapped | 0.01 |  | 0 |  |", "| one | cast | 1 | 1.25 | 2 | 2.00 (1.50 to 2.50) |"]


@pytest.mark.parametrize("side", ["loadstone", "transformers", "safetensors"])
def test_all_sides_bring_the_same_tensors(side: str, tiny_checkpoint: str) -> None:
    pytest.importorskip(side)
    peers = module("loading_peers")
    work = {"path": tiny_checkpoint, "stored": "bfloat16", "dtype": "float32", "bytes": 1}
    wanted = peers.loader("safetensors", "mapped", work)()
    assert len(wanted) > 10
    for way in module("loading_paths").WARM:
        held = peers.loader(side, way, work)()
        found = held if isinstance(held, dict) else held.state_dict()
        dtype = torch.float32 if "cast" in way else torch.bfloat16
        assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in wanted.items())
        if side == "loadstone":
            assert (held.load_report.not_mapped is not None) == ("read" in way)


class Kept(mmap.mmap):
    """Memory that can be looked at after it was given back."""

    def close(self) -> None:
        pass


def test_limits_move_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = module("loading_limits")
    files = [tmp_path / "a", tmp_path / "b"]
    numbers = [torch.randn(5_000), torch.randn(3_000)]
    for file, values in zip(files, numbers, strict=True):
        file.write_bytes(values.numpy().tobytes())
    held: list[Any] = []
    monkeypatch.setattr(limits, "least", lambda work, prepare, tries=1: (prepare(), work(2, 4096), 0.5)[2])
    monkeypatch.setattr(limits, "fresh", lambda size: held.append(Kept(-1, size)) or held[-1])
    assert limits.read(files) == limits.read(files, cold=True) == 0.5
    assert len(held) in (4, 6)  # warm, cold, and past the page cache where the file system can
    for number, block in enumerate(held):
        assert block[: 4 * numbers[number % 2].numel()] == files[number % 2].read_bytes()
    for way in (limits.cast, limits.read_cast):
        held.clear()
        assert way(files, torch.float32, torch.bfloat16) == 0.5
        for block, values in zip(held, numbers, strict=True):
            assert torch.equal(torch.frombuffer(block, dtype=torch.bfloat16, count=values.numel()), values.bfloat16())
    assert limits.touch(files) == 0.5


def test_growth_is_what_a_thousand_more_tokens_take(tmp_path: Path) -> None:
    training = module("training_step")
    rows = []
    for batch, length in ((1, 100), (1, 200), (1, 500), (2, 500), (4, 500)):
        tokens = batch * length
        row = {"row": f"{batch} x {length}", "peer": "other", "work": {"batch": batch, "length": length}}
        row["seconds"] = {"loadstone": 0.1 + tokens / 1e4, "other": 0.2 + tokens / 5e3}
        row["private memory, MB"] = {"loadstone": 300 + tokens * 0.5, "other": 350 + tokens * 2}
        row["tokens/s"] = {side: tokens / seconds for side, seconds in row["seconds"].items()}
        rows.append(row)
    lora = {**rows[0], "work": {**rows[0]["work"], "lora": {}}, "seconds": {"loadstone": 99.0, "other": 99.0}}
    grown = training.growth([*rows, lora, {"row": "growth of before", "peer": "other"}])
    assert [row["row"] for row in grown] == [
        "growth with longer sequences, 1 x 100 to 1 x 500", "growth with larger batches, 1 x 500 to 4 x 500",
    ]  # fmt: skip
    for row in grown:
        assert row["MB for a thousand tokens"]["loadstone"] == pytest.approx(500)
        assert row["MB for a thousand tokens"]["ratio"] == pytest.approx(4)
        assert row["s for a thousand tokens"]["ratio"] == pytest.approx(2)
    pytest.importorskip("matplotlib")
    training.chart(tmp_path / "x.png", [*rows, lora, *grown])
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_sides_that_are_missing_are_named() -> None:
    training = module("training_step")
    here = {side for lora in (False, True) for side in training.sides_there(False, lora)[0]}
    missing = {side: why for lora in (False, True) for side, why in training.sides_there(False, lora)[1].items()}
    assert here | set(missing) >= {"loadstone", *training.PEERS}
    assert not here & set(missing)
    assert "liger" in missing["transformers with liger"].lower()


def test_fine_tunes_of_both_sides_lie_on_each_other(tiny_checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    finetune, harness = module("finetune"), module("harness")
    work = {**finetune.QUICK, "device": "cpu", "path": tiny_checkpoint}
    train, held = finetune.blocks(work)
    assert len(held) == 24
    assert len(train) > 10 * len(held)
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in held.tolist()}
    text, kept = finetune.texts()
    for name in finetune.HELD_OUT:
        assert (ROOT / name).read_text() in kept
        assert (ROOT / name).read_text() not in text
    assert "# Training" in text
    assert train.shape[1] == held.shape[1] == 32
    sides = ("loadstone", "transformers")
    found = {side: [finetune.measure(side, work)] for side in sides}
    row: dict[str, Any] = {"row": "x", "peer": "transformers", "work": work}
    row |= {
        figure: harness.summarized({side: [found[side][0][figure]] for side in sides}) for figure in found[sides[0]][0]
    }
    finetune.derive(row)
    assert row["losses apart"] < 0.002
    assert "failed" not in row
    json.dumps(row)
    pytest.importorskip("matplotlib")
    finetune.chart(tmp_path / "x.png", [row])
    assert (tmp_path / "x.png").stat().st_size > 1000
    row["losses"]["loadstone"][2] *= 1.1
    finetune.derive(row)
    assert "train different things" in row["failed"]
    assert [finetune.rate(n, {"rate": 1.0, "steps": 25}) for n in (0, 4, 5, 15, 24)] == pytest.approx(
        [0.2, 1.0, 1.0, 0.55, 0.145]
    )


# Each script


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("attention", ()),
        ("ops", ("--only", "apply_rotary")),
        ("training_step", ()),
        ("first_call", ()),
        ("qlora", ()),
        ("finetune", ()),
    ],
)
def test_quick_runs_write_their_results(name: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """With torch alone: no peer, no matplotlib."""
    absent = ("transformers", "liger_kernel", "matplotlib", "flash_attn", "bitsandbytes", "peft")
    out = run(name, tmp_path, "--quick", *arguments, without=absent)
    assert "no GPU" in out
    result = json.loads((tmp_path / f"{name}_cpu.json").read_text())
    assert result["rows"]
    assert {"date", "commit", "versions", "machine", "ceilings"} <= set(result)
    if name == "finetune":
        [row] = result["rows"]
        before, after = row["held-out losses"]["loadstone"]
        assert after < before
        assert len(row["losses"]["loadstone"]) == row["work"]["steps"]
    assert all("failed" not in row for row in result["rows"])
    if name == "training_step":
        assert "transformers" in result["missing"]
        assert {row["peer"] for row in result["rows"]} == {"loadstone, torch operations"}
        names = [row["row"] for row in result["rows"]]
        assert names == [
            "tiny Llama, 1 x 32", "tiny Llama, 2 x 32", "tiny Llama with LoRA, 2 x 32",
            "growth with larger batches, 1 x 32 to 2 x 32",
        ]  # fmt: skip
    if name == "qlora":
        assert set(result["missing"]) == {"transformers", "bitsandbytes", "peft"}
        assert [row["peer"] for row in result["rows"]] == [None]
        assert len(result["rows"][0]["losses"]["loadstone"]) == result["rows"][0]["work"]["steps"]
    assert {path.name for path in tmp_path.glob("*.*")} == {f"{name}_cpu.json", "sitecustomize.py"}


def test_a_quick_run_of_the_ways_of_loading(tmp_path: Path) -> None:
    """Without other loaders, which are named; without matplotlib."""
    absent = ("transformers", "fastsafetensors", "runai_model_streamer", "matplotlib")
    arguments = ("--quick", "--rounds", "1", "--only", "fp32")
    out = run("loading_paths", tmp_path, *arguments, without=absent)
    assert "fastsafetensors is not installed" in out
    result = json.loads((tmp_path / "loading_paths_cpu.json").read_text())
    assert {"date", "commit", "versions", "machine", "ceilings"} <= set(result)
    assert set(result["missing"]) == set(absent[:3])
    assert [row["peer"] for row in result["rows"]] == ["safetensors", "limit"]
    limit = result["rows"][1]
    for way in limit["work"]["ways"]:
        assert limit["targets"][f"{way}, times the limit"]["found"] > 0
        assert limit["targets"][f"{way}, MB beyond the model"]["found"] < 64


@pytest.mark.parametrize(("name", "package"), [("imports", "transformers"), ("quantization", "bitsandbytes")])
def test_races_against_transformers_say_when_it_is_missing(name: str, package: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=rf"{package}.* is missing.*loadstone\[bench\]"):
        run(name, tmp_path, without=(package,))


def test_the_table_shows_every_result_it_is_made_of() -> None:
    table = module("table")
    document = table.document()
    for name in (*table.ABOUT, *table.COMPACT):
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        assert path.exists() or name in table.COMPACT
        for row in json.loads(path.read_text())["rows"] if path.exists() else ():
            assert row["row"] in document
    for name, row, figure in table.SHORT:
        if (ROOT / "benchmarks" / "results" / f"{name}.json").exists():
            assert f"| {row} | {figure} |" in table.section()


def test_a_line_of_the_table_has_both_sides_and_the_spread() -> None:
    line = module("table")._line
    ratio = {"loadstone": 0.5, "eager": 1.0, "ratio": 2.0, "spread": [1.5, 2.5]}
    row = {"row": "rms_norm", "peer": "eager", "work": {}, "forward, s": ratio, "GB/s": {"loadstone": 1, "eager": 2}}
    assert line(row) == "| rms_norm | eager | forward, s: **2.00** (1.50 to 2.50; 0.5 against 1) |"
    assert line({"row": "x", "peer": "flex", "failed": "why"}) == "| x | flex | why |"


def test_bytes_of_the_paper_model_are_those_of_its_collectives() -> None:
    paper = module("paper")
    model = paper.Model("tiny", 1000.0, 2, 8)
    assert paper.fsdp_bytes(1000, 1) == 0
    assert paper.fsdp_bytes(1000, 4) == 1000 * 8 * 3 / 4
    assert paper.replica_bytes(1000, 4) == 2 * 4000 * 3 / 4
    assert paper.tensor_bytes(model, 5, 2) == 10 * 5 * 8 * 2  # ten sums, of which each rank sends the whole once
    assert paper.stage_bytes(model, 5) == 5 * 8 * 2 * 2
    machine = paper.Machine(flops=1e3, within=1e3, beyond=1e2, hop_within=1.0, hop_beyond=10.0)
    assert paper.ring_seconds(machine, 8, 8) == 7
    assert paper.ring_seconds(machine, 16, 8) == 14 + 10
    assert paper.ring_seconds(machine, 4, 1) == 3 * 10
    assert paper.ring_speed(machine, 8, 8) == 1e3
    assert paper.ring_speed(machine, 16, 8) == 800  # eight ports
    assert paper.ring_speed(machine, 2, 1) == 100


def test_a_step_of_the_paper_model_adds_up() -> None:
    paper = module("paper")
    model = paper.Model("tiny", 1000.0, 2, 8)
    machine = paper.Machine(flops=1e3, within=1e3, beyond=1e2, hop_within=0.0, hop_beyond=0.0)
    alone = paper.step(model, machine, 1, paper.Way("fsdp"), 5)
    assert alone["step"] == alone["compute"] == 6 * 1000 * 5 / 1e3
    found = paper.step(model, machine, 16, paper.Way("both", tp=2), 5)
    assert found["fsdp"] == paper.fsdp_bytes(500, 8) / 400  # four of its ranks a node
    assert found["tp"] == paper.tensor_bytes(model, 10, 2) / 1e3
    assert found["step"] == max(found["compute"], found["fsdp"]) + found["tp"]
    hybrid = paper.step(model, machine, 16, paper.Way("hybrid", hybrid=True), 5)
    assert hybrid["fsdp"] == paper.fsdp_bytes(1000, 8) / 1e3 + paper.replica_bytes(125, 2) / 1e2
    staged = paper.step(model, machine, 16, paper.Way("staged", pp=2), 5, text=1)
    assert staged["states"] == 16 * 500 / 8
    assert staged["fsdp"] == paper.fsdp_bytes(500, 8, gathers=1) / 1e3
    assert staged["empty"] == staged["compute"] / 10
    both = paper.step(model, machine, 16, paper.Way("both", tp=2, pp=2), 5, text=1)
    assert both["tp"] == pytest.approx(found["tp"])  # half of the layers, twice the texts


def test_the_document_of_scaling_shows_the_model_and_what_was_measured() -> None:
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    scaling = module("scaling")
    assert module("paper").table() in document
    rows = json.loads((ROOT / "benchmarks" / "results" / "scaling_cpu.json").read_text())["rows"]
    assert {(row["strategy"], row["processes"]) for row in rows} == {
        (strategy, count) for strategy in scaling.STRATEGIES for count in (1, 2, 4)
    }
    assert scaling.updated(document, rows) == document


def test_scaling_measures_a_strategy(tmp_path: Path) -> None:
    run("scaling", tmp_path, "--measure", "--processes", "2", "--only", "pp", without=("matplotlib",))
    [row] = json.loads((tmp_path / "scaling_cpu.json").read_text())["rows"]
    assert row["row"] == "pp, 2"
    assert 14.6 < row["read, MB"]["loadstone"] == row["held, MB"]["loadstone"] < 15
    assert row["step, s"]["loadstone"] > 0
