"""How much memory something takes at its peak, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_MEASURE = """
import gc, sys
def _status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))
{setup}
gc.collect()
try:
    with open("/proc/self/clear_refs", "w") as _file:
        _file.write("5")  # the peak so far is forgotten
except OSError:
    pass
_before = _status("VmRSS")
{work}
print("PEAK", _status("VmHWM") - _before)
"""
AVAILABLE = Path("/proc/self/clear_refs").exists()


def peak_of(work: str, setup: str = "") -> int:
    """Bytes of resident memory that ``work`` adds at its peak, what is mapped from files included.

    ``setup`` runs before, uncounted: imports, and a small run of the same kind so that these are complete.
    """
    code = _MEASURE.format(setup=setup, work=work)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("PEAK")[-1])
