"""Training over several accelerators: gradients cross between them and are those of one device.

The engine of autograd keeps one thread for a backend written in Python, for its first device; told to stay in the
caller's thread it takes any number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from simulated import accelerator

from loadstone import AutoModelForCausalLM, LoraConfig

IDS = torch.arange(12).view(2, 6) * 5 % 61
assert accelerator.COUNT == 3
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MAPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "three in a row": ("llama", {"": 0, "model.layers.0": 1, "model.layers.1": 2, "lm_head": 2}, {}),
    "there and back": ("mistral", {"": 1, "model.layers.0": 0}, {}),
    "a block that is split": ("llama", {"": 0, "model.layers.0.mlp": 1, "model.layers.1.self_attn.q_proj": 2}, {}),
    "tied": ("llama", {"": 0, "model.layers": 1}, {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"": 0, "transformer.h.1": 1, "transformer.ln_f": 1}, NO_DROPOUT),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with torch.autograd.set_multithreading_enabled(False):
        yield


@pytest.fixture(params=MAPS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """The model on the CPU, and spread over the accelerators."""
    kind, device_map, options = MAPS[request.param]
    tiny.checkpoint(tmp_path, kind, **options)
    load = AutoModelForCausalLM.from_pretrained
    return tuple(load(tmp_path, device_map=where, attn_implementation="eager") for where in (None, device_map))  # type: ignore[return-value]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_steps(whole: Any, spread: Any) -> None:
    """A step of training, and one with recomputed activations: losses, gradients, places."""
    devices = {parameter.device for parameter in trained(spread).values()}
    assert len(devices) > 1
    optimizers = [torch.optim.SGD(trained(model).values(), lr=0.01) for model in (whole, spread)]
    for recomputed in (False, True):
        losses = []
        for model, optimizer in zip((whole, spread), optimizers, strict=True):
            model.train()
            if recomputed:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
            optimizer.zero_grad()
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        wanted = trained(whole)
        assert wanted.keys() == trained(spread).keys()
        for name, parameter in trained(spread).items():
            assert parameter.grad is not None, name
            assert parameter.grad.device == parameter.device, name
            assert torch.allclose(parameter.grad.cpu(), wanted[name].grad, atol=1e-4), name  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.step()


def test_all_weights_learn_as_on_one_device(pair: tuple[Any, Any]) -> None:
    whole, spread = pair
    assert len(trained(spread)) == len(list(whole.parameters()))
    check_steps(whole, spread)


several = pytest.mark.parametrize("pair", ["three in a row", "a block that is split", "gpt2"], indirect=True)


@several
def test_adapters_learn_as_on_one_device(pair: tuple[Any, Any]) -> None:
    whole, spread = pair
    for model in pair:
        model.add_adapter(LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    values = trained(whole)
    with torch.no_grad():
        for name, parameter in trained(spread).items():
            parameter.copy_(values[name])
    assert all("lora_" in name for name in values)
    check_steps(whole, spread)


@pytest.mark.parametrize("pair", ["three in a row", "there and back", "gpt2"], indirect=True)
def test_pefts_adapters_learn_as_on_one_device(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """Loaded by PEFT, which leaves a model alone of which nothing is offloaded."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    whole, spread = pair
    config = peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    one = peft.get_peft_model(whole, config)
    one.save_pretrained(tmp_path / "adapter")
    check_steps(one, peft.PeftModel.from_pretrained(spread, tmp_path / "adapter", is_trainable=True))
