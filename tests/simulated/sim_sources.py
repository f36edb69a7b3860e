"""Weights of other sources over accelerators, CPU and disk: the same model as from safetensors, wherever they go."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulated import accelerator
from torch import nn

from loadstone import AutoModelForCausalLM
from loadstone.errors import DeviceMapError

IDS = torch.arange(22).view(2, 11) * 5 % 61
FORMS = ("zip", "older", "F32", "Q8_0", "state_dict")
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Any]]:
    """The arguments of from_pretrained for each form, and the model on the CPU that they mean."""
    gguf_files = pytest.importorskip("gguf") and __import__("gguf_files")
    place = tmp_path_factory.mktemp("src")
    model = tiny.checkpoint(place, "llama", **SIZES)
    found: dict[str, dict[str, Any]] = {}
    for form in ("zip", "older"):
        folder = place / form
        folder.mkdir()
        (folder / "config.json").write_bytes((place / "config.json").read_bytes())
        torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
        found[form] = {"name": folder, "use_safetensors": False}
    for form in ("F32", "Q8_0"):
        gguf_files.save(model, place / "gguf" / f"{form}.gguf", form)
        found[form] = {"name": place / "gguf", "gguf_file": f"{form}.gguf"}
    found["state_dict"] = {"name": None, "config": model.config, "state_dict": model.state_dict()}
    return {form: (arguments, load(arguments)) for form, arguments in found.items()}


def load(arguments: dict[str, Any], **options: Any) -> Any:
    rest = {key: value for key, value in arguments.items() if key != "name"}
    return AutoModelForCausalLM.from_pretrained(arguments["name"], attn_implementation="eager", **rest, **options)


def home_of(place: Any) -> torch.device:
    return torch.device("cpu") if place in ("cpu", "disk") else torch.device("sim", place)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@tiny.examples(5)
def test_any_map(sources: Any, form: str, data: st.DataObject) -> None:
    arguments, reference = sources[form]
    names = sorted(name for name, _ in reference.named_parameters())
    modules = ["model.layers.0", "model.layers.2.mlp", "model.embed_tokens", "lm_head", "model.norm", *names[::5]]
    spec: dict[str, Any] = {"": data.draw(st.sampled_from((0, 1, "cpu")))}
    places = (0, 1, 2, "cpu", "disk") if form in ("zip", "state_dict") else (0, 1, 2, "cpu")
    spec |= {name: data.draw(st.sampled_from(places)) for name in data.draw(st.lists(st.sampled_from(modules)))}
    dtype = data.draw(st.sampled_from((None, torch.bfloat16)))
    model = load(arguments, device_map=spec, dtype=dtype)
    ids = IDS if len(set(spec.values())) > 1 else IDS.to(model.device)
    for name, parameter in model.named_parameters():
        place = spec[max((n for n in spec if n == "" or name == n or name.startswith(f"{n}.")), key=len)]
        assert parameter.device == home_of(place), (spec, name)
        if place != "disk":  # what stays there is held in the file's dtype and cast when used
            assert torch.equal(parameter.cpu(), reference.get_parameter(name).to(model.dtype)), (spec, name)
    if dtype is None:
        with torch.no_grad():
            assert torch.allclose(model(ids).logits.cpu(), reference(IDS).logits, atol=1e-5), spec


@pytest.mark.parametrize("form", ["F32", "Q8_0"])
def test_what_must_be_made_cannot_stay_on_disk(sources: Any, form: str) -> None:
    with pytest.raises(DeviceMapError, match="Convert"):
        load(sources[form][0], device_map={"": 0, "model.layers.1": "disk"})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [0, "cpu", "auto"])
def test_quantized(sources: Any, form: str, place: Any) -> None:
    method = {"load_in_4bit": True}
    arguments, reference = sources[form]
    found = load(arguments, quantization_config=method, device_map=place)
    held = {"name": None, "config": reference.config, "state_dict": reference.state_dict()}
    right = load(held, quantization_config=method, device_map="cpu").state_dict()
    assert found.state_dict().keys() == right.keys()
    assert all(torch.equal(tensor.cpu(), right[name]) for name, tensor in found.state_dict().items())


def test_a_state_dict_on_a_device_is_shared_there(sources: Any) -> None:
    reference = sources["state_dict"][1]
    there = {name: nn.Parameter(tensor.to("sim:1")) for name, tensor in reference.state_dict().items()}
    held = {"name": None, "config": reference.config, "state_dict": there}
    model = load(held, device_map=1)
    assert all(model.state_dict()[name].data_ptr() == tensor.data_ptr() for name, tensor in there.items())
    moved = load(held, device_map={"": "cpu", "lm_head": 2})
    assert torch.equal(moved.model.norm.weight, reference.model.norm.weight)
    assert moved.lm_head.weight.device == torch.device("sim", 2)
    assert accelerator.COUNT > 2
