"""What a mesh saves is a checkpoint of the Hub's form, for any number of processes and any library."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load_file

from loadstone import AutoModelForCausalLM
from loadstone.loading.checkpoint import open_checkpoint
from loadstone.loading.source import resolve_source


def saved(*trained: dict[str, Any]) -> list[Any]:
    return [pair for one in trained for pair in one.values() if pair[0].save_to is not None]


def test_one_process_loads_what_a_mesh_has_saved(on_four: dict[str, Any], on_two: dict[str, Any]) -> None:
    cases = saved(on_four, on_two)
    assert len(cases) == 12
    for case, told in cases:
        model, info = AutoModelForCausalLM.from_pretrained(case.save_to, output_loading_info=True)
        assert not any(info.values())
        weights = dict(model.named_parameters())
        assert weights.keys() == told[0]["weights"].keys()
        for name, value in told[0]["weights"].items():
            assert torch.equal(weights[name], value), f"{case} {name}"


def test_its_files_are_those_of_one_process(on_four: dict[str, Any], on_two: dict[str, Any], tmp_path: Any) -> None:
    for number, (case, _) in enumerate(saved(on_four, on_two)):
        model = AutoModelForCausalLM.from_pretrained(case.save_to)
        model.save_pretrained(tmp_path / str(number), max_shard_size="20KB")
        ours = {path.name: path for path in case.save_to.iterdir()}
        assert ours.keys() == {path.name for path in (tmp_path / str(number)).iterdir()}
        for name, path in ours.items():
            assert path.read_bytes() == (tmp_path / str(number) / name).read_bytes(), f"{case} {name}"
        config = json.loads(ours["config.json"].read_text())
        assert config["architectures"] == [type(model).__name__]
        assert not case.save_to.name.startswith(".")


def test_transformers_and_safetensors_read_it(on_four: dict[str, Any]) -> None:
    for case, told in saved(on_four):
        files = open_checkpoint(resolve_source(case.save_to)).files
        assert len(files) > 1
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert all(torch.equal(tensor, told[0]["weights"][name]) for name, tensor in tensors.items())
