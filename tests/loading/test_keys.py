"""Renaming of checkpoint names to model names."""

from __future__ import annotations

import pytest

from loadstone.errors import ArgumentError, IntegrityError
from loadstone.loading.keys import match_keys

WANTED = {"model.norm.weight", "model.h.0.w", "lm_head.weight", "enc.LayerNorm.weight", "enc.LayerNorm.bias"}


def test_equal_names_match_themselves() -> None:
    names = ["lm_head.weight", "model.norm.weight"]
    assert match_keys(names, WANTED) == ({name: name for name in names}, {})


def test_prefix_is_added_and_stripped() -> None:
    assert match_keys(["norm.weight"], WANTED, base_model_prefix="model") == ({"model.norm.weight": "norm.weight"}, {})
    assert match_keys(["model.x.w"], {"x.w"}, base_model_prefix="model") == ({"x.w": "model.x.w"}, {})
    assert match_keys(["norm.weight"], WANTED) == ({}, {"norm.weight": "norm.weight"})
    assert match_keys(["modelx.w"], {"x.w", ".w"}, base_model_prefix="model") == ({}, {"modelx.w": "modelx.w"})


def test_legacy_norm_names() -> None:
    matched, left = match_keys(["enc.LayerNorm.gamma", "enc.LayerNorm.beta", "enc.x.gamma"], WANTED)
    assert matched == {"enc.LayerNorm.weight": "enc.LayerNorm.gamma", "enc.LayerNorm.bias": "enc.LayerNorm.beta"}
    assert left == {"enc.x.gamma": "enc.x.gamma"}


def test_legacy_names_that_the_model_has_stay() -> None:
    assert match_keys(["a.LayerNorm.gamma"], {"a.LayerNorm.gamma"})[0] == {"a.LayerNorm.gamma": "a.LayerNorm.gamma"}


def test_rules_chain_in_order_and_replace_once() -> None:
    rules = {r"^transformer\.": "model.", r"layers": "h", r"model\.h\.(\d)": r"model.h.\1"}
    assert match_keys(["transformer.layers.0.w"], WANTED, key_mapping=rules)[0] == {
        "model.h.0.w": "transformer.layers.0.w"
    }
    assert match_keys(["a.a.a"], {"b.a.a"}, key_mapping={"a": "b"})[0] == {"b.a.a": "a.a.a"}


def test_left_names_are_reported_as_renamed() -> None:
    assert match_keys(["x.y"], WANTED, key_mapping={"x": "z"})[1] == {"x.y": "z.y"}


def test_collisions() -> None:
    with pytest.raises(IntegrityError, match=r"'norm.weight' and 'model.norm.weight' both .* 'model.norm.weight'"):
        match_keys(["norm.weight", "model.norm.weight"], WANTED, base_model_prefix="model")
    with pytest.raises(IntegrityError, match="key_mapping"):
        match_keys(["a", "b"], {"c"}, key_mapping={"[ab]": "c"})


@pytest.mark.parametrize("rules", [{"(": "x"}, {"x": r"\2"}, {"x": 1}, {1: "x"}, ["x"], {"(x)": r"\g<y>"}])
def test_rules_that_are_none(rules: object) -> None:
    with pytest.raises(ArgumentError, match="key_mapping"):
        match_keys(["x"], {"x"}, key_mapping=rules)  # type: ignore[arg-type]
