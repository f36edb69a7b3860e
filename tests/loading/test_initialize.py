"""What no file holds: initialised as the architecture says, loaded weights out of reach, nothing left undefined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from torch import nn

from loadstone.errors import InitializationError
from loadstone.loading import stream

GONE = ("model.layers.0.norm.weight", "model.layers.3.up.bias")


@pytest.fixture
def partial(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = toy.weights()
    for name in GONE:
        del tensors[name]
    return toy.save(tmp_path, tensors), tensors


def test_only_what_is_missing(partial: tuple[Path, dict]) -> None:
    directory, tensors = partial
    called = []
    model, report = toy.load(directory, initialize=lambda module: (called.append(module), toy.initialize(module)))
    state = model.state_dict()
    assert report.missing == GONE
    assert torch.all(state[GONE[0]] == 1)
    assert torch.all(state[GONE[1]] == 0.25)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert [type(module) for module in called[:2]] == [nn.LayerNorm, nn.Linear]
    assert called[-1] is model, "outer modules come after inner ones, the model itself last"
    assert len(set(map(id, called))) == len(called)
    assert all(parameter.requires_grad and type(parameter) is nn.Parameter for parameter in model.parameters())


def test_a_wild_initialiser_cannot_touch_loaded_weights(partial: tuple[Path, dict]) -> None:
    directory, tensors = partial
    model = toy.meta()

    def wild(_module: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.fill_(7.0)
        for buffer in model.buffers():
            buffer.fill_(7.0)
        model.lm_head.weight = nn.Parameter(torch.full((11, 8), 7.0))

    toy.load(directory, model, initialize=wild)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert torch.all(state[GONE[0]] == 7)
    assert torch.equal(model.model.rotary_emb.inv_freq, torch.arange(4) / 3)


def unchanged(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters()) and all(
        buffer.is_meta for buffer in model.buffers()
    )


def test_a_lazy_initialiser_is_caught_and_the_model_left_alone(partial: tuple[Path, dict]) -> None:
    model = toy.meta()
    before = dict(model.named_parameters())
    with pytest.raises(InitializationError, match=r"'model.layers.0.norm.weight'.*LayerNorm"):
        toy.load(partial[0], model, initialize=lambda module: None)
    assert unchanged(model)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_one_undefined_element_is_enough(partial: tuple[Path, dict]) -> None:
    def almost(module: nn.Module) -> None:
        toy.initialize(module)
        for parameter in module.parameters():
            if not parameter.is_meta:
                parameter.view(-1)[-1] = float("nan")

    with pytest.raises(InitializationError, match="undefined"):
        toy.load(partial[0], initialize=almost)


def test_an_initialiser_that_raises_or_replaces(partial: tuple[Path, dict]) -> None:
    def broken(module: nn.Module) -> None:
        raise KeyError("oops")

    def replacing(module: nn.Module) -> None:
        module.weight = nn.Parameter(torch.zeros(2, 2))  # type: ignore[assignment]

    model = toy.meta()
    with pytest.raises(InitializationError, match=r"'model.layers.0.norm' \(LayerNorm\) failed: KeyError"):
        toy.load(partial[0], model, initialize=broken)
    with pytest.raises(InitializationError, match="replaced"):
        toy.load(partial[0], model, initialize=replacing)
    with pytest.raises(InitializationError, match="nothing was given"):
        toy.load(partial[0], model, initialize=None)
    assert unchanged(model)


def test_mismatched_weights_are_initialised_on_request(tmp_path: Path) -> None:
    tensors = {**toy.weights(), "lm_head.weight": torch.zeros(12, 8)}
    model, report = toy.load(toy.save(tmp_path, tensors), ignore_mismatched_sizes=True)
    assert report.mismatched == (("lm_head.weight", (12, 8), (11, 8)),)
    assert report.missing == ()
    assert torch.all(model.lm_head.weight == 0.25)


def test_missing_persistent_buffers(tmp_path: Path) -> None:
    tensors = toy.weights()
    del tensors["model.scale"]
    model, report = toy.load(toy.save(tmp_path, tensors))
    assert report.missing == ("model.scale",)
    assert torch.all(model.model.scale == 0.5)
    assert type(model.model.scale) is torch.Tensor


class Counter(nn.Module):
    """A persistent integer buffer that reset_buffers sets, and one that nobody does."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.weight = nn.Parameter(torch.zeros(1))
        self.lazy = lazy

    def reset_buffers(self, device: torch.device) -> None:
        if not self.lazy:
            self.steps.fill_(3)


@pytest.mark.parametrize("lazy", [False, True])
def test_missing_integer_buffers(tmp_path: Path, lazy: bool) -> None:
    with torch.device("meta"):
        model = Counter(lazy)
    toy.save(tmp_path, {"weight": torch.ones(1)})
    if lazy:
        with pytest.raises(InitializationError, match="'steps'"):
            toy.load(tmp_path, model, initialize=lambda module: None)
    else:
        toy.load(tmp_path, model, initialize=lambda module: None)
        assert model.steps.tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transient_buffers_are_recomputed_and_never_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**toy.weights(dtype=dtype), "model.rotary_emb.inv_freq": torch.full((4,), 9.0)}
    model, report = toy.load(toy.save(tmp_path, tensors), toy.meta(dtype))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, torch.arange(4) / 3)
    assert report.ignored == ("model.rotary_emb.inv_freq",)
    assert report.fits


def without_method(monkeypatch: pytest.MonkeyPatch, method: object) -> None:
    monkeypatch.setattr(toy.Rope, "reset_buffers", method)


def test_buffers_that_cannot_be_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.save(tmp_path, toy.weights())
    monkeypatch.setattr(stream, "Files", None)  # raised before anything is read
    without_method(monkeypatch, None)
    with pytest.raises(InitializationError, match=r"'model.rotary_emb.inv_freq'.*reset_buffers"):
        toy.load(tmp_path)
    without_method(monkeypatch, lambda self, device: None)
    with pytest.raises(InitializationError, match=r"left 'model\.rotary_emb\.inv_freq' on meta"):
        toy.load(tmp_path)
    without_method(monkeypatch, lambda self, device: 1 / 0)
    model = toy.meta()
    with pytest.raises(InitializationError, match="ZeroDivisionError"):
        toy.load(tmp_path, model)
    assert unchanged(model)


def test_buffers_already_computed_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_method(monkeypatch, None)
    model = toy.meta()
    model.model.rotary_emb.inv_freq = torch.full((4,), 5.0)
    toy.load(toy.save(tmp_path, toy.weights()), model)
    assert torch.all(model.model.rotary_emb.inv_freq == 5)
