"""Every form of device_map, what each refuses, and accelerate's planner on machines we do not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toy
from torch import nn

from loadstone.errors import DeviceMapError
from loadstone.loading.device_map import parse_size, place
from loadstone.loading.tree import survey

CPU, META = torch.device("cpu"), torch.device("meta")
no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without accelerator")
GIB = 2**30


@pytest.mark.parametrize("given", [None, "cpu", "cpu:0", CPU, {"": "cpu"}, {"model": CPU, "lm_head": "cpu"}])
def test_forms_of_cpu(given: Any) -> None:
    placement = place(toy.meta(), given)
    assert {placement.device_of(name) for name in toy.weights()} == {CPU}
    assert placement.given == (given is not None)


@no_accelerator
@pytest.mark.parametrize("given", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_nothing_to_share_out(given: str) -> None:
    assert place(toy.meta(), given).as_hf() == {"": "cpu"}


def test_names_match_at_boundaries_and_the_longest_wins() -> None:
    spec = {"": "cpu", "model.layers.1": "meta", "model.layers.10.up": "meta", "model.layers.10.up.bias": "cpu"}
    placement = place(toy.meta(), spec, must_exist=False)
    for name in survey(toy.meta()).weights:
        meta = name.startswith("model.layers.1.") or name == "model.layers.10.up.weight"
        assert placement.device_of(name) == (META if meta else CPU), name


def test_cuda_forms_for_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(given: Any) -> str:
        return str(place(toy.meta(), given, must_exist=False).main_device)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device("cuda") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device("cuda") == device({"": "cuda"}) == "cuda:3"
    assert device("cuda:1") == device(torch.device("cuda", 1)) == "cuda:1"
    assert place(toy.meta(), "cuda:1", must_exist=False).as_hf() == {"": 1}
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(DeviceMapError, match="LOCAL_RANK"):
        device("cuda")


@no_accelerator
@pytest.mark.parametrize("given", [0, "cuda", "cuda:9", "mps", torch.device("cuda:0"), {"": 0}, {"": "cuda:1"}])
def test_absent_devices(given: Any) -> None:
    with pytest.raises(DeviceMapError, match="not available"):
        place(toy.meta(), given)


BAD = {
    "unknown": ("gpu", "'gpu'"),
    "near a known one": ("auot", "did you mean 'auto'"),
    "negative": (-1, "negative"),
    "negative in a dict": ({"": -2}, "negative"),
    "bool": (True, "True"),
    "float": (0.5, "0.5"),
    "list": (["cpu"], "list|\\['cpu'\\]"),
    "empty": ({}, "no device for"),
    "None in a dict": ({"": None}, "None"),
    "unknown name": ({"": "cpu", "model.layer.1": "cpu"}, "'model.layer.1'.*did you mean 'model.layers.1'"),
    "not covered": ({"model": "cpu"}, "1 weights: 'lm_head.weight'"),
    "half a name": ({"model": "cpu", "lm_hea": "cpu"}, "lm_hea"),
    "disk": ("disk", "disk offload is not available"),
    "disk in a dict": ({"": "cpu", "lm_head": "disk"}, "disk offload is not available"),
    "meta beside cpu": ({"": "cpu", "lm_head": "meta"}, "mixes 'meta'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_maps(case: str) -> None:
    given, words = BAD[case]
    with pytest.raises(DeviceMapError, match=words):
        place(toy.meta(), given)


def test_all_uncovered_weights_are_counted() -> None:
    with pytest.raises(DeviceMapError, match=r"62 weights.*'model\.embed\.weight'.*and 50 more"):
        place(toy.meta(), {"lm_head": "cpu"})


def test_transient_buffers_need_no_device() -> None:
    children = dict.fromkeys(["model.embed", "model.layers", "model.scale", "lm_head"], "cpu")
    assert place(toy.meta(), children).find("model.rotary_emb.inv_freq") is None


def test_ties_split_over_devices() -> None:
    split = {"model": "cpu", "lm_head": "meta"}
    assert place(toy.meta(), split, must_exist=False).devices == (CPU, META)
    with pytest.raises(DeviceMapError, match=r"'lm_head.weight' is tied to 'model.embed.weight'.*meta and cpu"):
        place(toy.meta(), split, ties=toy.TIES, must_exist=False)


def test_none_honours_the_default_device() -> None:
    with torch.device("cpu"):
        assert place(toy.meta(), None).main_device == CPU
    model = toy.meta()
    with torch.device("meta"):
        with pytest.raises(DeviceMapError, match="device_map='meta'"):
            place(model, None)
        assert place(model, "cpu").main_device == CPU
        assert place(model, "meta").main_device == META


class Big(nn.Module):
    """Ten blocks of 4 GB and tied ends of 1 GB each, all on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(250_000, 1000)
        self.layers = nn.ModuleList([nn.Linear(1000, 1_000_000, bias=False) for _ in range(10)])
        self.head = nn.Linear(1000, 250_000, bias=False)


def share(kind: str, memory: dict, **options: Any) -> Any:
    model = toy.meta(kind=Big)
    placement = place(model, kind, max_memory=memory, no_split=("Linear",), must_exist=False, **options)
    assert model.head.weight is not model.embed.weight  # ties are only lent to the planner
    return placement


@pytest.mark.parametrize("kind", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_sharing_out_over_accelerators_of_another_machine(kind: str) -> None:
    memory: dict = {0: "32GiB", 1: "32GiB", "cpu": "64GiB", "disk": "1GiB"}
    placement = share(kind, memory, ties={"head.weight": "embed.weight"})
    model = toy.meta(kind=Big)
    used: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name != "head.weight":
            device = str(placement.device_of(name))
            used[device] = used.get(device, 0) + parameter.nbytes
    assert placement.device_of("head.weight") == placement.device_of("embed.weight")
    assert all(size <= 32 * GIB for device, size in used.items() if device != "cpu")
    if kind == "sequential":
        assert used["cuda:0"] > used["cuda:1"]
    elif kind == "balanced_low_0":
        assert used.get("cuda:0", 0) < used["cuda:1"]
    assert sum(used.values()) == 41 * 10**9


def test_what_fits_nowhere() -> None:
    with pytest.raises(DeviceMapError, match=r"no room for .*layers.*disk offload is not available"):
        share("auto", {0: "8GiB", "cpu": "10GiB"})


@no_accelerator
def test_cpu_limit() -> None:
    need = sum(tensor.nbytes for tensor in toy.weights().values()) + 16
    assert place(toy.meta(), "auto", max_memory={"cpu": need}).as_hf() == {"": "cpu"}
    with pytest.raises(DeviceMapError, match=f"needs {need} bytes"):
        place(toy.meta(), "auto", max_memory={"cpu": need - 1})
    tied = need - toy.weights()["lm_head.weight"].nbytes
    place(toy.meta(), "auto", max_memory={"cpu": tied}, ties=toy.TIES)


@pytest.mark.parametrize(
    "memory", [{0: "1 giga"}, {0: -1}, {"cuda:0": "1GB"}, {0: True}, {}, [1], {-1: "1GB"}, {0: "GB"}, {0: None}]
)
def test_bad_max_memory(memory: Any) -> None:
    with pytest.raises(DeviceMapError, match="max_memory"):
        place(toy.meta(), "auto", max_memory=memory, must_exist=False)


def test_sizes() -> None:
    assert parse_size("1.5GiB", "x") == 3 * 2**29
    assert parse_size("20gb", "x") == 20 * 10**9
    assert parse_size(7, "x") == 7
