"""``loadstone bench``: run one of the repository's benchmarks."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ..errors import MissingDependencyError

ROOT = Path(__file__).resolve().parents[1]


def run(arguments: argparse.Namespace) -> int:
    """Run it in a process of its own, from the checkout; returns its exit status.

    Raises MissingDependencyError in an installed package, which benchmarks are not a part of.
    """
    module = arguments.name.replace("-", "_")
    if not (ROOT / "benchmarks" / f"{module}.py").is_file():
        raise MissingDependencyError(
            f"the benchmark {arguments.name!r} is in the repository and not in the installed package; run "
            f"`python -m benchmarks.{module}` in a checkout of it"
        )
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments.rest], cwd=ROOT, check=False
    ).returncode
