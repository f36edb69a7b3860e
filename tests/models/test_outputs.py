"""Output objects: fields by name, by key and by place, whatever containers do with them."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree

from loadstone import CausalLMOutputWithPast, DynamicCache
from loadstone.errors import ArgumentError
from loadstone.models.outputs import keep_positions

FIELDS = ("loss", "logits", "past_key_values", "hidden_states", "attentions")


@given(present=st.sets(st.sampled_from(FIELDS)), order=st.permutations(FIELDS))
def test_names_keys_and_places_agree(present: set[str], order: list[str]) -> None:
    values = {name: torch.tensor(float(i)) for i, name in enumerate(FIELDS) if name in present}
    at_once = CausalLMOutputWithPast(**values)
    later = CausalLMOutputWithPast()
    for name in order:
        if name in present:
            setattr(later, name, values[name])
    for output in (at_once, later):
        expected = [name for name in FIELDS if name in present]
        assert sorted(output.keys()) == sorted(expected)
        assert output.to_tuple() == tuple(values[name] for name in expected)
        for place, name in enumerate(expected):
            assert output[place] is output[name] is getattr(output, name) is values[name]
            assert name in output
        for name in set(FIELDS) - present:
            assert getattr(output, name) is None
            assert name not in output
            with pytest.raises(KeyError):
                output[name]
        with pytest.raises(IndexError):
            output[len(expected)]
        assert output[:2] == output.to_tuple()[:2]


def test_changing_a_field() -> None:
    output = CausalLMOutputWithPast(logits=torch.zeros(1))
    output["loss"] = torch.ones(())
    assert output.loss is output["loss"] is output[0]
    output.loss = None
    assert "loss" not in output
    assert len(output) == 1
    with pytest.raises(TypeError):
        CausalLMOutputWithPast(logit=1)  # type: ignore[call-arg]


def test_containers_rebuild_it() -> None:
    output = CausalLMOutputWithPast(loss=torch.ones(()), logits=torch.arange(3.0), hidden_states=(torch.zeros(2),) * 2)
    for other in (
        copy.deepcopy(output),
        pickle.loads(pickle.dumps(output)),
        type(output)(dict(output)),  # type: ignore[arg-type]
        _pytree.tree_map(lambda leaf: leaf.clone(), output),
    ):
        assert type(other) is CausalLMOutputWithPast
        assert list(other.keys()) == list(output.keys())
        assert torch.equal(other.logits, output.logits)
        assert isinstance(other.hidden_states, tuple)
        assert other.attentions is None
    assert len(_pytree.tree_leaves(output)) == 4
    doubled = _pytree.tree_map(lambda leaf: leaf * 2, output)
    assert torch.equal(doubled.logits, output.logits * 2)


def test_keep_positions_forms_agree() -> None:
    states = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    assert torch.equal(keep_positions(states, 0), states)
    assert torch.equal(keep_positions(states, 2), states[:, 3:])
    assert torch.equal(keep_positions(states, torch.tensor([3, 4])), states[:, 3:])
    assert torch.equal(keep_positions(states, torch.tensor([[3, 4], [3, 4]])), states[:, 3:])
    assert torch.equal(keep_positions(states, torch.ones(2, 5, dtype=torch.bool)), states.view(10, 3))


def test_the_cache_by_both_its_names() -> None:
    model = tiny.model("llama")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        assert first.cache is first.past_key_values is first["cache"] is first["past_key_values"]
        assert "cache" in first
        assert list(first) == ["logits", "past_key_values"]
        rest = model(ids[:, 4:], cache=first.cache).logits
        assert torch.allclose(rest, model(ids).logits[:, 4:], atol=1e-5)
        first.cache = None
        assert "past_key_values" not in first
        with pytest.raises(ArgumentError, match="one of them"):
            model(ids, cache=DynamicCache(), past_key_values=DynamicCache())
        held = DynamicCache(model.config)
        model(ids, past_key_values=held)
        again = model.generate(torch.cat((ids, ids), 1), cache=held, max_new_tokens=2)
        assert torch.equal(again, model.generate(torch.cat((ids, ids), 1), max_new_tokens=2))
    gpt2 = tiny.model("gpt2")
    held = DynamicCache()
    gpt2(ids, cache=held)
    assert held.get_seq_length() == 6


def test_the_decoder_alone_returns_a_tuple_too() -> None:
    """Trainers that fuse the head themselves call it with what wrappers pass to the whole model."""
    decoder = tiny.model("llama").model
    ids = torch.arange(5)[None]
    named, plain = decoder(ids, use_cache=False, return_dict=None), decoder(ids, use_cache=False, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 1
    assert torch.equal(plain[0], named.last_hidden_state)
