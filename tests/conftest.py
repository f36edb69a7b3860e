"""What all tests share: hypothesis profiles, and import paths."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings

# Without a GPU, Triton kernels run in its interpreter, which has to be known before the first one is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent

# Tests import their helpers by name (`tiny`, `smollm2`, `parity.peers`). The repository's root must not be importable:
# transformers takes a top-level `kernels`, which our folder of that name would be, for a package it knows.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != TESTS.parent]
sys.path.insert(0, str(TESTS))

_QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
_FIXED = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": _QUIET}
settings.register_profile("ci", **_FIXED, phases=(Phase.explicit, Phase.generate, Phase.shrink))
settings.register_profile("quick", **_FIXED, phases=(Phase.explicit, Phase.generate))  # no shrinking: fails fast
settings.register_profile("thorough", deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(min(2, os.cpu_count() or 1))
