"""Models trained on meshes, once for all tests: starting processes takes longer than what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from parallel import ranks, steps
from parallel.steps import Case


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return steps.checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def on_four(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{name of a case: (case, what each of four ranks told)}."""
    saved = tmp_path_factory.mktemp("saved")
    cases = [
        Case("llama", places["llama"], "fsdp", (4,), save_to=saved / "by_fsdp"),
        Case("llama", places["llama"], "tp", (4,)),
        Case("llama", places["llama"], "fsdp+tp", (2, 2), save_to=saved / "by_both"),
        Case("llama", places["llama"], "hsdp", (2, 2), steps=3),
        Case("gpt2", places["gpt2"], "fsdp+tp", (2, 2), steps=3, save_to=saved / "gpt2_by_both"),
        *(Case("llama", places[name], "tp", (4,), save_to=saved / name.replace(" ", "_")) for name in steps.HEADS),
        Case("llama", places["one key"], "fsdp+tp", (2, 2), save_to=saved / "one_key_by_both"),
        Case("mistral", places["mistral"], "tp", (4,), steps=3),
    ]
    return _run(cases, 4)


@pytest.fixture(scope="session")
def on_two(places: dict[str, Path], on_four: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same of two ranks; what four have saved is loaded by them too."""
    saved = tmp_path_factory.mktemp("saved")
    cases = [Case(kind, places[kind], strategy, (2,)) for kind in tiny.KINDS for strategy in ("fsdp", "tp")]
    few: dict[str, Any] = {"steps": 3}
    cases += [
        Case("llama", places["tied"], strategy, (2,), **few, save_to=saved / f"by_{strategy}")
        for strategy in ("fsdp", "tp")
    ]
    cases += [Case("llama", places["llama"], strategy, (2,), **few, checkpointing=True) for strategy in ("fsdp", "tp")]
    for place in ("biased", "qwen2"):
        cases.append(Case(place, places[place], "tp", (2,), **few, save_to=saved / place))
    cases.append(Case("llama", places["llama"], "hsdp+tp", (1, 1, 2), **few))
    cases.append(Case("llama", places["three keys"], "tp", (2,), **few, checkpointing=True))
    cases += [Case("llama", places["llama"], "tp", (2,), **few, options={"disable_mmap": True, "dtype": "bfloat16"})]
    for case, _ in on_four.values():
        if case.save_to is not None:
            strategies = ("tp",) if case.place.name in steps.HEADS else ("fsdp", "tp")
            cases += [Case(case.kind, case.save_to, strategy, (2,), steps=1) for strategy in strategies]
    return _run(cases, 2)


def _run(cases: list[Case], count: int) -> dict[str, Any]:
    told = ranks.results(steps.trained, count, cases)
    return {str(case): (case, [by_rank[number] for by_rank in told]) for number, case in enumerate(cases)}
