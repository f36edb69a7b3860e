"""Our models are taken for transformers' by `isinstance`, and are ours in whatever else is done with their class."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity.peers import transformers
from torch.distributed.fsdp import fully_shard

from loadstone import CausalLM, GPT2LMHeadModel, LlamaForCausalLM
from loadstone.models.layers import Conv1D

IDS = torch.arange(5)[None]
kinds = pytest.mark.parametrize("kind", tiny.KINDS)


@kinds
def test_seen_as_a_pretrained_model_and_still_ours(kind: str) -> None:
    model = tiny.model(kind)
    assert isinstance(model, transformers.PreTrainedModel)
    assert isinstance(model, CausalLM)
    assert isinstance(model, tiny.MODELS[kind])
    assert type(model) is tiny.MODELS[kind]
    assert model.__class__.__name__ == type(model).__name__
    assert model.__class__.forward is type(model).forward
    assert model.__class__ is tiny.model(kind).__class__
    assert not isinstance(model.base_model, transformers.PreTrainedModel)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_a_file(model)):
        assert type(again) is type(model)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        tied = model.config.tie_word_embeddings
        assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kinds
def test_the_class_seen_makes_models_of_ours(kind: str, tmp_path: Path) -> None:
    """As ``model.__class__`` is used: to build another one, to load one, to ask for attributes."""
    model = tiny.checkpoint(tmp_path, kind)
    seen, own = model.__class__, type(model)
    made = [seen(model.config), seen.from_config(model.config), seen._from_config(model.config)]
    made += [seen.from_pretrained(tmp_path), CausalLM.from_pretrained.__func__(seen, tmp_path)]
    assert [type(one) for one in made] == [own] * 5
    assert all(isinstance(one, seen) for one in made)
    torch.testing.assert_close(made[-1](IDS).logits, model(IDS).logits)
    assert seen.config_class is own.config_class
    assert not hasattr(seen, "_can_record_outputs"), "nothing that only the peer's class has"
    assert hasattr(transformers.PreTrainedModel, "_can_record_outputs")
    assert dir(seen) == dir(own)
    assert [name for name in dir(model) if name not in ("device", "dtype") and not hasattr(model, name)] == []
    seen.note = 3
    assert vars(own)["note"] == 3
    del seen.note
    assert "note" not in vars(own)


def test_the_class_seen_stands_for_ours() -> None:
    """Compared, as a key, pickled, and where functions are chosen by class."""
    model = tiny.model("llama")
    seen = model.__class__
    assert seen is not LlamaForCausalLM
    assert seen == LlamaForCausalLM
    assert LlamaForCausalLM == seen
    assert seen != GPT2LMHeadModel
    assert {LlamaForCausalLM: 1}[seen] == {seen: 1}[LlamaForCausalLM] == 1
    assert issubclass(LlamaForCausalLM, seen)
    assert issubclass(seen, transformers.PreTrainedModel)
    assert not issubclass(LlamaForCausalLM, transformers.PreTrainedModel)
    assert pickle.loads(pickle.dumps(seen)) is LlamaForCausalLM
    assert pickle.loads(pickle._dumps(seen)) is LlamaForCausalLM  # type: ignore[attr-defined]
    assert copy.deepcopy(seen) is seen
    choose = functools.singledispatch(lambda one: "other")
    choose.register(CausalLM, lambda one: "ours")
    assert choose(model) == "ours"
    assert inspect.getmro(type(model)) == LlamaForCausalLM.__mro__


def test_classes_derived_from_the_class_seen_are_derived_from_ours() -> None:
    """As `fully_shard` makes one: what is only the peer's is not inherited."""
    model = tiny.model("llama")
    sharded = type("Sharded", (model.__class__,), {"unshard": lambda self: "here"})
    assert sharded.__module__ == __name__
    assert sharded.__mro__[1:] == LlamaForCausalLM.__mro__

    class Stated(model.__class__):  # type: ignore[name-defined, misc]
        def forward(self, *given: Any, **more: Any) -> Any:
            return super().forward(*given, **more)

    assert Stated.__mro__[1:] == LlamaForCausalLM.__mro__
    for kind in (sharded, Stated):
        model.__class__ = kind
        assert type(model) is kind
        assert isinstance(model, CausalLM)
        assert isinstance(model, transformers.PreTrainedModel)
        assert isinstance(model, kind)
        assert model(IDS).logits.shape == (1, 5, 61)
    model.__class__ = tiny.model("llama").__class__
    assert type(model) is LlamaForCausalLM


class Registered(LlamaForCausalLM):
    """A user's class that hears of all that derive from it, and has a metaclass."""

    heard: list[str] = []

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Registered.heard.append(cls.__name__)


def test_nobody_hears_of_the_class_seen() -> None:
    model = Registered(tiny.model("llama").config)
    assert isinstance(model, transformers.PreTrainedModel)
    assert Registered.heard == []
    assert type(model.__class__(model.config)) is Registered


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@kinds
def test_wrappers_train_it(kind: str, group: Any) -> None:
    """torch.compile, DDP and FSDP: the loss of the model itself, and the model is ours inside."""
    model = tiny.model(kind)
    wanted = model(IDS, labels=IDS).loss
    compiled: Any = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    assert type(compiled._orig_mod) is type(model)
    spread = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    assert type(spread.module) is type(model)
    sharded = copy.deepcopy(model)
    for inner in [module for module in sharded.modules() if type(module).__name__ in model._no_split_modules]:
        fully_shard(inner, mesh=group)
    fully_shard(sharded, mesh=group)
    assert isinstance(sharded, transformers.PreTrainedModel)
    assert not issubclass(type(sharded), transformers.PreTrainedModel)
    assert issubclass(type(sharded), type(model))
    for wrapped in (compiled, spread, sharded):
        loss = wrapped(IDS, labels=IDS).loss
        loss.backward()
        assert torch.allclose(loss, wanted)


def test_a_layer_with_its_weight_in_out_is_peft_s_and_ours() -> None:
    pytest.importorskip("peft")
    layer = tiny.model("gpt2").transformer.h[0].mlp.c_fc
    assert isinstance(layer, transformers.pytorch_utils.Conv1D)
    assert type(layer) is Conv1D
    assert type(layer.__class__(3, 2)) is Conv1D
    assert layer.__class__ == Conv1D
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is Conv1D
    assert torch.equal(again.weight, layer.weight)
    layer.__class__ = type("Changed", (layer.__class__,), {})
    assert type(layer).__mro__[1:] == Conv1D.__mro__
