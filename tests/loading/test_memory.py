"""The memory of every way of loading: the model's bytes and a bounded rest, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("memory_driver.py")
REST = 256_000_000  # bytes
WAYS = ("mapped", "read", "cast down", "cast up", "read and cast down", "read and cast up", "NF4", "int8",
        "read, NF4", "ring", "ring, NF4")  # fmt: skip
NARROW = {"mapped": 8_000_000, "read": 24_000_000, "cast down": 24_000_000, "cast up": 24_000_000,
          "read and cast down": 24_000_000, "read and cast up": 24_000_000}  # fmt: skip

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path_factory.mktemp("memory"))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_the_model_and_a_bounded_rest(found: dict[str, dict[str, int]], way: str) -> None:
    weights = 0 if way == "mapped" else found[way]["weights"]
    assert weights == 0 or weights > 60_000_000
    rest = found[way]["peak"] - weights
    assert rest <= NARROW.get(way, REST)
    assert rest > -2_000_000, "nothing was measured"
    assert found.keys() == set(WAYS)
