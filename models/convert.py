"""A checkpoint of any format that is read, written as safetensors from files to files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..loading.plan import Plan, make_plan
from ..loading.source import Source
from ..loading.transcode import Transcoded
from .causal_lm import CausalLM
from .origin import Origin
from .pretrained import declarations
from .preview import Preview, preview
from .transcode import check_target, rewrite


class Converted(NamedTuple):
    """What was written; the class of the model, and names of the files read."""

    written: Transcoded
    model_class: str
    source_files: list[str]


def convert(
    cls: type[CausalLM],
    source: Source,
    directory: str | os.PathLike[str],
    *,
    origin: Origin,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "50GB",
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Write the weights that ``origin`` names of ``source`` to ``directory`` as ``save_pretrained`` would.

    Takes memory for one tensor, no model. dtype: of all weights that are not codes; None: each as it is, what has to be
    decoded float32. See `loadstone.convert_checkpoint` for the rest.
    """
    target = Path(directory)
    check_target(source, target)
    seen = preview(cls, source, dtype=dtype, origin=origin)
    plan = seen.plan if dtype is not None else _as_stored(seen)
    total = sum(move.entry.nbytes for move in plan.moves)
    written, done = rewrite(seen, plan, source, target, total, max_shard_size, watch)
    if done < total:  # of weights that are one, only one was written
        watch(total, total)
    return Converted(written, type(seen.model).__name__, [file.name for file in seen.checkpoint.files])


def _as_stored(seen: Preview) -> Plan:
    """The plan in which every weight has the dtype that it has in the checkpoint; the model is changed to that."""
    slots = seen.plan.tree.weights
    stored = {move.target: move.entry.dtype for move in seen.plan.moves if move.entry.dtype.is_floating_point}
    stored |= {target: stored[source] for target, source in seen.plan.tied.items() if source in stored}
    for name, dtype in stored.items():
        slot = slots[name]
        if slot.tensor.dtype == dtype or slot.is_packed:
            continue
        other = torch.empty(slot.tensor.shape, dtype=dtype, device="meta")
        slot.put(nn.Parameter(other, requires_grad=slot.tensor.requires_grad) if slot.is_parameter else other)
    return make_plan(seen.model, seen.checkpoint, devices_must_exist=False, **declarations(seen.model))
