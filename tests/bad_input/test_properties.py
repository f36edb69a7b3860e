"""Whatever the bytes: a typed error or a right model; nothing run, opened elsewhere or changed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from bad_input.inputs import snapshot, watched
from bad_input.mutation import KEYS, NUMBERS, TEXTS, Mutator
from bad_input.targets import TARGETS
from hypothesis import given
from hypothesis import strategies as st

from loadstone.errors import LoadstoneError

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NUMBERS + TEXTS)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
objects = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each target."""
    found = {}
    for name, target in TARGETS.items():
        found[name] = tmp_path_factory.mktemp(name) / "checkpoint"
        target.prepare(found[name])
    return found


def holds(name: str, place: Path, data: bytes) -> None:
    """The promise, for one target and one content of its file."""
    target = TARGETS[name]
    (place / target.file).write_bytes(data)
    before = snapshot(place)
    with watched(place) as seen:
        try:
            target.run(place)
        except LoadstoneError as refusal:
            said = str(refusal).encode()  # it can be printed
            if not said:
                pytest.fail("an error without a word")
    assert [one for one in seen if "again" not in one] == []
    after = {file: state for file, state in snapshot(place).items() if not file.startswith("again")}
    assert after == {file: state for file, state in before.items() if not file.startswith("again")}


@pytest.mark.parametrize("name", TARGETS)
@tiny.examples(25)
@given(data=st.binary(max_size=200))
def test_any_bytes(places: dict[str, Path], name: str, data: bytes) -> None:
    holds(name, places[name], data)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.mutate == "text"])
@tiny.examples(60)
@given(changes=objects, seed=st.integers(0, 9))
def test_any_values_in_any_fields(places: dict[str, Path], name: str, changes: dict[str, Any], seed: int) -> None:
    seeds = TARGETS[name].seeds()
    content = {**json.loads(seeds[seed % len(seeds)]), **changes}
    holds(name, places[name], json.dumps(content).encode())


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.mutate == "text"])
@tiny.examples(25)
@given(content=values)
def test_any_json(places: dict[str, Path], name: str, content: Any) -> None:
    holds(name, places[name], json.dumps(content).encode())


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.mutate == "header"])
@tiny.examples(40)
@given(header=objects | values, body=st.binary(max_size=40))
def test_any_header(places: dict[str, Path], name: str, header: Any, body: bytes) -> None:
    head = json.dumps(header).encode()
    holds(name, places[name], len(head).to_bytes(8, "little") + head + body)


@pytest.mark.parametrize("name", TARGETS)
@tiny.examples(40)
@given(seed=st.integers(0, 1 << 32))
def test_any_damage(places: dict[str, Path], name: str, seed: int) -> None:
    """Good files spoilt, in their structure and blindly."""
    target, mutator = TARGETS[name], Mutator(seed)
    seeds = target.seeds()
    chosen = random.Random(seed).choice(seeds)
    holds(name, places[name], getattr(mutator, target.mutate)(chosen, seeds[0]))
