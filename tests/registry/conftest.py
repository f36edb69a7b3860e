"""The fake Hub of the loading tests, for tests of what is loaded from it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location(
    "loadstone_tests_loading", Path(__file__).parents[1] / "loading" / "conftest.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)
hub, point_client_at = _FIXTURES.hub, _FIXTURES.point_client_at
