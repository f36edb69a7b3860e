"""Models that declare nothing: weights used without a call, one module at two places, no blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from simulated import accelerator
from torch import Tensor, nn

PLACES = ["cpu", "disk", 0, 1, 2]


class Part(nn.Module):
    """A residual, a norm, and weights of its own used beside those of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.both = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.gain = nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor, beside: dict[str, Tensor], *, flag: bool = True) -> tuple[Tensor, Tensor]:
        y = self.both(self.norm(x)) * self.gain + self.shift + beside["bias"]
        return (x + y if flag else y), y


class Odd(nn.Module):
    """What no architecture of ours is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.places = nn.Parameter(torch.randn(5, 8))
        self.parts = nn.ModuleDict({"first": Part(), "second": Part()})
        self.again = self.parts["first"]
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.embed(ids) + self.places
        seen = []
        for part in (*self.parts.values(), self.again):
            x, y = part(x, {"bias": self.places[:1]}, flag=True)
            seen.append(y)
        return {"logits": self.head(x), "seen": seen}


def built() -> Odd:
    torch.manual_seed(0)
    model = Odd().eval()
    tiny.randomize(model)
    return model


NAMES = sorted({name for name, _ in built().named_modules()} | {name for name, _ in built().named_parameters()})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = {name: tensor.clone() for name, tensor in built().state_dict().items() if not name.startswith("again")}
    return toy.save(tmp_path_factory.mktemp("odd"), state)


@pytest.mark.parametrize("blocks", [(), ("Part",), ("Sequential",)])
@given(data=st.data())
@tiny.examples(6)
def test_any_map_of_a_model_that_declares_nothing(place: Path, blocks: tuple[str, ...], data: st.DataObject) -> None:
    assert accelerator.COUNT == 3
    spec = {"": data.draw(st.sampled_from(PLACES))}
    names = [name for name in data.draw(st.lists(st.sampled_from(NAMES), max_size=5)) if not name.startswith("again")]
    spec.update({name: data.draw(st.sampled_from(PLACES)) for name in names})
    spec["again"] = spec.get("parts.first", spec.get("parts", spec[""]))
    spec.update({f"again{n.removeprefix('parts.first')}": p for n, p in spec.items() if n.startswith("parts.first.")})
    model, _ = toy.load(place, toy.meta(kind=Odd), device_map=spec, no_split=blocks)
    model.eval()
    ids = torch.arange(10).view(2, 5) % 11
    wanted = built()(ids)
    with torch.no_grad():
        out = model(ids if len(set(spec.values())) > 1 else ids.to(next(model.parameters()).device))
    assert torch.allclose(out["logits"].cpu(), wanted["logits"], atol=1e-5), spec
    for one, other in zip(out["seen"], wanted["seen"], strict=True):
        assert torch.allclose(one.cpu(), other, atol=1e-5), spec
