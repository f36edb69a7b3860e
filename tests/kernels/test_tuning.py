"""Block sizes: the shipped tables, what a search keeps, and the search itself with a clock of the test's own."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import examples

from loadstone.errors import KernelError
from loadstone.kernels import search, timing, tuning
from loadstone.kernels.search_calls import Call, call_of

CPU = torch.device("cpu")
KERNEL, CLASS = "flash_forward", "d64-16"
NAME = "Test GPU 9000"


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The CPU counts as a kind of GPU with a cache of its own; yields the file of its tuned sizes."""
    monkeypatch.setenv("LOADSTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_device_name", lambda kind, index: NAME)
    _forget()
    yield tuning.tuned_path(NAME)
    _forget()


def _forget() -> None:
    tuning.tuned_table.cache_clear()
    tuning._blocks.cache_clear()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    _forget()


# The shipped tables


def test_every_generation_has_every_kernel_and_shape_class() -> None:
    tables = {name: tuning.shipped_table(name) for name in tuning.GENERATIONS}
    first = tables["sm_90"]
    assert {"flash_forward", "flash_decode"} <= set(first)
    for name, table in tables.items():
        assert {kernel: set(row) for kernel, row in table.items()} == {k: set(row) for k, row in first.items()}, name


@pytest.mark.parametrize("generation", tuning.GENERATIONS)
def test_shipped_sizes_are_possible(generation: str) -> None:
    for kernel, row in tuning.shipped_table(generation).items():
        assert len({frozenset(sizes) for sizes in row.values()}) == 1, f"{kernel} takes other sizes in some classes"
        for shape_class, sizes in row.items():
            said = f"{generation} {kernel} {shape_class} {sizes}"
            assert any(name.startswith("BLOCK") for name in sizes), said
            assert 1 <= sizes["num_warps"] <= 16, said
            assert 1 <= sizes.get("num_stages", 1) <= 5, said
            powers = [size for name, size in sizes.items() if name != "num_stages"]
            assert all(size > 0 and size & (size - 1) == 0 for size in powers), said


def test_no_kernel_is_in_two_tables() -> None:
    seen: list[str] = []
    for file in tuning.TABLES.glob("*.json"):
        seen += json.loads(file.read_text())["sm_90"]
    assert len(seen) == len(set(seen))


# The sizes in use


def test_tuned_sizes_win_and_stay(gpu: Path) -> None:
    shipped = dict(tuning.blocks(KERNEL, CLASS, CPU))
    other = {**shipped, "BLOCK_M": 2 * shipped["BLOCK_M"]}
    assert tuning.keep_tuned(NAME, {KERNEL: {CLASS: other}}, {"date": "today"}) == gpu
    assert tuning.blocks(KERNEL, CLASS, CPU) == other
    _forget()
    assert tuning.blocks(KERNEL, CLASS, CPU) == other
    assert tuning.blocks(KERNEL, "d128-16", CPU) == tuning.shipped_table("interpreter")[KERNEL]["d128-16"]
    kept = json.loads(gpu.read_text())
    assert (kept["device"], kept["date"]) == (NAME, "today")


def test_tuned_sizes_are_for_one_kind_of_gpu(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = dict(tuning.blocks(KERNEL, CLASS, CPU))
    tuning.keep_tuned(NAME, {KERNEL: {CLASS: {**shipped, "BLOCK_M": 1024}}}, {})
    monkeypatch.setattr(tuning, "_device_name", lambda kind, index: "Another GPU")
    assert tuning.blocks(KERNEL, CLASS, CPU) == shipped


@given(st.text(min_size=1).filter(lambda name: any(c.isascii() and c.isalnum() for c in name)))
@examples(30)
def test_names_of_gpus_become_names_of_files(name: str) -> None:
    path = tuning.tuned_path(name)
    assert path.parent.name == "tuned"
    assert path.name.removesuffix(".json").replace("-", "").isalnum()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"kernels": []}',
        '{"kernels": {"flash_forward": 3}}',
        '{"kernels": {"flash_forward": {"d64-16": [1]}}}',
        '{"kernels": {"flash_forward": {"d64-16": {"BLOCK_M": "64"}}}}',
        '{"kernels": {"flash_forward": {"d64-16": {"BLOCK_M": 64.0}}}}',
        '{"kernels": {"flash_forward": {"d64-16": {"BLOCK_M": -64}}}}',
        '{"kernels": {"flash_forward": {"d64-16": {"BLOCK_M": true}}}}',
    ],
)
def test_a_malformed_tuned_file_is_named(gpu: Path, text: str) -> None:
    write(gpu, text)
    with pytest.raises(KernelError, match="tuned block sizes") as raised:
        tuning.blocks(KERNEL, CLASS, CPU)
    assert str(gpu) in str(raised.value)
    with pytest.raises(KernelError, match="delete it"):
        list(search.tune(CPU, [(KERNEL, CLASS)], timer=clock({}), calls=nothing))
    assert gpu.read_text() == text


def test_sizes_tuned_for_another_version_are_refused(gpu: Path) -> None:
    write(gpu, json.dumps({"kernels": {KERNEL: {CLASS: {"BLOCK": 64}}}}))
    with pytest.raises(KernelError, match="another version") as raised:
        tuning.blocks(KERNEL, CLASS, CPU)
    assert str(gpu) in str(raised.value)


def test_a_write_that_fails_leaves_what_was_there(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = dict(tuning.blocks(KERNEL, CLASS, CPU))
    tuning.keep_tuned(NAME, {KERNEL: {CLASS: shipped}}, {})
    before = gpu.read_text()
    with pytest.raises(TypeError):
        tuning.keep_tuned(NAME, {KERNEL: {CLASS: {"BLOCK_M": object()}}}, {})  # type: ignore[dict-item]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        tuning.keep_tuned(NAME, {}, {})
    assert gpu.read_text() == before


def test_sizes_being_tried_are_seen_by_all_threads_and_only_meanwhile() -> None:
    shipped = tuning.blocks(KERNEL, CLASS, CPU)
    seen: list[Any] = []
    with tuning.trying(KERNEL, CLASS, {"BLOCK_M": 1}):
        thread = threading.Thread(target=lambda: seen.append(tuning.blocks(KERNEL, CLASS, CPU)))
        thread.start()
        thread.join()
        assert tuning.blocks(KERNEL, "d128-16", CPU) != {"BLOCK_M": 1}
    assert seen == [{"BLOCK_M": 1}]
    assert tuning.blocks(KERNEL, CLASS, CPU) == shipped


# The search


def clock(costs: dict[str, Callable[[int], float]]) -> search.Timer:
    """A timer by the sizes in use: one second, times the cost of each size."""

    def timer(call: Callable[[], Any]) -> float:
        call()
        sizes = tuning.blocks(KERNEL, CLASS, CPU)
        return math.prod((cost(sizes[name]) for name, cost in costs.items()), start=1.0)

    return timer


def nothing(*_: Any) -> Call:
    return Call(lambda: (torch.ones(3),))


def best_at(value: int) -> Callable[[int], float]:
    return lambda size: 1.0 + abs(math.log2(size / value))


sizes_of_blocks = st.sampled_from([16, 32, 64, 128, 256])


@given(sizes_of_blocks, sizes_of_blocks, st.sampled_from([1, 2, 4, 8, 16]))
@examples(25)
def test_the_search_finds_the_best_of_a_smooth_cost(block_m: int, block_n: int, warps: int) -> None:
    timer = clock({"BLOCK_M": best_at(block_m), "BLOCK_N": best_at(block_n), "num_warps": best_at(warps)})
    found = search.search(KERNEL, CLASS, CPU, nothing(), timer, rounds=20)
    sizes = found.after.sizes
    assert (sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["num_warps"]) == (block_m, block_n, warps)
    assert found.after.seconds == pytest.approx(1.0)
    assert len(found.attempts) == len({tuple(sorted(attempt.sizes.items())) for attempt in found.attempts})


def test_what_fails_or_computes_something_else_is_named_and_passed_over() -> None:
    def run() -> tuple[torch.Tensor, ...]:
        sizes = tuning.blocks(KERNEL, CLASS, CPU)
        if sizes["BLOCK_M"] > 64:
            raise RuntimeError("out of resource: shared memory\nand a second line")
        return (torch.full((3,), torch.nan if sizes["num_warps"] > 4 else 1.0),)

    start = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tuning.shipped_table("interpreter")[KERNEL], CLASS, start)
        _forget()
        timer = clock({"BLOCK_M": lambda size: 1 / size, "num_warps": lambda size: 1 / size})
        found = search.search(KERNEL, CLASS, CPU, Call(run), timer)
    _forget()
    assert (found.after.sizes["BLOCK_M"], found.after.sizes["num_warps"]) == (64, 4)
    reasons = {attempt.failed for attempt in found.attempts if attempt.failed}
    assert "RuntimeError: out of resource: shared memory" in reasons
    assert any("computes something else" in reason for reason in reasons)
    json.dumps(found.to_dict(), allow_nan=False)


def test_sizes_in_use_that_fail_are_replaced_by_what_runs(gpu: Path) -> None:
    start = tuning.blocks(KERNEL, CLASS, CPU)

    def run() -> tuple[torch.Tensor, ...]:
        if tuning.blocks(KERNEL, CLASS, CPU)["num_warps"] >= start["num_warps"]:
            raise RuntimeError("too large")
        return (torch.ones(3),)

    found = search.search(KERNEL, CLASS, CPU, Call(run), clock({}))
    assert found.before.failed
    assert found.improved
    assert found.after.sizes["num_warps"] < start["num_warps"]


def test_where_nothing_runs_nothing_is_found() -> None:
    def run() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no")

    found = search.search(KERNEL, CLASS, CPU, Call(run), clock({}))
    assert not found.improved
    assert all(attempt.failed == "RuntimeError: no" for attempt in found.attempts)
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_is_not_faster_is_not_kept(gpu: Path) -> None:
    found = list(search.tune(CPU, [(KERNEL, CLASS)], timer=clock({}), calls=nothing))
    assert [each.improved for each in found] == [False]
    assert found[0].after == found[0].before
    assert not gpu.exists()


def test_luck_of_one_timing_is_not_kept(gpu: Path) -> None:
    """Every first timing of sizes other than those in use is lucky, no second one is."""
    start, seen = dict(tuning.blocks(KERNEL, CLASS, CPU)), set()

    def timer(call: Callable[[], Any]) -> float:
        sizes = tuning.blocks(KERNEL, CLASS, CPU)
        key = tuple(sizes.items())
        lucky = sizes != start and key not in seen
        seen.add(key)
        return 0.5 if lucky else 1.0

    assert not next(search.tune(CPU, [(KERNEL, CLASS)], timer=timer, calls=nothing)).improved
    assert not gpu.exists()


def test_an_interrupted_search_keeps_what_is_complete(gpu: Path) -> None:
    smaller = clock({"num_warps": lambda size: 1.0 / size})

    def timer(call: Callable[[], Any]) -> float:
        if tuning._tried.keys() == {("flash_decode", CLASS)}:
            raise KeyboardInterrupt
        return smaller(call)

    before = tuning.blocks("flash_decode", CLASS, CPU)
    with pytest.raises(KeyboardInterrupt):
        list(search.tune(CPU, [(KERNEL, CLASS), ("flash_decode", CLASS)], timer=timer, calls=nothing))
    kept = json.loads(gpu.read_text())
    assert kept["kernels"] == {KERNEL: {CLASS: dict(tuning.blocks(KERNEL, CLASS, CPU))}}
    assert kept["kernels"][KERNEL][CLASS]["num_warps"] == 16
    assert set(kept["versions"]) == {"loadstone", "torch", "triton"}
    assert kept["date"]
    assert tuning.blocks("flash_decode", CLASS, CPU) == before
    assert list(gpu.parent.iterdir()) == [gpu]


def test_a_dry_run_keeps_nothing_and_a_quick_one_takes_one_step(gpu: Path) -> None:
    timer = clock({"num_warps": lambda size: 1.0 / size})
    start = tuning.blocks(KERNEL, CLASS, CPU)["num_warps"]
    found = next(search.tune(CPU, [(KERNEL, CLASS)], timer=timer, calls=nothing, quick=True, keep=False))
    assert found.improved
    assert found.after.sizes["num_warps"] == 2 * start
    assert not gpu.exists()


def test_results_of_several_searches_are_kept_together(gpu: Path) -> None:
    timer = clock({"num_warps": lambda size: 1.0 / size})
    for shape_class in ("d64-16", "d128-16"):
        write(gpu, gpu.read_text()) if gpu.exists() else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.CLASS", shape_class)
            list(search.tune(CPU, [(KERNEL, shape_class)], timer=timer, calls=nothing))
    assert set(json.loads(gpu.read_text())["kernels"][KERNEL]) == {"d64-16", "d128-16"}


def test_selection() -> None:
    assert set(search.selection(CPU, ["flash_forward"])) == {("flash_forward", c) for c in ("d64-16", "d128-16")}
    every = search.selection(CPU, ["flash_forward"], ["all"])
    assert len(every) == len(tuning.shipped_table("interpreter")["flash_forward"])
    assert search.selection(CPU, (), ["d256-32"]) == [(k, "d256-32") for k in sorted(
        name for name in tuning.shipped_table("interpreter") if name.startswith("flash"))]  # fmt: skip
    assert {kernel for kernel, _ in search.selection(CPU)} == set(tuning.shipped_table("interpreter"))
    with pytest.raises(KernelError, match="did you mean 'flash_forward'"):
        search.selection(CPU, ["flash_foward"])
    with pytest.raises(KernelError, match="did you mean 'd64-16'"):
        search.selection(CPU, ["flash_forward"], ["d64-61"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_without_a_gpu_there_is_nothing_to_tune() -> None:
    with pytest.raises(KernelError, match=r"interpreter|sees no GPU"):
        search.gpu_to_tune()


def _every_kernel() -> list[tuple[str, str]]:
    return [(kernel, max(row, key=lambda name: name in search.COMMON))
            for kernel, row in sorted(tuning.shipped_table("interpreter").items())]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize(("kernel", "shape_class"), _every_kernel())
def test_every_kernel_has_a_call_that_runs_it_with_the_sizes_tried(kernel: str, shape_class: str) -> None:
    """In the interpreter, where the sizes that a launch gets are counted."""
    from loadstone.kernels.fused import launch

    call = call_of(kernel, shape_class, CPU)
    expected = [tensor.clone() for tensor in call.run()]
    sizes = dict(tuning.blocks(kernel, shape_class, CPU))
    for name in sizes:
        if name.startswith("BLOCK"):
            other = {**sizes, name: 2 * sizes[name], "num_warps": 2 * sizes["num_warps"]}
            break
    seen: list[int] = []
    inner = launch.launch
    with pytest.MonkeyPatch.context() as patch, tuning.trying(kernel, shape_class, other):
        for module in (
            "cross_entropy", "eight_bit", "flash_forward", "flash_backward", "flash_decode", "four_bit", "gate", "norm",
            "rotary",
        ):  # fmt: skip
            patch.setattr(
                f"loadstone.kernels.fused.{module}.launch",
                lambda *args, **options: (seen.append(options.get("num_warps", 0)), inner(*args, **options))[1],
            )
        result = call.run()
    assert other["num_warps"] in seen
    assert search._difference(tuple(result), tuple(expected)) is None


def test_a_result_that_differs_is_told_from_rounding() -> None:
    one = (torch.randn(100), torch.zeros(3))
    assert search._difference(one, one) is None
    assert search._difference((one[0] * 1.001, one[1]), one) is None
    assert search._difference((one[0].roll(1), one[1]), one) is not None
    assert search._difference((one[0], one[1] * torch.nan), one) is not None


def test_times_are_of_each_call() -> None:
    calls: list[int] = []
    seconds = timing.times(lambda: calls.append(1), CPU, 4)
    assert len(calls) == 4
    assert len(seconds) == 4
    assert min(seconds) >= 0
