"""load_into as a whole: reports, logging, progress, device maps, and no half-built models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from loadstone.loading import files, progress
from loadstone.loading import load as load_module
from loadstone.loading.report import LoadReport, human, merge_numbers


def test_a_perfect_load_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model, report = toy.load(toy.save(tmp_path, toy.weights(), shards=3))
    assert caplog.records == []
    assert report.fits
    assert report.loaded == len(toy.weights())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert report.seconds > 0
    assert report.device_map is None
    assert not hasattr(model, "hf_device_map")


def test_what_does_not_fit_is_logged_once_as_a_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {**toy.weights(), "extra.weight": torch.ones(2), "lm_head.weight": torch.zeros(12, 8)}
    for layer in range(toy.LAYERS):
        del tensors[f"model.layers.{layer}.norm.bias"]
    _, report = toy.load(toy.save(tmp_path, tensors), ignore_mismatched_sizes=True)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("loadstone.loading", "WARNING")
    for words in ("MISSING", "model.layers.{0-11}.norm.bias", "UNEXPECTED", "extra.weight", "MISMATCHED", "(12, 8)"):
        assert words in record.getMessage()
    assert str(report) in record.getMessage()
    info = report.loading_info()
    assert info["missing_keys"] == {f"model.layers.{layer}.norm.bias" for layer in range(toy.LAYERS)}
    assert info["unexpected_keys"] == {"extra.weight"}
    assert info["mismatched_keys"] == {("lm_head.weight", (12, 8), (11, 8))}
    assert json.loads(json.dumps(report.to_dict()))["unexpected"] == ["extra.weight"]


@pytest.mark.parametrize("given", ["cpu", {"": "cpu"}, torch.device("cpu")])
def test_hf_device_map_is_set_when_asked_for(tmp_path: Path, given: Any) -> None:
    model, report = toy.load(toy.save(tmp_path, toy.weights()), device_map=given)
    assert model.hf_device_map == report.device_map == {"": "cpu"}
    assert toy.same(model, toy.weights())


def test_a_map_of_parts_that_is_all_cpu_has_no_hooks(tmp_path: Path) -> None:
    model, _ = toy.load(toy.save(tmp_path, toy.weights()), device_map={"model": "cpu", "lm_head": "cpu"})
    assert model.hf_device_map == {"model": "cpu", "lm_head": "cpu"}
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert toy.same(model, toy.weights())


def test_meta_gives_a_model_without_weights(tmp_path: Path) -> None:
    tensors = toy.weights()
    del tensors["lm_head.weight"]
    model, report = toy.load(toy.save(tmp_path, tensors), device_map="meta", ties=toy.TIES)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed.weight
    assert report.bytes_total == 0
    assert model.hf_device_map == {"": "meta"}


def test_contexts_of_torch_do_not_matter(tmp_path: Path) -> None:
    toy.save(tmp_path, toy.weights(dtype=torch.bfloat16))
    with torch.device("meta"):
        model, _ = toy.load(tmp_path, device_map="cpu")
    assert toy.same(model, {name: tensor.float() for name, tensor in toy.weights(dtype=torch.bfloat16).items()})
    with torch.device("cpu"), torch.no_grad():
        model, _ = toy.load(tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("where", ["stream", "recompute_buffers", "_assign", "dispatch", "stream interrupted"])
def test_no_half_built_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    tensors = toy.weights(dtype=torch.bfloat16)
    del tensors["model.layers.5.up.weight"]
    toy.save(tmp_path, tensors)
    model = toy.meta()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    attributes = [{name: len(value) if hasattr(value, "__len__") else value for name, value in vars(module).items()}
                  for module in model.modules()]  # fmt: skip

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt if "interrupted" in where else OSError(28, "injected")

    if "interrupted" in where:
        monkeypatch.setattr(files, "advise", fail)
    elif where == "_assign":
        real = load_module._assign
        monkeypatch.setattr(load_module, "_assign", lambda *given: (real(*given), fail()))
    elif where == "dispatch":
        monkeypatch.setattr("loadstone.loading.dispatch.in_a_row", fail)
    else:
        monkeypatch.setattr(load_module, where, fail)
    with pytest.raises((OSError, KeyboardInterrupt)):
        toy.load(tmp_path, model, device_map="disk" if where == "dispatch" else "cpu")
    found = [{name: len(value) if hasattr(value, "__len__") else value for name, value in vars(module).items()}
             for module in model.modules()]  # fmt: skip
    assert found == attributes  # no hook, nor a note of one
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not hasattr(model, "hf_device_map")
    monkeypatch.undo()
    toy.load(tmp_path, model)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].float())


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = toy.meta()
    model.lm_head.weight.requires_grad_(False)
    toy.load(toy.save(tmp_path, toy.weights()), model)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]


class Bars:
    """Stands for tqdm."""

    def __init__(self) -> None:
        self.made: list[dict] = []
        self.seen = 0

    def __call__(self, **options: Any) -> Bars:
        self.made.append(options)
        self.seen += options["initial"]
        return self

    def update(self, count: int) -> None:
        self.seen += count

    def close(self) -> None:
        self.made[-1]["closed"] = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    bars = Bars()
    monkeypatch.setattr("tqdm.auto.tqdm", bars)
    monkeypatch.setattr(progress, "_is_terminal", lambda: True)
    return bars


def test_progress_when_wanted(tmp_path: Path, bars: Bars) -> None:
    tensors = toy.weights(dtype=torch.bfloat16)
    toy.load(toy.save(tmp_path, tensors), progress=True)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert bars.made == [
        {"total": total, "initial": 0, "desc": "Loading Toy", "unit": "B", "unit_scale": True, "leave": False,
         "closed": True}
    ]  # fmt: skip
    assert bars.seen == total


def test_progress_of_long_loads_only(bars: Bars, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress(progress.LARGE + 1, None, "x") as bar:
        bar(10)
        assert bars.made == []
        clock[0] = 1.5
        bar(5)
        bar(1)
    assert bars.seen == 16
    assert not progress.Progress(progress.LARGE, None, "x").watching
    assert not progress.Progress(progress.LARGE * 2, False, "x").watching
    monkeypatch.setattr(progress, "_is_terminal", lambda: False)
    assert not progress.Progress(progress.LARGE * 2, None, "x").watching


def test_short_loads_import_no_bar(tmp_path: Path, bars: Bars) -> None:
    toy.load(toy.save(tmp_path, toy.weights(dtype=torch.bfloat16)))
    assert bars.made == []


def test_numbers_merge() -> None:
    names = [f"layers.{number}.{part}" for part in ("a", "b.0.c") for number in (0, 1, 2, 5, 7, 8)]
    assert merge_numbers(names) == ["layers.{0-2, 5, 7, 8}.a", "layers.{0-2, 5, 7, 8}.b.0.c"]
    assert merge_numbers(["x", "h.3.y", "0.w", "1.w"]) == ["x", "h.3.y", "{0, 1}.w"]
    assert merge_numbers([]) == []


def test_reports_print_and_cut() -> None:
    report = LoadReport("here", "Toy", 3, missing=tuple("abcdefghij" * 1), unexpected=tuple(f"x{n}" for n in range(60)),
                        bytes_total=2_200_000_000, bytes_copied=2_200_000_000, seconds=0.5)  # fmt: skip
    text = str(report)
    assert "2.2 GB copied" in text
    assert "4.4 GB/s" in text
    assert "and 40 more" in text
    assert human(999) == "999 B"
    assert human(1500) == "1.5 kB"
    assert LoadReport("a", "b", 0).gb_per_second == 0
