"""What a long training shows of itself: a bar, one JSON object a line, TensorBoard where it is installed, and a plot.

    python examples/watch.py tuned      # draw tuned/log.png anew from tuned/log.jsonl

`examples/finetune.py` uses it; nothing here knows of its loop.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

# TFLOP/s of dense bf16 products by the vendors' data sheets, of which the utilisation is the share that was used
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "4090": 165}


def stated_peak(asked: float | None) -> float | None:
    """FLOP/s that utilisation is measured against: what was asked for (in TFLOP/s), else the GPU's if it is known."""
    if asked is not None:
        return asked * 1e12
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak * 1e12 for part, peak in PEAKS.items() if part in name), None)


def operations_a_token(model: Any, length: int) -> float:
    """Of training: 6 for each number of a matrix, and attention's, 6 * layers * width * length as half is not seen.

    Recomputation is not counted, which makes the share of the peak a model's FLOPs utilisation (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B).
    """
    config = model.config
    numbers = model.num_parameters(exclude_embeddings=True)
    if config.tie_word_embeddings:  # then the head is an embedding, which multiplies all the same
        numbers += config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim
    return 6.0 * numbers + 6.0 * config.num_hidden_layers * width * length


def memory_mb() -> float:
    """The most that tensors took on the GPU, or without one the process in memory, so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource  # not there on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most / 1e3


class Stop:
    """Whether somebody asked for an end (Ctrl-C, or a scheduler's SIGTERM); a second time ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, _: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"\n{signal.Signals(number).name}: ending after this step; once more ends at once", file=sys.stderr)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Signals are noted, for the loop to end when a step is whole."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watch:
    """The log of a run. Speed is of the steps alone: what happens within `pause` (evaluation, saving) is not in it.

    out: where ``log.jsonl``, ``log.png`` and ``tensorboard/`` go. done, steps: how far the run is, and how far it goes;
    lines beyond ``done`` are of a run that was broken off, and are cut. tokens: of a step. operations: of a token.
    peak: FLOP/s, or None. active: False writes and shows nothing (other processes of the same run).
    """

    def __init__(
        self, out: Path, done: int, steps: int, tokens: int, operations: float, peak: float | None, active: bool = True
    ) -> None:
        self.out, self.path, self.active = out, out / "log.jsonl", active
        self.tokens, self.operations, self.peak = tokens, operations, peak
        self.writer: Any = None
        self._steps_timed, self._started, self._paused = 0, time.perf_counter(), 0.0
        if not active:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() and done else []
        kept = [line for line in lines if _step_of(line) <= done]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=None, dynamic_ncols=True)
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)

    def stepped(self) -> None:
        """One step more is done."""
        self._steps_timed += 1
        if self.active:
            self.bar.update()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that no step takes."""
        begun = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begun

    def speed(self) -> dict[str, float]:
        """tokens_per_second, tflops and, if a peak is known, mfu, since last asked; memory_mb: the most so far."""
        seconds = time.perf_counter() - self._started - self._paused
        rate = self._steps_timed * self.tokens / max(seconds, 1e-9)
        self._steps_timed, self._started, self._paused = 0, time.perf_counter(), 0.0
        used = rate * self.operations
        figures = {"tokens_per_second": rate, "tflops": used / 1e12, "memory_mb": memory_mb()}
        return figures if self.peak is None else {**figures, "mfu": used / self.peak}

    def log(self, step: int, **values: Any) -> None:
        """One line, on all channels."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        told = (f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in values.items())
        self.bar.write("  ".join((f"step {step}", *told)), file=sys.stdout)
        sys.stdout.flush()
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """The plot, and an end to the rest."""
        if not self.active:
            return
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
        plot(self.out)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # half a line: the machine went down while it was written
        return float("inf")


def plot(out: Path) -> Path | None:
    """Draw ``log.png`` from ``log.jsonl``: losses above, speed below. None, and a line that says so, without
    matplotlib."""
    if find_spec("matplotlib") is None:
        print(f"matplotlib is not installed: no plot; the numbers are in {out / 'log.jsonl'}")
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    for name, axes, colour in (
        ("loss", above, "#3b6ea5"), ("held_out_loss", above, "#b03030"), ("tokens_per_second", below, "#555555")
    ):  # fmt: skip
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), color=colour, marker=".", markersize=3)
    above.set_ylabel("loss a token")
    above.legend()
    below.set_ylabel("tokens / s")
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(out / "log.png", dpi=110)
    pyplot.close(figure)
    return out / "log.png"


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
