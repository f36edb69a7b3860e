"""Packed layers on their way from files: the plan, the bytes, the memory it takes, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from loadstone import BitsAndBytesConfig, Linear4bit
from loadstone.errors import (
    FormatError,
    IntegrityError,
    MissingWeightsError,
    QuantizationError,
    ShapeMismatchError,
)
from loadstone.loading import accelerator
from loadstone.loading.files import Files
from loadstone.loading.load import load_into
from loadstone.loading.plan import make_plan
from loadstone.loading.report import LoadReport
from loadstone.quant import find_quantizer
from loadstone.quant.eight_bit import quantize_rows
from loadstone.quant.four_bit import quantize_4bit

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "nf4-as-bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


def quantized(option: str, dtype: torch.dtype = torch.float32, packed: bool = False, **more: Any) -> Any:
    """The toy model on meta with packed layers; its head is left alone."""
    config = BitsAndBytesConfig(**{**CONFIGS[option], "llm_int8_skip_modules": ["lm_head"], **more})
    quantizer = find_quantizer("toy", config.to_dict() if packed else None, None if packed else config)
    model = toy.meta(dtype)
    quantizer.replace(model)
    return model


def packed_checkpoint(directory: Path, option: str = "nf4-double") -> Path:
    """A checkpoint of the toy model that is packed already."""
    toy.save(directory / "full", toy.weights())
    model, _ = toy.load(directory / "full", quantized(option))
    return toy.save(directory / "packed", {name: tensor.clone() for name, tensor in model.state_dict().items()})


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", CONFIGS)
def test_bytes_are_those_of_quantizing_by_hand(tmp_path: Path, option: str, dtype: torch.dtype, shards: int) -> None:
    """In the model's dtype, which the weights are cast to first; everything else loads as ever."""
    weights = toy.weights(dtype=torch.float32)
    toy.save(tmp_path, weights, shards)
    model, report = toy.load(tmp_path, quantized(option, dtype), strict=True)
    state = model.state_dict()
    for name, weight in weights.items():
        cast = weight.to(dtype)
        if name.endswith(("up.weight", "down.weight")):
            if option == "int8":
                rows, scb = quantize_rows(cast)
                wanted = {"weight": rows, "SCB": scb, "weight_format": torch.zeros((), dtype=torch.uint8)}
            else:
                asked = BitsAndBytesConfig(**CONFIGS[option])
                packed, held = quantize_4bit(
                    cast,
                    quant_type=asked.bnb_4bit_quant_type,
                    double_quant=asked.bnb_4bit_use_double_quant,
                    storage=asked.bnb_4bit_quant_storage,
                )
                wanted = {"weight": packed, **{f"weight.{key}": part for key, part in held.to_tensors().items()}}
            for part, tensor in wanted.items():
                found = state.pop(name.removesuffix("weight") + part)
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(raw(found), raw(tensor))
        elif "inv_freq" not in name:
            assert torch.equal(state.pop(name), cast)
    assert not state
    assert report.bytes_quantized == 2 * toy.LAYERS * 3 * toy.WIDTH**2 * 4
    packed_layers = [module for module in model.modules() if hasattr(type(module), "checkpoint_names")]
    held_bytes = sum(getattr(layer, name).nbytes for layer in packed_layers for name in layer.packed_attributes())
    assert abs(report.bytes_packed - held_bytes) < 40 * len(packed_layers)  # the JSON has no fixed length
    assert all(layer.weight.requires_grad is False for layer in packed_layers)


@pytest.mark.parametrize("option", CONFIGS)
def test_packed_checkpoints_are_mapped(tmp_path: Path, option: str) -> None:
    directory = packed_checkpoint(tmp_path, option)
    model, report = toy.load(directory, quantized(option, packed=True), strict=True)
    files = load_file(directory / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == files.keys()
    assert all(torch.equal(raw(state[name]), raw(files[name])) for name in files)
    assert report.bytes_quantized == 0
    assert report.bytes_mapped > 0.9 * report.bytes_total
    x = torch.randn(2, toy.WIDTH)
    wanted = toy.load(tmp_path / "full", quantized(option))[0].model.layers[3].up
    assert torch.equal(model.model.layers[3].up(x), wanted(x))


def test_the_plan_counts_before_and_after(tmp_path: Path) -> None:
    toy.save(tmp_path, toy.weights())
    plan = make_plan(quantized("nf4"), toy.opened(tmp_path))
    moves = [move for move in plan.moves if move.transform == "quantize"]
    assert len(moves) == 2 * toy.LAYERS
    before, after = plan.bytes_quantized()
    assert before == sum(move.entry.nbytes for move in moves) == 2 * toy.LAYERS * 3 * toy.WIDTH**2 * 4
    assert after == plan.bytes_by_transform()["quantize"] < before / 1.5
    assert not plan.missing
    assert not plan.unexpected
    assert sum(plan.memory_by_device().values()) < sum(tensor.nbytes for tensor in toy.weights().values()) - before / 2
    assert "to quantize" in str(plan)
    assert f"{before / 1000:.1f} kB to {after / 1000:.1f} kB" in str(plan)
    report = LoadReport("x", "Toy", 3, bytes_total=before, bytes_quantized=before, bytes_packed=after, seconds=1.0)
    assert "quantized to" in str(report)
    assert report.to_dict()["bytes_packed"] == after


def test_to_meta(tmp_path: Path) -> None:
    toy.save(tmp_path, toy.weights())
    model, _ = toy.load(tmp_path, quantized("nf4-double"), device_map="meta")
    assert all(tensor.is_meta for name, tensor in model.state_dict().items() if "scale" not in name)


@pytest.mark.parametrize("option", CONFIGS)
def test_what_is_sent_to_a_device_is_quantized_there(tmp_path: Path, option: str) -> None:
    """The way to accelerators, walked to the CPU."""
    toy.save(tmp_path, toy.weights())
    checkpoint = toy.opened(tmp_path)
    plan = make_plan(quantized(option), checkpoint)
    files, seen = Files(checkpoint), []
    moves = [move for move in plan.moves if move.transform == "quantize"]
    tensors = accelerator.send(moves, files, seen.append)
    state = toy.load(tmp_path, quantized(option))[0].state_dict()
    assert tensors.keys() == {name for name in state if "layers" in name and "norm" not in name and "bias" not in name}
    assert all(torch.equal(raw(tensors[name]), raw(state[name])) for name in tensors)
    assert sum(seen) == plan.bytes_quantized()[0]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5), st.integers(1, 3))
@tiny.examples(15)
def test_any_shapes_and_any_threads(tmp_path: Path, shapes: list[tuple[int, int]], threads: int) -> None:
    model = nn.ModuleList([nn.Linear(into, out, bias=False, device="meta") for out, into in shapes])
    tensors = {f"{number}.weight": torch.randn(shape) for number, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "model.safetensors")
    find_quantizer("x", None, BitsAndBytesConfig(load_in_4bit=True)).replace(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loadstone.loading.quantize.threads_for", lambda shares: threads)
        load_into(model, toy.opened(tmp_path), strict=True)
    for number, layer in enumerate(model):
        wanted = Linear4bit.from_linear(_linear(tensors[f"{number}.weight"]), compress_statistics=False)
        assert torch.equal(layer.weight, wanted.weight)
        assert torch.equal(layer.absmax, wanted.absmax)


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


@linux
@pytest.mark.parametrize("option", ["nf4-double", "int8"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_memory_is_the_packed_model_and_a_few_tensors(tmp_path: Path, option: str, stored: torch.dtype) -> None:
    """The highest private memory in between, with a cast on the way, and whether the file's pages were let go."""
    count, size = 32, 1024
    model = nn.ModuleList(
        [nn.Linear(size, size, bias=False, device="meta", dtype=torch.bfloat16) for _ in range(count)]
    )
    save_file({f"{n}.weight": torch.randn(size, size).to(stored) for n in range(count)}, tmp_path / "model.safetensors")
    find_quantizer("x", None, BitsAndBytesConfig(**CONFIGS[option])).replace(model)
    load_into(_one(option), toy.opened(_one_file(tmp_path / "one")))  # tables and threads that stay
    gc.collect()
    before, most = _rss_kb("RssAnon"), 0
    files_before, most_of_files = _rss_kb("RssFile"), 0

    def watch() -> None:
        nonlocal most, most_of_files
        while not done.wait(0.001):
            most = max(most, _rss_kb("RssAnon"))
            most_of_files = max(most_of_files, _rss_kb("RssFile"))

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    load_into(model, toy.opened(tmp_path), strict=True)
    done.set()
    watcher.join()
    packed = sum(t.nbytes for layer in model for t in layer.state_dict().values()) // 1024
    one, source = size * size * 2 // 1024, size * size * stored.itemsize // 1024
    # Two threads: a tensor cast to bf16 each, and what the codec works with. All tensors together would be 64 MiB.
    assert most - before < packed + 2 * (one + 8 * 1024)
    assert most_of_files - files_before < 6 * source
    assert _rss_kb("RssFile") - files_before < source


def _one(option: str) -> nn.Module:
    model = nn.ModuleList([nn.Linear(64, 64, bias=False, device="meta")])
    find_quantizer("x", None, BitsAndBytesConfig(**CONFIGS[option])).replace(model)
    return model


def _one_file(directory: Path) -> Path:
    return toy.save(directory, {"0.weight": torch.randn(64, 64)})


def _rss_kb(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def untouched(model: nn.Module) -> bool:
    return all(t.is_meta for name, t in model.state_dict().items())


def test_missing_weights_of_packed_layers(tmp_path: Path) -> None:
    """Also without strict: codes cannot be initialised. A missing bias can."""
    weights = toy.weights()
    toy.save(tmp_path / "a", {n: t for n, t in weights.items() if n != "model.layers.2.up.weight"})
    model = quantized("nf4")
    with pytest.raises(MissingWeightsError, match=r"codes cannot be initialised: 'model.layers.2.up.weight'"):
        toy.load(tmp_path / "a", model)
    assert untouched(model)
    toy.save(tmp_path / "b", {n: t for n, t in weights.items() if n != "model.layers.2.up.bias"})
    model, report = toy.load(tmp_path / "b", quantized("nf4"), initialize=_only_biases)
    assert report.missing == ("model.layers.2.up.bias",)
    assert model.model.layers[2].up.bias.unique().tolist() == [0.25]


def _only_biases(module: nn.Module) -> None:
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter):
        bias.fill_(0.25)


@pytest.mark.parametrize("ignore", [False, True])
def test_mismatched_weights_of_packed_layers(tmp_path: Path, ignore: bool) -> None:
    toy.save(tmp_path, {**toy.weights(), "model.layers.2.up.weight": torch.ones(7, 8)})
    model = quantized("int8")
    with pytest.raises(ShapeMismatchError, match=r"\(7, 8\), the model expects \(24, 8\)"):
        toy.load(tmp_path, model, ignore_mismatched_sizes=ignore)
    assert untouched(model)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_integers_cannot_be_quantized(tmp_path: Path, dtype: torch.dtype) -> None:
    toy.save(tmp_path, {**toy.weights(), "model.layers.2.up.weight": torch.ones(24, 8).to(dtype)})
    model = quantized("int8")
    with pytest.raises((FormatError, ShapeMismatchError), match=r"model.layers.2.up.weight"):
        toy.load(tmp_path, model)
    assert untouched(model)


@pytest.mark.parametrize("option", ["nf4", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_without_a_code_are_named_and_nothing_is_left(tmp_path: Path, option: str, bad: float) -> None:
    weights = toy.weights()
    weights["model.layers.7.down.weight"][1, 2] = bad
    toy.save(tmp_path, weights)
    model = quantized(option)
    with pytest.raises(QuantizationError, match=r"'model.layers.7.down.weight' in model.safetensors.*infinities"):
        toy.load(tmp_path, model)
    assert untouched(model)


def test_floating_point_beside_its_codes(tmp_path: Path) -> None:
    tensors = load_file(packed_checkpoint(tmp_path, "nf4") / "model.safetensors")
    toy.save(tmp_path / "both", {**tensors, "model.layers.0.up.weight": torch.ones(24, 8)})
    with pytest.raises(IntegrityError, match="in floating point"):
        toy.load(tmp_path / "both", quantized("nf4"))


def test_floating_point_where_the_checkpoint_says_packed(tmp_path: Path) -> None:
    toy.save(tmp_path, toy.weights())
    for option in ("nf4", "int8"):
        with pytest.raises(FormatError, match="cannot become"):
            toy.load(tmp_path, quantized(option, packed=True))


def json_bytes(**facts: Any) -> torch.Tensor:
    good = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [24, 8], "nested_blocksize": 256,
            "nested_dtype": "float32", "nested_offset": 0.5}  # fmt: skip
    text = json.dumps({name: value for name, value in {**good, **facts}.items() if value is not ...})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


LAYER = "model.layers.3.up."
STATE = "weight.quant_state.bitsandbytes__nf4"
Change = Callable[[dict[str, torch.Tensor]], Any]
WRONG: dict[str, Change] = {
    "no absmax": lambda t: t.pop(LAYER + "weight.absmax"),
    "no state": lambda t: t.pop(LAYER + STATE),
    "no nested_absmax": lambda t: t.pop(LAYER + "weight.nested_absmax"),
    "no weight": lambda t: t.pop(LAYER + "weight"),
    "truncated JSON": lambda t: t.update({LAYER + STATE: t[LAYER + STATE][:-9].clone()}),
    "empty JSON": lambda t: t.update({LAYER + STATE: torch.empty(0, dtype=torch.uint8)}),
    "deep JSON": lambda t: t.update({LAYER + STATE: torch.tensor(list(b"[" * 9000), dtype=torch.uint8)}),
    "not UTF-8": lambda t: t.update({LAYER + STATE: torch.full((80,), 255, dtype=torch.uint8)}),
    "JSON of floats": lambda t: t.update({LAYER + STATE: torch.ones(80)}),
    "huge shape": lambda t: t.update({LAYER + STATE: json_bytes(shape=[1 << 40, 1 << 40])}),
    "negative shape": lambda t: t.update({LAYER + STATE: json_bytes(shape=[-24, -8])}),
    "shape of another layer": lambda t: t.update({LAYER + STATE: json_bytes(shape=[8, 24])}),
    "other type": lambda t: t.update({LAYER + STATE: json_bytes(quant_type="fp4")}),
    "blocksize 0": lambda t: t.update({LAYER + STATE: json_bytes(blocksize=0)}),
    "other blocksize": lambda t: t.update({LAYER + STATE: json_bytes(blocksize=32)}),
    "dtype of code": lambda t: t.update({LAYER + STATE: json_bytes(dtype="__import__")}),
    "offset NaN": lambda t: t.update({LAYER + STATE: json_bytes(nested_offset=float("nan"))}),
    "no offset": lambda t: t.update({LAYER + STATE: json_bytes(nested_offset=...)}),
    "absmax too short": lambda t: t.update({LAYER + "weight.absmax": t[LAYER + "weight.absmax"][:-1].clone()}),
    "absmax in two axes": lambda t: t.update({LAYER + "weight.absmax": t[LAYER + "weight.absmax"].view(1, -1)}),
    "absmax of another dtype": lambda t: t.update({LAYER + "weight.absmax": t[LAYER + "weight.absmax"].float()}),
    "nested_absmax NaN": lambda t: t.update({LAYER + "weight.nested_absmax": torch.tensor([float("nan")])}),
    "other codes": lambda t: t.update({LAYER + "weight.quant_map": torch.linspace(-1, 1, 16)}),
    "weight too short": lambda t: t.update({LAYER + "weight": t[LAYER + "weight"][:-1].clone()}),
    "weight of another dtype": lambda t: t.update({LAYER + "weight": t[LAYER + "weight"].to(torch.int16)}),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_hostile_packed_checkpoints(tmp_path: Path, change: Change) -> None:
    """A typed error that names the layer or the tensor, before anything is loaded."""
    directory = packed_checkpoint(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    shutil.rmtree(directory)
    toy.save(directory, tensors)
    model = quantized("nf4-double", packed=True)
    with pytest.raises(
        (QuantizationError, MissingWeightsError, ShapeMismatchError, FormatError), match=r"model\.layers\.3\.up"
    ):
        toy.load(directory, model)
    assert untouched(model)


@given(st.binary(max_size=200))
@tiny.examples(40)
def test_any_bytes_for_the_state(tmp_path: Path, text: bytes) -> None:
    """Whatever stands where the JSON belongs, nothing but a QuantizationError comes of it."""
    layer = Linear4bit.from_linear(nn.Linear(8, 24), quant_type="nf4")
    parts = {name: getattr(layer, name) for name in layer.packed_attributes()}
    parts["quant_state"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(QuantizationError):
        layer.check_parts(parts)


@pytest.mark.parametrize("part", ["SCB", "weight_format", "weight"])
def test_int8_without_a_part(tmp_path: Path, part: str) -> None:
    directory = packed_checkpoint(tmp_path, "int8")
    tensors = load_file(directory / "model.safetensors")
    del tensors[LAYER + part]
    toy.save(directory, tensors)
    model = quantized("int8", packed=True)
    with pytest.raises(MissingWeightsError, match=rf"{LAYER}{part}"):
        toy.load(directory, model)
    assert untouched(model)


@pytest.mark.parametrize(("part", "value"), [("weight_format", torch.tensor(1, dtype=torch.uint8)),
                                              ("SCB", torch.full((24,), float("inf")))])  # fmt: skip
def test_int8_that_cannot_be_read(tmp_path: Path, part: str, value: torch.Tensor) -> None:
    directory = packed_checkpoint(tmp_path, "int8")
    tensors = load_file(directory / "model.safetensors")
    toy.save(directory, {**tensors, LAYER + part: value})
    model = quantized("int8", packed=True)
    with pytest.raises(QuantizationError, match=rf"{LAYER[:-1]}.*{part}"):
        toy.load(directory, model)
    assert untouched(model)


def test_another_blocksize_is_taken_over(tmp_path: Path) -> None:
    tensors = load_file(packed_checkpoint(tmp_path, "nf4") / "model.safetensors")
    weight = torch.randn(24, 8)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=128)
    parts = {f"{LAYER}weight.{name}": tensor for name, tensor in state.to_tensors().items()}
    toy.save(tmp_path / "128", {**tensors, LAYER + "weight": packed, **parts})
    model, _ = toy.load(tmp_path / "128", quantized("nf4", packed=True), strict=True)
    layer = model.model.layers[3].up
    assert layer.blocksize == 128
    wanted = Linear4bit.from_linear(_linear(weight), quant_type="nf4", blocksize=128, compress_statistics=False)
    assert torch.equal(layer.dequantized_weight(), wanted.dequantized_weight())
    assert model.model.layers[2].up.blocksize == 64


def test_a_recipe_that_does_not_keep_its_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.save(tmp_path, toy.weights())
    honest = Linear4bit.load_recipe

    def recipe(self: Linear4bit, attribute: str) -> Any:
        found = honest(self, attribute)
        return found and found._replace(run=lambda weight: {"weight": weight})

    monkeypatch.setattr(Linear4bit, "load_recipe", recipe)
    model = quantized("nf4")
    with pytest.raises(QuantizationError, match="says it makes"):
        toy.load(tmp_path, model)
    assert untouched(model)


def test_strategies_count_packed_bytes(tmp_path: Path) -> None:
    """What fits on one device packed, and does not in floating point."""
    pytest.importorskip("accelerate", reason="accelerate, which shares models out, is not installed")
    layers = {f"{number}.weight": torch.ones(64, 64) for number in range(8)}
    toy.save(tmp_path, layers)
    full, packed = (nn.ModuleList([nn.Linear(64, 64, bias=False, device="meta") for _ in layers]) for _ in range(2))
    find_quantizer("x", None, BitsAndBytesConfig(load_in_8bit=True)).replace(packed)
    size = sum(make_plan(packed, toy.opened(tmp_path)).memory_by_device().values())
    asked: dict[str, Any] = {"device_map": "sequential", "max_memory": {0: size * 2, "cpu": 10**9}}
    asked["devices_must_exist"] = False
    assert make_plan(packed, toy.opened(tmp_path), **asked).placement.devices == (torch.device("cuda", 0),)
    assert len(make_plan(full, toy.opened(tmp_path), **asked).placement.devices) == 2
