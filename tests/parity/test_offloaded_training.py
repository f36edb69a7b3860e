"""Models with weights on disk in the hands of PEFT, accelerate and the Trainer: as without a device map."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity.peers import transformers

from loadstone import AutoModelForCausalLM, LoraConfig
from loadstone.errors import OffloadError
from loadstone.loading.offload import is_offloaded

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="PEFT would spread it over accelerators")
IDS = torch.arange(2, 20).view(2, 9)
SECOND = {"llama": "model.layers.1", "mistral": "model.layers.1", "gpt2": "transformer.h.1"}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def maps(kind: str) -> list[Any]:
    return ["disk", {"": "cpu", SECOND[kind]: "disk"}, {"": "disk", SECOND[kind]: "cpu"}]


def checkpoint(directory: Path, kind: str) -> Path:
    tiny.checkpoint(directory, kind, **(NO_DROPOUT if kind == "gpt2" else {}))
    return directory


def load(place: Path, device_map: Any = None, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, device_map=device_map, **options)


@no_accelerator
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_peft_loads_an_adapter(kind: str, tmp_path: Path) -> None:
    """Its dispatch by accelerate finds everything in its place; ours stays, and weights stay in their files."""
    peft = pytest.importorskip("peft")
    place = checkpoint(tmp_path / "base", kind)
    config = peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(load(place), config).save_pretrained(tmp_path / "adapter")
    for dtype in (torch.float32, torch.bfloat16):
        whole = peft.PeftModel.from_pretrained(load(place, dtype=dtype), tmp_path / "adapter", is_trainable=True)
        wanted = whole(input_ids=IDS, labels=IDS).loss
        wanted.backward()
        gradients = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.requires_grad}
        assert gradients
        for device_map in maps(kind):
            model = load(place, device_map, dtype=dtype)
            before = {id(parameter) for parameter in model.parameters()}
            found = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
            assert is_offloaded(model)
            assert before <= {id(parameter) for parameter in model.parameters()}
            loss = found(input_ids=IDS, labels=IDS).loss
            assert torch.equal(loss, wanted)
            loss.backward()
            for name, parameter in found.named_parameters():
                assert parameter.requires_grad == (name in gradients), name
                assert name not in gradients or torch.allclose(parameter.grad, gradients[name], atol=1e-6), name


def test_peft_is_told_where_accelerate_would_move_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    place = checkpoint(tmp_path / "base", "llama")
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(load(place), config).save_pretrained(tmp_path / "adapter")
    model = load(place, "disk")
    with torch.no_grad():
        wanted = model(IDS).logits
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(OffloadError, match=r"model\.load_adapter\(directory\)"):
        peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert is_offloaded(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, wanted)
    model.load_adapter(tmp_path / "adapter")
    assert not any("_hf_hook" in vars(module) for module in load(place).modules())


@pytest.fixture
def fresh() -> Iterator[None]:
    """accelerate's state lives as long as the process."""

    def reset() -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    reset()
    yield
    reset()


ROWS = [
    {"input_ids": (torch.arange(8) + row) % 60 + 1, "labels": (torch.arange(8) + row) % 60 + 1} for row in range(16)
]


def by_accelerate(model: Any, _place: Path) -> list[float]:
    acc = accelerate.Accelerator(cpu=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer, loader = acc.prepare(
        model, torch.optim.AdamW(trained, lr=1e-2), torch.utils.data.DataLoader(ROWS, batch_size=4)
    )
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        acc.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    acc.unwrap_model(model).save_pretrained(_place)
    return losses


def by_the_trainer(model: Any, place: Path) -> list[float]:
    arguments = transformers.TrainingArguments(
        str(place), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, seed=0,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    made = transformers.Trainer(model, arguments, train_dataset=ROWS)
    made.train()
    made.save_model(str(place))
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("loop", [by_accelerate, by_the_trainer])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_loops_train_adapters(kind: str, loop: Any, tmp_path: Path, fresh: None) -> None:
    """And leave the base in its files: what is saved is the adapter."""
    place = checkpoint(tmp_path / "base", kind)
    wanted: list[float] = []
    for number, device_map in enumerate([None, *maps(kind)]):
        torch.manual_seed(0)
        model = load(place, device_map)
        model.add_adapter(LoraConfig(r=3, target_modules="all-linear"))
        base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
        model.train()
        losses = loop(model, tmp_path / str(number))
        wanted = wanted or losses
        assert len(losses) == 4
        assert losses == pytest.approx(wanted, rel=1e-5)
        assert losses[-1] != losses[0]
        assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items() if name in base)
        assert (tmp_path / str(number) / "adapter_model.safetensors").exists()
        again = load(place)
        again.load_adapter(tmp_path / str(number))
        with torch.no_grad():
            assert torch.allclose(again(IDS).logits, model.eval()(IDS).logits, atol=1e-5)
