"""Recomputed activations: every n-th layer, dropout drawn alike, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import checkpoint as torch_checkpoint

from loadstone.errors import ArgumentError
from loadstone.models import recompute

IDS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}


def step(model: Any) -> dict[str, torch.Tensor]:
    """The loss and all gradients of a step whose randomness starts at one seed, and the generator's state after it."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "random": torch.get_rng_state(), **grads}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    seen: list[Any] = []

    def noted(layer: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(layer)
        return torch_checkpoint.checkpoint(layer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recompute, "checkpoint", noted)
        yield seen


@tiny.examples(12)
@given(kind=st.sampled_from(tiny.KINDS), every=st.integers(1, 5), layers=st.integers(1, 4), reentrant=st.booleans())
def test_every_nth_layer_and_the_same_gradients(kind: str, every: int, layers: int, reentrant: bool) -> None:
    sizes = (
        {"n_layer": layers, **DROPOUT} if kind == "gpt2" else {"num_hidden_layers": layers, "attention_dropout": 0.2}
    )
    model = tiny.model(kind, **sizes).train()
    plain = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=every)
    assert model.is_gradient_checkpointing
    assert model.is_activation_checkpointing
    with pytest.MonkeyPatch.context() as patch, counted(patch) as seen:
        again = step(model)
    stack = model.transformer.h if kind == "gpt2" else model.model.layers
    assert seen == list(stack)[::every]
    assert set(again) == set(plain)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name  # dropout is drawn twice alike, and draws nothing more


def test_other_dropout_is_other_gradients() -> None:
    """The test above is worth nothing if the randomness does not reach the gradients."""
    model = tiny.model("gpt2", **DROPOUT).train()
    one = step(model)
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    other = step(model)
    assert torch.equal(one["loss"], other["loss"])
    assert not torch.equal(one["transformer.h.0.mlp.c_fc.weight"], other["transformer.h.0.mlp.c_fc.weight"])


def test_activations_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd holds on to, in numbers, falls with the layers that are recomputed."""

    def held(**options: Any) -> int:
        model = tiny.model("llama", num_hidden_layers=4).train()
        if options:
            model.gradient_checkpointing_enable(**options)
        total: list[int] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            total.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(IDS, labels=IDS)
        return sum(total)

    none, half, every = held(), held(every_n_layers=2), held(every_n_layers=1)
    assert every < half < none
    assert every < none / 2


def test_offload_leaves_the_host_alone_and_the_gradients_equal() -> None:
    model = tiny.model("llama").train()
    plain = step(model)
    model.activation_checkpointing_enable(offload=True)
    again = step(model)
    assert all(torch.equal(value, again[name]) for name, value in plain.items())
    assert model.base_model.checkpointing.offload


def test_offload_moves_what_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for an accelerator: the layer starts inside `save_on_cpu` for its device."""
    asked: list[dict[str, Any]] = []

    class Save(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, **options: Any) -> None:
            asked.append(options)
            super().__init__(lambda tensor: tensor.clone(), lambda tensor: tensor)

    monkeypatch.setattr(recompute, "save_on_cpu", Save)
    elsewhere = torch.empty(1, 4, 32, device="meta", requires_grad=True)
    with recompute.recomputation(None, offload=True)._place(elsewhere):
        pass
    assert asked == [{"pin_memory": True, "device_type": "meta"}]


def test_reentrant_checkpoints_reach_adapters_over_frozen_embeddings() -> None:
    from loadstone import LoraConfig

    model = tiny.model("llama")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model(IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)


def test_input_gradients_on_and_off() -> None:
    model = tiny.model("llama")
    model.disable_input_require_grads()  # nothing to undo
    for _ in range(2):
        model.enable_input_require_grads()
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    model.requires_grad_(False)
    assert model(IDS).logits.requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks
    assert not model(IDS).logits.requires_grad


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"gradient_checkpointing_kwargs": {"use_reentrent": False}}, "use_reentrant"),
        ({"every_n_layers": 0}, "every_n_layers"),
        ({"every_n_layers": True}, "every_n_layers"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 1.5}}, "every_n_layers"),
    ],
)
def test_refused(arguments: dict[str, Any], names: str) -> None:
    model = tiny.model("llama")
    with pytest.raises(ArgumentError, match=names):
        model.gradient_checkpointing_enable(**arguments)
    assert not model.is_gradient_checkpointing
