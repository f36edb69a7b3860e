"""Counts the faults that tests inject into saves and downloads, and what was lost: ``python .../faults.py --record``.

Every save is broken off at each of its steps, by kill -9 or a full disk, and what a reader finds is looked at; every
request of a load is answered wrongly. With ``--record`` the counts go to ``benchmarks/results/faults.json``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAVES = ROOT / "tests" / "loading" / "crash_driver.py"
OTHERS = ROOT / "tests" / "bad_input" / "kill_driver.py"
SCENARIOS = {
    SAVES: ("shards over shards", "shards over single", "single over shards", "single over single", "new directory"),
    OTHERS: ("quantize over shards", "quantize to shards", "quantize anew", "adapter over adapter"),
}
HUB = ("tests/loading/test_hub_faults.py", "tests/registry/test_remote_code_hub.py::test_faults_while_code_is_fetched")


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}


def broken_off(driver: Path, scenario: str, how: str) -> dict[str, Any]:
    """One kind of save broken off at each step: how often, and how often neither the old nor the new was there."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, str(driver), str(Path(place) / "work"), scenario, how]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=True)
    found = json.loads(done.stdout)
    new = found[-1]["found"]
    old = next((one["found"] for one in found if one["ended"] in ("killed", "full")), None)
    injected = [one for one in found if one["ended"] != "finished"]
    lost = [one for one in found if one["found"] not in (old, new) or one["again"] != new or one["left again"]]
    return {"row": f"{scenario}: {how}", "injected": len(injected), "lost": len(lost)}


def of_the_hub() -> dict[str, Any]:
    """Wrong answers at the endpoints of the fake Hub, each with the load after it."""
    command = [sys.executable, "-m", "pytest", "-q", "--disable-warnings", "--no-header", "-rN", *HUB]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment(), check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    return {
        "row": "answers of the Hub",
        "injected": sum(counts.values()),
        "lost": sum(counts.values()) - counts["passed"],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/faults.json")
    options = parser.parse_args(arguments)
    rows = [
        broken_off(driver, scenario, how)
        for driver, scenarios in SCENARIOS.items()
        for scenario in scenarios
        for how in ("kill", "full")
    ]
    rows.append(of_the_hub())
    total = {name: sum(row[name] for row in rows) for name in ("injected", "lost")}
    print(json.dumps([*rows, total], indent=1))
    if options.record:
        package = types.ModuleType("benchmarks")
        package.__path__ = [str(ROOT / "benchmarks")]
        sys.modules["benchmarks"] = package
        path, _ = importlib.import_module("benchmarks.harness").save("faults", rows, about={"total": total})
        print(f"written to {path}")
    return bool(total["lost"])


if __name__ == "__main__":
    sys.exit(main())
