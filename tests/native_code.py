"""What the tests of compiled code share: whether it is there, and each level of processor that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from loadstone.kernels import Kernels, native

NATIVE = Kernels("native")
compiled = pytest.mark.skipif(native.why_not() is not None, reason=f"compiled code: {native.why_not()}")
at_each_level = pytest.mark.parametrize("level", () if native.why_not() else native.levels())


@contextmanager
def at(level: str) -> Iterator[None]:
    """Run the compiled code of this level of processor."""
    with mock.patch.object(native, "level", return_value=level):
        yield
