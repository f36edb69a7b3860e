"""The loss fused with the head: when a model's forward takes it, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from loadstone import kernels
from loadstone.errors import ArgumentError
from loadstone.models.head import why_not_fused

kinds = pytest.mark.parametrize("kind", tiny.KINDS)
IDS = torch.arange(24).view(2, 12) * 7 % 61


def results(model: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(IDS, labels=IDS, **options).loss
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), **grads}


def still(kind: str, **options: Any) -> Any:
    """A model in training mode, without dropout."""
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    return tiny.model(kind, **rates, **options).train()


@kinds
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_the_same(kind: str, tied: bool) -> None:
    model = still(kind, tie_word_embeddings=tied)
    torch.testing.assert_close(results(model), results(model, skip_logits=False))
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    if not tied:
        torch.testing.assert_close(results(model), results(model, skip_logits=False))


@kinds
def test_when_logits_are_skipped(kind: str) -> None:
    model = still(kind)
    shifted = nn.functional.pad(IDS, (0, 1), value=-100)[:, 1:]
    for given in ({"labels": IDS}, {"shift_labels": shifted}):
        assert model(IDS, **given).logits is None
        assert model(IDS, **given, skip_logits=False).logits.shape == (2, 12, 61)
        loss, *rest = model(IDS, **given, return_dict=False, use_cache=False)
        assert loss.dim() == 0
        assert not rest
    assert model(IDS).logits.shape == (2, 12, 61)
    model.eval()
    plain = model(IDS, labels=IDS)
    assert plain.logits.shape == (2, 12, 61)
    asked = model(IDS, labels=IDS, skip_logits=True)
    assert asked.logits is None
    torch.testing.assert_close(asked.loss, plain.loss)
    with pytest.raises(ArgumentError, match="without labels"):
        model(IDS, skip_logits=True)


@kinds
def test_the_models_kernels_take_the_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = still(kind)
    calls = []

    def mine(hidden_states: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        calls.append((hidden_states.shape, weight.shape, targets.shape, options))
        return hidden_states.float().mean(), torch.tensor(2)

    table = kernels.dispatch._TABLE
    monkeypatch.setitem(table, "linear_cross_entropy", dict(table["linear_cross_entropy"]))
    kernels.register_kernel("linear_cross_entropy", "mine", mine)
    model.kernels = kernels.Kernels(choices={"linear_cross_entropy": "mine"})
    model(IDS, labels=IDS)
    assert calls == [((24, 32), (61, 32), (24,), (-100, 0.0, None))]


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Wrapped(nn.Module):
    """As adapters wrap a layer: not a linear layer, but with its weight in reach."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def adapted(head: nn.Linear) -> nn.Module:
    head.__class__ = Adapted
    return head


def replaced_forward(head: nn.Linear) -> nn.Module:
    plain = head.forward
    head.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    return head


def hooked(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda _module, _inputs, output: output * 2)
    return head


def hooked_before(head: nn.Linear) -> nn.Module:
    head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))
    return head


def biased(head: nn.Linear) -> nn.Module:
    head.bias = nn.Parameter(torch.ones(61))
    return head


def odd_weight(head: nn.Linear) -> nn.Module:
    class Packed(nn.Parameter):
        pass

    head.weight = Packed(head.weight.detach())
    return head


CHANGES = [adapted, Wrapped, replaced_forward, hooked, hooked_before, biased, odd_weight]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_head_that_is_more_than_a_matrix_is_called(change: Any) -> None:
    model = still("llama", tie_word_embeddings=False)
    model.lm_head = change(model.lm_head)
    output = model(IDS, labels=IDS)
    torch.testing.assert_close(output.loss, kernels.causal_lm_loss(output.logits, IDS))
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    torch.testing.assert_close(output.logits, expected)
    with pytest.raises(ArgumentError, match=r"skip_logits=True cannot be: (lm_head|the weight of lm_head)"):
        model(IDS, labels=IDS, skip_logits=True)


def test_quantised_weight() -> None:
    head = nn.Linear(4, 8, bias=False)
    head.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    assert "int8" in (why_not_fused(head) or "")


def test_parametrised_weight() -> None:
    """A head whose weight is made from others has a weight like any other."""

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model = still("llama", tie_word_embeddings=False)
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    assert model(IDS, labels=IDS).logits is None
    torch.testing.assert_close(results(model), results(model, skip_logits=False))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    model = still(kind)
    with torch.autocast("cpu", dtype):
        fused, plain = results(model), results(model, skip_logits=False)
    grain = torch.finfo(dtype).eps
    for name, want in plain.items():
        assert fused[name].dtype == torch.float32
        assert float((fused[name] - want).abs().max()) <= 8 * grain * float(want.abs().max()), name
