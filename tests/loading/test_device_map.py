"""Every form of device_map, what each refuses, and accelerate's planner on machines we do not have."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import toy
from hypothesis import given as for_all
from hypothesis import strategies as st
from torch import nn

from loadstone.errors import DeviceMapError
from loadstone.loading.budget import budget, cpu_available, parse_size
from loadstone.loading.device_map import place
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
    "near disk": ("disc", "did you mean 'disk'"),
    "meta beside disk": ({"": "meta", "lm_head": "disk"}, "mixes 'meta'"),
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


def test_what_fits_nowhere_else_stays_on_disk_unless_that_is_limited() -> None:
    placement = share("auto", {0: "16GiB", "cpu": "10GiB"})
    assert set(placement.as_hf().values()) == {0, "cpu", "disk"}
    assert placement.shortfalls == ()
    short = share("auto", {0: "16GiB", "cpu": "10GiB", "disk": "1GiB"})
    assert [str(one.place) for one in short.shortfalls] == ["disk"]
    assert short.shortfalls[0].limit == GIB


def test_room_is_left_for_two_visiting_blocks_or_one() -> None:
    """Blocks that live on the CPU are used on the GPU: one at a time, with the next on its way if that fits."""
    placement = share("auto", {0: "16GiB", "cpu": "64GiB"})
    held = sum(
        p.nbytes for n, p in toy.meta(kind=Big).named_parameters() if placement.find(n) == torch.device("cuda:0")
    )
    assert placement.ahead
    assert placement.reserved == 2 * 4 * 10**9
    assert 16 * GIB - 12 * 10**9 < held <= 16 * GIB - 8 * 10**9
    assert not share("auto", {0: "7GiB", "cpu": "64GiB"}).ahead
    (short,) = share("auto", {0: "3GiB", "cpu": "64GiB"}).shortfalls
    assert short.needed == 4 * 10**9


def test_embeddings_make_room_for_blocks_that_would_visit() -> None:
    placement = share("auto", {0: "16GiB", "cpu": "64GiB"})
    assert str(placement.find("embed")) == "cpu"
    assert str(placement.find("layers.0")) == "cuda:0"
    tied = share("auto", {0: "16GiB", "cpu": "64GiB"}, ties={"head.weight": "embed.weight"})  # the head would visit
    assert str(tied.find("embed")) == str(tied.find("head")) == "cuda:0"
    small = share("sequential", {0: "9GiB", 1: "3GiB", "cpu": "64GiB"})  # a block fits neither, what is smaller does
    assert str(small.find("layers.3")) == "cpu"
    assert str(small.find("head")) == "cuda:0"


@pytest.mark.parametrize("kind", ["auto", "balanced", "sequential"])
def test_a_model_that_just_fits_is_not_offloaded(kind: str) -> None:
    """accelerate keeps a layer's room free for offloading that never happens; half the model on each of two fits."""
    half = 21_000_000_000
    placement = share(kind, {0: half, 1: half}, ties={"head.weight": "embed.weight"})
    assert set(placement.as_hf().values()) <= {0, 1}
    assert placement.shortfalls == ()


def test_where_it_all_fits_the_map_is_that_of_accelerate() -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    memory: dict = {0: "32GiB", 1: "32GiB", 2: "32GiB", "cpu": "64GiB"}
    for kind in ("balanced", "sequential"):
        model = toy.meta(kind=Big)
        limits = memory if kind == "sequential" else get_balanced_memory(model, memory, ["Linear"])
        theirs = infer_auto_device_map(model, limits, ["Linear"])
        ours = share(kind, memory)
        assert all(ours.find(name) == torch.device("cuda", device) for name, device in theirs.items())


class Embedded(nn.Module):
    """A table and blocks that nobody declared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 1000)
        self.stack = nn.ModuleList([nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000)) for _ in range(4)])
        self.scale = nn.Parameter(torch.ones(10))


@for_all(
    sizes=st.lists(st.integers(0, 45_000_000), min_size=0, max_size=3),
    cpu=st.integers(0, 45_000_000),
    kind=st.sampled_from(["auto", "balanced", "balanced_low_0", "sequential"]),
    tied=st.booleans(),
    classes=st.sampled_from([(), ("Sequential",), ("Linear",)]),
)
@tiny.examples(60)
def test_any_limits_are_kept(sizes: list[int], cpu: int, kind: str, tied: bool, classes: tuple[str, ...]) -> None:
    """Every weight has a place, blocks and ties are whole, and no limit is passed, or the plan says which."""
    ties = {"stack.3.1.weight": "embed.weight"} if tied else {}
    model = toy.meta(kind=Embedded)
    memory = {**dict(enumerate(sizes)), "cpu": cpu}
    placement = place(model, kind, max_memory=memory, no_split=classes, ties=ties, must_exist=False)
    used: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name not in ties:
            used[str(placement.place_of(name))] = used.get(str(placement.place_of(name)), 0) + parameter.nbytes
    limits = {**{f"cuda:{number}": size for number, size in enumerate(sizes)}, "cpu": cpu}
    short = {str(one.place) for one in placement.shortfalls}
    assert all(size <= limits[name] or name in short for name, size in used.items() if name != "disk")
    assert sum(used.values()) == sum(p.nbytes for n, p in model.named_parameters() if n not in ties)
    for target, source in ties.items():
        assert placement.find(target) == placement.find(source)
    for name, module in model.named_modules():
        if type(module).__name__ in classes:
            assert len({placement.find(f"{name}.{inner}") for inner, _ in module.named_parameters()}) == 1
    fits = sum(used.values()) <= max([*sizes, 0])
    assert not fits or "disk" not in used


@for_all(
    names=st.lists(st.sampled_from(sorted(survey(toy.meta()).modules)), max_size=6),
    places=st.lists(st.sampled_from(["cpu", "disk", 0, 1, "cuda:2"]), min_size=7, max_size=7),
)
@tiny.examples(60)
def test_every_weight_is_where_the_nearest_prefix_says(names: list[str], places: list[Any]) -> None:
    spec = {"": places[-1], **dict(zip(names, places, strict=False))}
    placement = place(toy.meta(), spec, must_exist=False)
    for name in toy.weights():
        nearest = max((n for n in spec if n == "" or name == n or name.startswith(f"{n}.")), key=len)
        wanted = {0: "cuda:0", 1: "cuda:1"}.get(spec[nearest], spec[nearest])
        assert str(placement.place_of(name)) == wanted, name


@no_accelerator
def test_cpu_limit() -> None:
    need = sum(tensor.nbytes for tensor in toy.weights().values()) + 16
    assert place(toy.meta(), "auto", max_memory={"cpu": need}).as_hf() == {"": "cpu"}
    spilled = place(toy.meta(), "auto", max_memory={"cpu": need - 1})
    assert set(spilled.as_hf().values()) == {"cpu", "disk"}
    assert spilled.shortfalls == ()
    tied = need - toy.weights()["lm_head.weight"].nbytes
    assert place(toy.meta(), "auto", max_memory={"cpu": tied}, ties=toy.TIES).as_hf() == {"": "cpu"}


@pytest.mark.parametrize("given", ["cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, None])
def test_limits_hold_for_maps_that_were_given_too(given: Any) -> None:
    need = sum(tensor.nbytes for tensor in toy.weights().values()) + 16
    assert place(toy.meta(), given, max_memory={"cpu": need}).shortfalls == ()
    (short,) = place(toy.meta(), given, max_memory={"cpu": need - 1}).shortfalls
    assert (short.needed, short.limit) == (need, need - 1)


@pytest.mark.parametrize(
    "memory",
    [{0: "1 giga"}, {0: -1}, {"cuda:x": "1GB"}, {"gpu": "1GB"}, {0: True}, {}, [1], {-1: "1GB"}, {0: "GB"}, {0: None},
     {True: 1}, {0: "1GB", "cuda:0": "2GB"}, {"meta": "1GB"}, {0: float("nan")}, {1000: "1GB"}, {0: "1e9"}],
)  # fmt: skip
def test_bad_max_memory(memory: Any) -> None:
    with pytest.raises(DeviceMapError, match="max_memory"):
        place(toy.meta(), "auto", max_memory=memory, must_exist=False)


@no_accelerator
def test_limits_of_devices_that_are_not_here() -> None:
    with pytest.raises(DeviceMapError, match="not available"):
        place(toy.meta(), "auto", max_memory={0: "1GB"})


def test_limits_in_every_spelling() -> None:
    def limits(memory: dict) -> dict[str, int]:
        return budget(memory, must_exist=False).by_place()

    wanted = {"cuda:0": 10**9, "cuda:1": 5, "cpu": 2 * GIB, "disk": 7}
    assert limits({0: "1GB", 1: 5, "cpu": "2GiB", "disk": 7}) == wanted
    assert limits({"1": "5", "cuda:0": "1 gb", torch.device("cpu"): "2 GiB", "disk": 7.0}) == wanted
    assert list(limits({1: 5, 0: 6, "cpu": 1})) == ["cuda:0", "cuda:1", "cpu"]  # in the order of their numbers
    assert 0 < limits({0: 1})["cpu"] <= cpu_available() * 1.01


def test_sizes() -> None:
    assert parse_size("1.5GiB", "x") == 3 * 2**29
    assert parse_size("20gb", "x") == 20 * 10**9
    assert parse_size(7, "x") == parse_size("7", "x") == 7
    assert parse_size(str(2**63 + 1), "x") == 2**63 + 1
