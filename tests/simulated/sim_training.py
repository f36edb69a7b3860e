"""Visiting weights: what autograd, adapters, quantized layers and failures make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from graphs import saved_tensors
from simulated import accelerator

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, LoraConfig
from loadstone.errors import DeviceMapError, OffloadError
from loadstone.loading import courier as courier_module
from loadstone.loading.offload import Guest

IDS = torch.arange(22).view(2, 11) * 5 % 61
# One accelerator: the engine of autograd takes a backend written in Python for one device.
OFFLOADED = {"": 0, "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
GPT2 = {"": 0, "transformer.h.0": "cpu", "transformer.h.1": "disk"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    tiny.checkpoint(place, "llama", num_hidden_layers=3)
    return place


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gpt2")
    tiny.checkpoint(place, "gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return place


def load(place: Path, device_map: Any = None, **options: Any) -> Any:
    options.setdefault("attn_implementation", "eager")
    return AutoModelForCausalLM.from_pretrained(place, device_map=device_map, **options)


def everybody_home(model: Any) -> bool:
    return all(
        parameter.device.type == "cpu" and isinstance(parameter, torch.nn.Parameter)
        for name, parameter in model.named_parameters()
        if name.startswith(("model.layers.0", "model.layers.1", "lm_head", "transformer.h")) and "lora" not in name
    )


def test_offloaded_weights_are_frozen_and_gradients_pass_through_them(llama: Path) -> None:
    whole, spread = load(llama), load(llama, OFFLOADED)
    for name, parameter in spread.named_parameters():
        assert parameter.requires_grad == name.startswith(("model.embed", "model.layers.2", "model.norm")), name
    for model in (whole, spread):
        model(IDS, labels=IDS).loss.backward()
    assert everybody_home(spread)
    gradients = dict(whole.named_parameters())
    seen = 0
    for name, parameter in spread.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.device == parameter.device
            assert torch.allclose(parameter.grad.cpu(), gradients[name].grad, atol=1e-5), name
            seen += 1
        else:
            assert parameter.grad is None
    assert seen > 9
    embeds = torch.randn(1, 4, 32, requires_grad=True)
    spread(inputs_embeds=embeds).logits.sum().backward()
    alone = embeds.detach().clone().requires_grad_()
    whole(inputs_embeds=alone).logits.sum().backward()
    assert torch.allclose(embeds.grad, alone.grad, atol=1e-4)


def test_autograd_keeps_no_copies_of_visitors(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward needs of them is brought again: it comes to the device once more for each product."""
    spread = load(llama, OFFLOADED)
    copies: list[torch.Tensor] = []
    real = Guest._copies

    def watch(self: Guest, seats: Any) -> list[torch.Tensor]:
        found = real(self, seats)
        copies.extend(found)
        return found

    monkeypatch.setattr(Guest, "_copies", watch)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = spread(IDS, labels=IDS).loss  # somebody else's hooks: ours leave them alone
    memory = {copy.untyped_storage()._cdata for copy in copies}
    assert any(tensor.untyped_storage()._cdata in memory for tensor in kept)
    loss.backward()
    copies.clear()
    loss = spread(IDS, labels=IDS).loss
    memory = {copy.untyped_storage()._cdata for copy in copies}
    saved = saved_tensors(loss.grad_fn)
    assert len(saved) > 50
    ours = [tensor for tensor in saved if tensor.untyped_storage()._cdata in memory]
    assert not ours
    loss.backward()


@pytest.mark.parametrize("where", ["llama", "gpt2"])
def test_adapters_on_offloaded_layers_learn_as_on_one_device(where: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(where)
    whole, spread = load(place), load(place, OFFLOADED if where == "llama" else GPT2)
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    for model in (whole, spread):
        torch.manual_seed(0)
        model.add_adapter(config)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names
        assert all("lora_" in name for name in names)
    state = {name: parameter.detach() for name, parameter in whole.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in spread.named_parameters():
            if "lora_" in name:
                parameter.copy_(state[name])
                assert parameter.device.type == "sim", name
    for checkpointed in (False, True):
        for model in (whole, spread):
            model.zero_grad()
            model.train()
            if checkpointed:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
            model(IDS, labels=IDS).loss.backward()
        wanted = {name: parameter.grad for name, parameter in whole.named_parameters() if "lora_" in name}
        for name, parameter in spread.named_parameters():
            if "lora_" in name:
                assert torch.allclose(parameter.grad.cpu(), wanted[name], atol=1e-5), name
        assert everybody_home(spread)


def test_adapters_are_saved_loaded_and_merged_where_that_can_be(llama: Path, tmp_path: Path) -> None:
    whole = load(llama)
    whole.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    whole.save_adapter(tmp_path)
    with torch.no_grad():
        wanted = whole(IDS).logits
    spread = load(llama, OFFLOADED)
    spread.load_adapter(tmp_path)
    with torch.no_grad():
        assert torch.allclose(spread(IDS).logits, wanted, atol=1e-5)
    with pytest.raises(OffloadError, match="disk"):
        spread.merge_adapter()
    with torch.no_grad():
        assert torch.allclose(spread(IDS).logits, wanted, atol=1e-5)  # nothing was merged by half
    held = load(llama, {**OFFLOADED, "model.layers.1": "cpu"})
    held.load_adapter(tmp_path)
    held.merge_adapter()
    with torch.no_grad():
        assert torch.allclose(held(IDS).logits, wanted, atol=1e-5)


def test_peft_on_offloaded_layers(llama: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    results = []
    for spec in (None, OFFLOADED):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(load(llama, spec), config)
        with torch.no_grad():
            for number, (name, parameter) in enumerate(model.named_parameters()):
                if "lora_" in name:
                    generator = torch.Generator().manual_seed(number)
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}
        results.append((out.logits.detach(), grads))
    (one, grads_one), (other, grads_other) = results
    assert torch.allclose(one, other, atol=1e-5)
    assert grads_one.keys() == grads_other.keys()
    assert all(torch.allclose(grads_one[name], grads_other[name], atol=1e-5) for name in grads_one)


METHODS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("method", METHODS)
def test_quantized_layers_visit_as_others_do(llama: Path, tmp_path: Path, method: str) -> None:
    whole = load(llama, "cpu", quantization_config=METHODS[method])
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = whole(IDS).logits
    memory = {**OFFLOADED, "model.layers.1": "cpu"}
    for place, spec, options in (
        (tmp_path, OFFLOADED, {}),
        (llama, memory, {"quantization_config": METHODS[method]}),
    ):
        spread = load(place, spec, **options)
        layer = spread.model.layers[0].mlp.up_proj
        assert layer.weight.device.type == "cpu"
        with torch.no_grad():
            assert torch.allclose(spread(IDS).logits, wanted, atol=1e-4), spec
        for name, tensor in whole.state_dict().items():
            assert torch.equal(spread.state_dict()[name].cpu(), tensor), name
        with pytest.raises(OffloadError, match="offloaded"):
            spread.dequantize()
    with pytest.raises(DeviceMapError, match="quantized or decoded while loading"):
        load(llama, OFFLOADED, quantization_config=METHODS[method])


def test_a_forward_that_fails_sends_everybody_home(llama: Path) -> None:
    spread, whole = load(llama, OFFLOADED), load(llama)
    handle = spread.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ZeroDivisionError):
            spread(IDS)
        assert everybody_home(spread)
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    handle.remove()
    assert torch.allclose(spread(IDS).logits, whole(IDS).logits, atol=1e-5)


def test_the_next_block_is_fetched_ahead_and_not_used_once_it_changed(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread, whole = load(llama, OFFLOADED), load(llama)
    fetched: list[int] = []
    ahead: list[int] = []
    real_fetch, real_ahead = courier_module.Courier._fetch, courier_module.Courier.fetch_ahead
    monkeypatch.setattr(
        courier_module.Courier,
        "_fetch",
        lambda self, parcels, *rest: (fetched.append(len(parcels)), real_fetch(self, parcels, *rest))[1],
    )
    monkeypatch.setattr(
        courier_module.Courier,
        "fetch_ahead",
        lambda self, owner, parcels: (ahead.append(len(parcels)), real_ahead(self, owner, parcels))[1],
    )
    with torch.inference_mode():
        logits = spread(IDS).logits
    assert sum(1 for count in ahead if count) == 2  # the second block while the first runs, then the head
    assert sum(1 for count in fetched if count) == 3  # each visitor once
    assert torch.allclose(logits, whole(IDS).logits, atol=1e-5)

    def change(*_: Any) -> None:
        with torch.no_grad():
            spread.lm_head.weight.mul_(2)  # its copy is on the way

    handle = spread.model.norm.register_forward_hook(change)
    with torch.no_grad():
        assert torch.allclose(spread(IDS).logits, 2 * whole(IDS).logits, atol=1e-5)
    handle.remove()


def test_rotary_tables_cross_once_for_all_layers_of_a_device(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = load(llama, {"": 1, "model.embed_tokens": 0})
    copies: list[Any] = []
    real = accelerator.run

    def watch(func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "sim":
            copies.append(tuple(args[0].shape))
        return real(func, args, kwargs)

    monkeypatch.setattr(accelerator, "run", watch)
    with torch.no_grad():
        spread(IDS.to("sim:0"))
    assert copies.count((2, 11, 32)) <= 2  # hidden states, to the other device
    assert len([shape for shape in copies if shape[-1:] == (8,)]) <= 4  # cosines and sines


def test_peft_loads_no_adapter_past_our_hooks(llama: Path, tmp_path: Path) -> None:
    """It would take them off and move weights itself; the model is as it was, and there are two other ways."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    whole = peft.get_peft_model(load(llama), config).eval()
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = whole(input_ids=IDS).logits
        plain = load(llama)(IDS).logits
    spread = load(llama, OFFLOADED)
    with pytest.raises(OffloadError, match=r"load an adapter with model\.load_adapter"):
        peft.PeftModel.from_pretrained(spread, tmp_path)
    with torch.no_grad():
        assert torch.allclose(spread(IDS).logits, plain, atol=1e-5)
        spread.load_adapter(tmp_path)
        assert torch.allclose(spread(IDS).logits, wanted, atol=1e-5)
        other = peft.get_peft_model(load(llama, OFFLOADED), config).eval()
        peft.set_peft_model_state_dict(other, peft.utils.load_peft_weights(str(tmp_path), device="cpu"))
        assert torch.allclose(other(input_ids=IDS).logits, wanted, atol=1e-5)
        several = peft.PeftModel.from_pretrained(load(llama, {"": 0, "model.layers.1": 1}), tmp_path)
        assert torch.allclose(several(input_ids=IDS).logits, wanted, atol=1e-5)  # nothing is offloaded there
