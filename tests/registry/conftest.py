"""The fake Hub of the tests of loading, for these too."""

from __future__ import annotations

from loading.conftest import hub, point_client_at

__all__ = ["hub", "point_client_at"]
