"""Torch's own checkpoints of a GPT-2, whose attention lies otherwise under tensor parallelism, from mesh to mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from parallel import steps
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.utils._pytree import tree_map

from loadstone import AutoModelForCausalLM

Mesh = tuple[str, tuple[int, ...]]
_C_ATTN = "transformer.h.0.attn.c_attn.weight"


def name_of(mesh: Mesh | None) -> str:
    return "alone" if mesh is None else "-".join([mesh[0], *map(str, mesh[1])])


class Run:
    """A model on a mesh, or on none, with its optimizer."""

    def __init__(self, place: Path, mesh: Mesh | None) -> None:
        self.share, self.shares, options = 0, 1, {}
        if mesh is not None:
            options["device_mesh"] = spread = steps.mesh(*mesh)
            if "fsdp" in mesh[0]:
                self.share, self.shares = spread.get_local_rank("fsdp"), spread["fsdp"].size()
        self.model = AutoModelForCausalLM.from_pretrained(place, **options).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=steps.RATE, eps=1e-3)

    def step(self, number: int) -> None:
        batch = steps.tokens(number, 64).chunk(self.shares)[self.share]
        self.model(batch, labels=batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def states(self) -> dict[str, Any]:
        weights, state = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": state}

    def save(self, to: Path) -> None:
        self.step(0)
        self.step(1)
        dcp.save(self.states(), checkpoint_id=str(to))

    def third_step(self, saved: Path) -> dict[str, torch.Tensor]:
        """The weights after the step that follows those that were saved."""
        held = self.states()
        dcp.load(held, checkpoint_id=str(saved))
        set_state_dict(self.model, self.optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
        self.step(2)
        return steps.whole_weights(self.model)


def moved(rank: int, place: Path, directory: Path, saves: list[Mesh], loads: list[tuple[str, Mesh]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for mesh in saves:
        run = Run(place, mesh)
        run.save(directory / name_of(mesh))
        told[f"states {name_of(mesh)}"] = shapes_and_ways(run)
    for saved, mesh in loads:
        told[f"{saved} to {name_of(mesh)}"] = Run(place, mesh).third_step(directory / saved)
    return told


def shapes_and_ways(run: Run) -> dict[str, Any]:
    """What states look like, and whether the ways of torch that know no names lead back to the same."""
    states, (_, whole) = (
        run.states(),
        get_state_dict(run.model, run.optimizer, options=StateDictOptions(full_state_dict=True)),
    )
    told: dict[str, Any] = {
        "weight": tuple(states["model"][_C_ATTN].shape),
        "average": tuple(states["optimizer"]["state"][_C_ATTN]["exp_avg"].shape),
        "parameter": tuple(run.model.get_parameter(_C_ATTN).shape),
        "whole": whole["state"][_C_ATTN]["exp_avg"],
    }
    before = steps.whole_weights(run.model)
    weights, state = _copied(run.model.state_dict()), _copied(run.optimizer.state_dict())
    run.step(2)
    expected = steps.whole_weights(run.model)
    for fresh in (False, True):
        run.model.load_state_dict(weights)
        told[f"weights back {fresh}"] = _same(steps.whole_weights(run.model), before)
        if fresh:  # an optimizer that nothing has seen before its state is loaded
            run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1.0)
        run.optimizer.load_state_dict(_copied(state))
        run.step(2)
        told[f"step again {fresh}"] = _same(steps.whole_weights(run.model), expected)
    return told


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def _copied(states: Any) -> Any:
    return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, states)
