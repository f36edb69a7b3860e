"""A coverage-guided fuzzer of everything that reads strangers' files: ``python tests/bad_input/fuzz.py --seconds 300``.

Inputs that reach an arc (from one line of loadstone to the next) that none reached before join the corpus, from which
new ones are made. A fault is any exception that is not loadstone's, a model that is accepted and not right, an input
that takes too long; a loss is a changed file; a run is anything a stranger's bytes made happen: a program, a
connection, a file opened elsewhere, code compiled. With ``--record`` the counts go to ``benchmarks/results/fuzz.json``.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import logging
import resource
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))

from bad_input.inputs import snapshot, watched  # noqa: E402
from bad_input.mutation import Mutator  # noqa: E402
from bad_input.targets import TARGETS, Target  # noqa: E402

import loadstone  # noqa: E402
from loadstone.errors import LoadstoneError  # noqa: E402

_PACKAGE = tuple({str(ROOT), str(Path(loadstone.__file__).parent)})
_TESTS = str(ROOT / "tests")
_SLOW = 20  # seconds for one input, traced: a hundred times what the slowest good one takes
_MOST_MEMORY = 6 << 30  # bytes of address space beyond what the process has at the start


class Arcs:
    """Which arcs of loadstone's code ran, and whether the latest input ran new ones."""

    def __init__(self) -> None:
        self.seen: set[tuple[CodeType, int, int]] = set()
        self._ours: dict[str, bool] = {}

    def _is_ours(self, file: str) -> bool:
        known = self._ours.get(file)
        if known is None:
            known = self._ours[file] = file.startswith(_PACKAGE) and not file.startswith(_TESTS)
        return known

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        if not self._is_ours(frame.f_code.co_filename):
            return None
        code, before, seen = frame.f_code, frame.f_lineno, self.seen

        def line(inner: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            now = inner.f_lineno
            seen.add((code, before, now))
            before = now
            return line

        return line

    @contextmanager
    def traced(self) -> Iterator[None]:
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)


class TooSlow(BaseException):
    """An input that took more than `_SLOW` seconds."""


class Fuzzer:
    """One target: its directory, corpus and counts."""

    def __init__(self, name: str, target: Target, place: Path, arcs: Arcs, mutator: Mutator) -> None:
        self.name, self.target, self.arcs, self.mutator = name, target, arcs, mutator
        self.place = place / name / "checkpoint"
        self.place.parent.mkdir(parents=True)
        target.prepare(self.place)
        self.others = self._others()
        self.corpus = list(target.seeds())
        self.counts = {"inputs": 0, "accepted": 0, "refused": 0, "faults": 0, "lost": 0, "run": 0}
        self.kinds: dict[str, int] = {}
        self.faults: list[str] = []
        self.rows: list[bytes] = []
        for seed in list(self.corpus):
            self.try_one(seed)

    def _others(self) -> dict[str, Any]:
        """What must stay as it is: all but the file that is spoilt and what the target itself writes."""
        return {
            name: state
            for name, state in snapshot(self.place).items()
            if name != self.target.file and not name.startswith("again")
        }

    def step(self) -> None:
        pick = self.mutator.random
        # The latest finds are the most worth trying.
        last = len(self.corpus) - 1
        base = self.corpus[
            last - min(int(pick.expovariate(0.15)), last) if pick.random() < 0.5 else pick.randrange(last + 1)
        ]
        self.try_one(getattr(self.mutator, self.target.mutate)(base, pick.choice(self.corpus)))

    def try_one(self, data: bytes) -> None:
        path = self.place / self.target.file
        path.write_bytes(data)
        known = len(self.arcs.seen)
        self.counts["inputs"] += 1
        with watched(self.place) as seen:
            self._judge(data)
        seen = [one for one in seen if not self._own(one)]
        if seen:
            self.counts["run"] += 1
            self._note(data, f"it made happen: {seen[:3]}")
        if not path.exists() or path.read_bytes() != data or self._changed():
            self.counts["lost"] += 1
            self._note(data, "a file changed")
        if len(self.arcs.seen) > known:
            self.corpus.append(data)

    def _changed(self) -> bool:
        return self.counts["inputs"] % 50 == 0 and self._others() != self.others

    def _own(self, event: str) -> bool:
        """What the target's own check writes, in the folder it is given for that."""
        return self.name == "generation" and ("again" in event or event.startswith("os.mkdir"))

    def _judge(self, data: bytes) -> None:
        def late(*_: Any) -> None:
            raise TooSlow

        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(_SLOW)
        try:
            with self.arcs.traced():
                self.target.run(self.place)
            self.counts["accepted"] += 1
        except LoadstoneError as error:
            self.counts["refused"] += 1
            kind = type(error).__name__
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            if not str(error).isprintable() and any(letter in str(error) for letter in "\x1b\x9b\0"):
                self.counts["faults"] += 1
                self._note(data, f"a message with control characters: {error!r}")
        except (Exception, TooSlow):
            self.counts["faults"] += 1
            self._note(data, traceback.format_exc(limit=-4))
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def _note(self, data: bytes, what: str) -> None:
        if len(self.faults) < 20:
            self.faults.append(f"{self.name} {hashlib.sha256(data).hexdigest()[:12]}: {what}\n{data[:600]!r}")
            self.rows.append(data)


def fuzz(seconds: float, seed: int, names: list[str], place: Path, most: int = 0) -> list[dict[str, Any]]:
    """Fuzz the targets in turn for so long, or so many inputs each; a row of counts for each."""
    rows = []
    for number, name in enumerate(names):
        arcs = Arcs()
        fuzzer = Fuzzer(name, TARGETS[name], place, arcs, Mutator(seed * 1000 + number))
        started = time.monotonic()
        while fuzzer.counts["inputs"] < most if most else time.monotonic() - started < seconds / len(names):
            fuzzer.step()
            if fuzzer.counts["inputs"] % 200 == 0:
                gc.collect()
        rows.append(
            {
                "row": name,
                **fuzzer.counts,
                "corpus": len(fuzzer.corpus),
                "arcs": len(arcs.seen),
                "seconds": round(time.monotonic() - started, 1),
                "errors": dict(sorted(fuzzer.kinds.items())),
            }
        )
        for fault, data in zip(fuzzer.faults, fuzzer.rows, strict=True):
            print(fault, file=sys.stderr)
            (place / f"fault-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
    return rows


def _quietly() -> None:
    """Warnings and logs of ten thousand bad inputs say nothing; memory has a bound, so that a flood is a fault."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    with open("/proc/self/statm") as statm:
        have = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + _MOST_MEMORY, resource.RLIM_INFINITY))


def _record(rows: list[dict[str, Any]], seed: int) -> None:
    """The counts, with machine, versions, date and commit as those of benchmarks."""
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = package
    total = {
        name: sum(row[name] for row in rows) for name in ("inputs", "accepted", "refused", "faults", "lost", "run")
    }
    path, _ = importlib.import_module("benchmarks.harness").save("fuzz", rows, about={"seed": seed, "total": total})
    print(f"written to {path}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together")
    parser.add_argument("--inputs", type=int, default=0, help="instead of a time: so many inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/fuzz.json")
    options = parser.parse_args(arguments)
    _quietly()
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    rows = fuzz(options.seconds, options.seed, options.target or list(TARGETS), place, options.inputs)
    print(json.dumps(rows))
    if options.record:
        _record(rows, options.seed)
    bad = sum(row["faults"] + row["lost"] + row["run"] for row in rows)
    print(f"{sum(row['inputs'] for row in rows)} inputs, {bad} faults; {place}", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
