"""A GPT-2 goes on at any mesh from what torch's own checkpoints hold of it at any other, its optimizer too."""

from __future__ import annotations

from pathlib import Path

import torch
from parallel import layouts, ranks


def test_tensor_parallel_states_are_those_of_every_mesh(places: dict[str, Path], tmp_path: Path) -> None:
    place = places["gpt2"]
    alone = layouts.Run(place, None)
    alone.save(tmp_path / "alone")
    averages = alone.states()["optimizer"]["state"]["transformer.h.0.attn.c_attn.weight"]["exp_avg"].clone()
    alone.step(2)
    expected = {name: weight.detach().clone() for name, weight in alone.model.named_parameters()}

    two: list[layouts.Mesh] = [("tp", (2,)), ("fsdp", (2,))]
    four: list[layouts.Mesh] = [("tp", (4,)), ("fsdp+tp", (2, 2))]
    to_two = [("alone", mesh) for mesh in two] + [("tp-2", ("fsdp", (2,))), ("fsdp-2", ("tp", (2,)))]
    to_four = [(name, mesh) for name in ("alone", "tp-2", "fsdp-2") for mesh in four]
    to_four += [("tp-2", ("fsdp", (4,))), ("tp-4", ("fsdp", (4,))), ("fsdp+tp-2-2", ("tp", (4,)))]
    told = ranks.results(layouts.moved, 2, place, tmp_path, two, to_two)
    told += ranks.results(layouts.moved, 4, place, tmp_path, four, to_four)
    moves = 0
    for rank in told:
        for name, found in rank.items():
            if name.startswith("states"):
                cut = "tp" in name
                assert found["weight"] == found["average"] == tuple(averages.shape)
                assert found["parameter"] == ((32, 3, 32) if cut else (32, 96))
                assert torch.allclose(found["whole"], averages, atol=1e-6)
                assert not [key for key, value in found.items() if value is False], (name, found)
            else:
                moves += 1
                far = {key: float((found[key] - value).abs().max()) for key, value in expected.items()}
                assert max(far.values()) < 1e-6, (name, far)
    assert moves == 2 * len(to_two) + 4 * len(to_four)
    for mesh in (*two, *four):
        found = layouts.Run(place, None).third_step(tmp_path / layouts.name_of(mesh))
        assert all(torch.allclose(found[key], value, atol=1e-6) for key, value in expected.items()), mesh
