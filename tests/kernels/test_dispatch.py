"""Which implementation of an operation runs, and what users register."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

from loadstone import Kernels, register_attention, register_kernel
from loadstone.errors import AttentionError, KernelError, RegistrationError
from loadstone.kernels import attention, dispatch, kernel_names, operations, rms_norm, support
from loadstone.kernels.eager import eager_attention


@pytest.fixture
def table() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = {operation: dict(row) for operation, row in dispatch._TABLE.items()}
    names = dict(attention_table())
    yield
    for operation, row in before.items():
        dispatch._TABLE[operation] = row
    attention_table().clear()
    attention_table().update(names)


def attention_table() -> dict[str, Any]:

    import sys

    return sys.modules["loadstone.kernels.attention"]._TABLE


def halved(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return hidden_states / 2


def test_the_operations() -> None:
    assert {"rms_norm", "add_rms_norm", "layer_norm", "apply_rotary", "gated", "flash_attention"} <= set(operations())
    for operation in operations():
        assert {"torch", "triton"} <= set(kernel_names(operation))


@pytest.mark.usefixtures("table")
def test_a_registered_kernel_is_chosen_like_a_built_in() -> None:
    register_kernel("rms_norm", "halved", halved)
    hidden, weight = torch.randn(3, 8), torch.ones(8)
    for selection in (Kernels("halved"), Kernels(choices={"rms_norm": "halved"})):
        assert torch.equal(rms_norm(hidden, weight, 1e-5, kernels=selection), hidden / 2)
        assert selection.chosen("rms_norm", "cpu") == "halved"
        assert selection.chosen("gated", "cpu") == "torch"  # it has no "halved": chosen as by auto
    model = tiny.model("llama")
    ids = torch.arange(5)[None]
    before = model(ids).logits
    model.set_kernels(rms_norm="halved")
    assert not torch.allclose(model(ids).logits, before)
    assert model.kernel_report()["rms_norm"] == "halved"
    model.set_kernels("auto")
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(RegistrationError, match="exist_ok"):
        register_kernel("rms_norm", "halved", halved)
    register_kernel("rms_norm", "halved", halved, exist_ok=True)


@pytest.mark.usefixtures("table")
def test_a_kernel_that_cannot_take_something() -> None:
    register_kernel("rms_norm", "fussy", halved, supports=lambda *_: "it takes nothing")
    with pytest.raises(KernelError, match="it takes nothing"):
        rms_norm(torch.randn(3, 8), torch.ones(8), 1e-5, kernels=Kernels("fussy"))


@pytest.mark.usefixtures("table")
def test_a_registered_attention_that_cannot_run_here() -> None:
    register_attention("elsewhere", eager_attention, unavailable=lambda: "it needs another machine")
    with pytest.raises(AttentionError, match="another machine"):
        tiny.model("llama", attn_implementation="elsewhere")
    model = tiny.model("llama")
    with pytest.raises(AttentionError, match="another machine"):
        model.set_attn_implementation("elsewhere")
    assert callable(attention)


def test_names_that_are_not_there() -> None:
    with pytest.raises(KernelError, match="unknown kernels 'tourch'; did you mean 'torch'"):
        Kernels("tourch")
    with pytest.raises(KernelError, match="rms_norm has no kernel 'mine'"):
        Kernels(choices={"rms_norm": "mine"})
    with pytest.raises(KernelError, match="unknown operation 'softmax'"):
        Kernels(choices={"softmax": "torch"})
    with pytest.raises(KernelError, match="unknown operation"):
        register_kernel("norm", "mine", halved)
    for taken in ("auto", "torch", "triton"):
        with pytest.raises(RegistrationError, match="taken"):
            register_kernel("rms_norm", taken, halved)


def test_a_selection_is_a_value() -> None:
    one, same = Kernels("torch", {"gated": "auto"}), Kernels("torch", {"gated": "auto"})
    assert one == same
    assert hash(one) == hash(same)
    assert Kernels.of(one) is one
    assert Kernels.of("torch") == Kernels("torch")
    assert Kernels.of({"gated": "torch"}) == Kernels(choices={"gated": "torch"})


def test_auto_is_triton_where_a_gpu_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(support, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "an old GPU")
    for capability, reason in (((9, 0), None), ((8, 0), None), ((7, 5), "an old GPU has compute capability 7.5")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, now=capability: now)
        monkeypatch.setattr(support, "_REASONS", {})
        assert support.prefers(cuda) == (reason is None)
        assert Kernels().chosen("rms_norm", cuda) == ("torch" if reason else "triton")
        assert (support.no_gpu_at_all() or "").startswith(reason or "")
        if reason:
            with pytest.raises(KernelError, match=reason):
                Kernels("triton").require()
            with pytest.raises(KernelError, match="Pass kernels='auto'"):
                Kernels("triton").require(cuda)
    assert Kernels().chosen("rms_norm", "cpu") == "torch"
    monkeypatch.setattr(support, "_INSTALLED", False)
    assert "pip install triton" in (support.why_not(cuda) or "")
