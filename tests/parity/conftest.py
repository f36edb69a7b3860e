"""The peer, transformers, is a test dependency only: `peers` skips with a reason where it is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True, scope="module")
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny models, whose backward pass would mostly wake threads up; all for real weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.path.stem == "test_smollm2" else 1)
    yield
    torch.set_num_threads(before)
