"""Any map, at any depth, over accelerators, CPU and disk: the same logits, and every weight where the map says."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulated import accelerator

from loadstone import AutoModelForCausalLM, StaticCache
from loadstone.errors import DeviceMapError, OffloadError
from loadstone.loading.source import resolve_source
from loadstone.models.guest import load_guest

LAYERS = {"llama": "model.layers", "mistral": "model.layers", "gpt2": "transformer.h"}
IDS = torch.arange(22).view(2, 11) * 5 % 61
MASK = torch.ones(2, 11, dtype=torch.long).index_fill(1, torch.arange(3), 0)
PLACES = ["cpu", "disk", 0, 1, 2, "sim:1"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A checkpoint of each architecture, and the model it is of, on the CPU."""
    made = {}
    for kind in tiny.KINDS:
        place = tmp_path_factory.mktemp(kind)
        made[kind] = (place, tiny.checkpoint(place, kind, num_hidden_layers=3))
    return made


def load(checkpoints: Any, kind: str, device_map: Any, **options: Any) -> Any:
    options.setdefault("attn_implementation", "eager")
    return AutoModelForCausalLM.from_pretrained(checkpoints[kind][0], device_map=device_map, **options)


def names(kind: str) -> list[str]:
    """All that a map can name."""
    model = tiny.model(kind, num_hidden_layers=3)
    return sorted({name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()})


def nearest(spec: dict[str, Any], name: str) -> Any:
    return spec[max((n for n in spec if n == "" or name == n or name.startswith(f"{n}.")), key=len)]


def home_of(place: Any) -> torch.device:
    if place in ("cpu", "disk"):
        return torch.device("cpu")
    return torch.device("sim", place) if isinstance(place, int) else torch.device(place)


@pytest.mark.parametrize("kind", tiny.KINDS)
@given(data=st.data())
@tiny.examples(5)
def test_any_map_gives_the_same_logits(checkpoints: Any, kind: str, data: st.DataObject) -> None:
    reference = checkpoints[kind][1]
    spec = {"": data.draw(st.sampled_from(PLACES))}
    chosen = data.draw(st.lists(st.sampled_from(names(kind)), max_size=6))
    spec.update({name: data.draw(st.sampled_from(PLACES)) for name in chosen})
    for target, source in reference.active_ties().items():
        spec[target] = nearest(spec, source)
    model = load(checkpoints, kind, spec)
    ids = IDS if len(set(spec.values())) > 1 else IDS.to(model.device)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits.cpu(), reference(IDS).logits, atol=1e-5), spec
        padded = model(ids, attention_mask=MASK.to(ids.device)).logits.cpu()
        assert torch.allclose(padded[:, 3:], reference(IDS, attention_mask=MASK).logits[:, 3:], atol=1e-5), spec
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter.device == home_of(nearest(spec, name)), (spec, name)
    assert {str(key): str(value) for key, value in model.hf_device_map.items()} == {
        name: str(home_of(place)) if place != "disk" else "disk" for name, place in spec.items()
    }


MIXED = [
    {"": 0, "{}.1": 1, "{}.2": "cpu"},
    {"": 1, "{}.0": "disk", "{}.1": "cpu", "{}.2": 0},
    {"": "cpu", "{}.1": 2},
    {"": "disk", "{}.0": 0},
]


def mixed(kind: str) -> list[dict[str, Any]]:
    return [{name.format(LAYERS[kind]): place for name, place in spec.items()} for spec in MIXED]


@pytest.mark.parametrize(("kind", "number"), [("llama", 3), ("mistral", 0), ("gpt2", 1)])
def test_generation(checkpoints: Any, kind: str, number: int) -> None:
    reference, model = checkpoints[kind][1], load(checkpoints, kind, mixed(kind)[number])
    for options in ({"num_beams": 2, "attention_mask": MASK}, {"cache_implementation": "static"}):
        options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, **options}
        wanted = reference.generate(IDS, **options)
        assert torch.equal(model.generate(IDS.to(model.device), **options).cpu(), wanted), options
    cache = StaticCache(model.config, 20)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        step = model(IDS[:, :1], past_key_values=cache).logits
    ids = torch.cat((IDS, IDS[:, :1]), 1)
    assert torch.allclose(step[:, -1].cpu(), reference(ids).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_outputs_come_back_to_where_the_inputs_were(checkpoints: Any, kind: str) -> None:
    reference = checkpoints[kind][1]
    model = load(checkpoints, kind, mixed(kind)[0])
    assert model.device == torch.device("sim:0")
    for device in ("cpu", "sim:2"):
        out = model(IDS.to(device), labels=IDS.to(device), output_hidden_states=True, output_attentions=True)
        wanted = reference(IDS, labels=IDS, output_hidden_states=True, output_attentions=True)
        assert torch.allclose(out.loss.cpu(), wanted.loss, atol=1e-5)
        for field in ("hidden_states", "attentions"):
            for one, other in zip(out[field], wanted[field], strict=True):
                assert one.device == torch.device(device)
                assert torch.allclose(one.cpu(), other, atol=1e-5)
    picked = model(IDS, logits_to_keep=torch.tensor([1, 4])).logits
    assert torch.allclose(picked, reference(IDS).logits[:, [1, 4]], atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_disk_of_another_dtype_are_cast_when_used(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    tiny.checkpoint(tmp_path, "llama", stored=stored)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"": "disk", "model.layers.1": 0, "model.norm": "cpu"}, **options
    )
    assert spread.dtype == dtype
    with torch.no_grad():
        assert torch.allclose(spread(IDS).logits, whole(IDS).logits, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    state = spread.state_dict()
    for name, tensor in whole.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name].cpu(), tensor), name


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_whole_model_is_saved(checkpoints: Any, kind: str, tmp_path: Path) -> None:
    reference = checkpoints[kind][1]
    for number, spec in enumerate(mixed(kind)):
        model = load(checkpoints, kind, spec)
        assert {n: t.device.type for n, t in model.state_dict().items()}.keys() == reference.state_dict().keys()
        model.save_pretrained(tmp_path / str(number), max_shard_size="20kB")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        for name, tensor in reference.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    assert model.num_parameters() == reference.num_parameters()
    assert model.get_memory_footprint() == reference.get_memory_footprint()


def test_a_spread_model_cannot_be_moved(checkpoints: Any) -> None:
    model = load(checkpoints, "llama", mixed("llama")[0])
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    moves = [
        lambda: model.to("cpu"), lambda: model.to("sim:1"), lambda: model.half(), lambda: model.to(torch.bfloat16),
        lambda: model.cpu(), lambda: model.model.to("cpu"), lambda: model.model.layers[2].to("sim:0"),
    ]  # fmt: skip
    for move in moves:
        with pytest.raises(OffloadError, match="hf_device_map"):
            move()
    assert model.to(torch.float32) is model  # nothing to do
    for name, parameter in model.named_parameters():
        assert before[name] == parameter.data_ptr()
    assert torch.allclose(model(IDS).logits, checkpoints["llama"][1](IDS).logits, atol=1e-5)


def test_copies_of_a_spread_model_run_on_their_own(checkpoints: Any) -> None:
    reference = checkpoints["llama"][1]
    model = load(checkpoints, "llama", {"": "cpu", "model.layers.1": "disk", "lm_head": 0})
    twin = copy.deepcopy({"m": model.model.layers[1]})["m"]
    assert twin.self_attn.q_proj.weight.device.type == "cpu"
    cpu_only = load(checkpoints, "llama", "disk")
    for clone in (copy.deepcopy(cpu_only), pickle.loads(pickle.dumps(cpu_only))):
        with torch.no_grad():
            clone.model.layers[0].mlp.up_proj.weight.zero_()
        assert not torch.allclose(clone(IDS).logits, reference(IDS).logits, atol=1e-5)
        assert torch.allclose(cpu_only(IDS).logits, reference(IDS).logits, atol=1e-5)


def test_threads_that_run_one_model_at_once(checkpoints: Any) -> None:
    reference, model = checkpoints["llama"][1], load(checkpoints, "llama", mixed("llama")[1])
    wanted, found = reference(IDS).logits, []

    def run() -> None:
        with torch.no_grad():
            found.extend(model(IDS).logits for _ in range(4))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert all(torch.allclose(one, wanted, atol=1e-5) for one in found)
    assert all(p.device.type == "cpu" for n, p in model.named_parameters() if n.startswith("model.layers.0."))


def test_ties_are_not_split(checkpoints: Any) -> None:
    with pytest.raises(DeviceMapError, match="tied"):
        load(checkpoints, "gpt2", {"transformer": 0, "lm_head": 1})
    with pytest.raises(DeviceMapError, match="tied"):
        load(checkpoints, "gpt2", {"transformer": "cpu", "lm_head": "disk"})


def test_automatic_maps_use_what_is_free(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = checkpoints["llama"][1]
    total = reference.get_memory_footprint()
    for share, places in ((2.0, {0}), (0.6, {0, 1}), (0.3, {0, "cpu"})):
        monkeypatch.setitem(accelerator.MEMORY, "free", int(total * share / 0.9))
        limits = None if share > 0.5 else {0: int(total * 0.7), "cpu": "1GB"}
        for kind in ("auto", "sequential"):
            model = load(checkpoints, "llama", kind, max_memory=limits)
            used = {int(str(p)[-1]) if str(p) != "cpu" else "cpu" for p in model.hf_device_map.values()}
            assert used >= places if kind == "sequential" else used & places, (share, kind, model.hf_device_map)
            assert torch.allclose(model(IDS.to(model.device)).logits.cpu(), reference(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_classes_of_transformers_run_by_the_same_hooks(checkpoints: Any, kind: str) -> None:
    """A repository's own code: its masks are tensors, its arguments have names, its caches are its own."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    place, reference = checkpoints[kind]
    names = {"llama": ("LlamaForCausalLM", "LlamaConfig"), "gpt2": ("GPT2LMHeadModel", "GPT2Config")}[kind]
    cls, config = (getattr(transformers, name) for name in names)
    for spec in mixed(kind)[:3]:
        model = load_guest(cls, config, resolve_source(place), device_map=spec, offload_folder="none")
        with torch.no_grad():
            out = model(IDS, attention_mask=MASK, use_cache=True)
            wanted = reference(IDS, attention_mask=MASK)
            step = model(IDS[:, :1], attention_mask=one_more(MASK), past_key_values=out.past_key_values).logits
            again = reference(IDS[:, :1], attention_mask=one_more(MASK), past_key_values=wanted.past_key_values).logits
        assert out.logits.device == torch.device("cpu")
        assert torch.allclose(out.logits[:, 3:], wanted.logits[:, 3:], atol=1e-5), spec
        assert torch.allclose(step, again, atol=1e-5)


def one_more(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat((mask, mask[:, :1].clamp(min=1)), dim=1)


def test_buffers_live_where_they_are_used_unless_they_are_to_be_offloaded(checkpoints: Any) -> None:
    spec = {"": 1, "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    model = load(checkpoints, "llama", spec)
    assert model.model.rotary_emb.inv_freq.device == torch.device("sim:1")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    model = load(checkpoints, "llama", spec, offload_buffers=True, offload_folder="none", offload_state_dict=True)
    assert model.model.rotary_emb.inv_freq.device == torch.device("cpu")
    assert torch.allclose(model(IDS).logits, checkpoints["llama"][1](IDS).logits, atol=1e-5)
    assert model.load_report.device_map == model.hf_device_map
