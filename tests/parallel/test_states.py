"""Mixed precision, weights that no file has, torch's own checkpoints, and one download for a node."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import tiny
import torch
from parallel import moments, ranks, steps
from safetensors.torch import load_file, save_file

from loadstone import AutoModelForCausalLM, LoraConfig


def test_mixed_precision_compilers_missing_weights_and_other_sources(places: dict[str, Path], tmp_path: Path) -> None:
    headless, pickled = tmp_path / "headless", tmp_path / "pickled"
    tiny.checkpoint(headless, "llama", **steps.SIZES)
    file = headless / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, file)
    pickled.mkdir()
    (pickled / "config.json").write_text((headless / "config.json").read_text())
    torch.save(tensors, pickled / "pytorch_model.bin")
    told = ranks.results(moments.mixed, 2, places["llama"], headless, pickled)
    expected = steps.alone(places["llama"], 3)
    for rank in told:
        assert rank["dtype"] == torch.float32
        assert torch.allclose(torch.tensor(rank["norms"]), torch.tensor(expected["norms"]), rtol=5e-2)
        assert rank["norms"] != expected["norms"]
        for first, second, far in rank["compiled"].values():
            assert abs(first - second) < 1e-5
            assert far < 1e-5
        for name in ("pickled fsdp", "pickled tp", "held fsdp", "held tp"):
            assert all(torch.equal(rank[name][key], value) for key, value in expected["before"].items()), name
        assert torch.equal(rank["fsdp"], told[0]["tp"])
        assert rank["missing fsdp"] == rank["missing tp"] == ("lm_head.weight",)
    weight = told[0]["fsdp"]
    assert torch.equal(weight, told[1]["fsdp"])
    assert 0.01 < float(weight.std()) < 0.04
    assert not torch.equal(weight[:32], weight[32:])


def test_torch_checkpoints_go_to_other_numbers_of_processes(places: dict[str, Path], tmp_path: Path) -> None:
    """Weights and the optimizer's state: the third step is that of the run which saved them."""
    some = {kind: places[kind] for kind in ("tied", "gpt2")}
    saved = ranks.results(moments.distributed_checkpoints, 2, some, tmp_path, 2, True)[0]
    told = ranks.results(moments.distributed_checkpoints, 1, some, tmp_path, 1, False)[0]
    for kind, weights in saved.items():
        for name, value in weights.items():
            assert torch.allclose(told[kind][name], value, atol=1e-6), f"{kind} {name}"


def test_one_rank_of_a_node_downloads(tmp_path: Path, places: dict[str, Path]) -> None:
    spec = importlib.util.spec_from_file_location("hub_of_ranks", Path(__file__).parents[1] / "loading/hub_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["hub_of_ranks"] = module
    spec.loader.exec_module(module)
    hub = module.HubServer()
    try:
        files = {path.name: path.read_bytes() for path in places["llama"].iterdir()}
        commit = hub.repo("org/model", files).refs["main"]
        expected = steps.alone(places["llama"], 0)["before"]
        for told in ranks.results(moments.downloaded, 2, hub.url, tmp_path / "cache", None):
            assert told[0] == commit
            assert all(torch.equal(told[1][name], value) for name, value in expected.items())
        got = [request.path for request in hub.requests if request.method == "GET" and "resolve" in request.path]
        assert sorted(got) == sorted(set(got))
        assert len([path for path in got if path.endswith("model.safetensors")]) == 1
        adapted = AutoModelForCausalLM.from_pretrained(places["llama"])
        adapted.add_adapter(LoraConfig(target_modules=["q_proj"], base_model_name_or_path="org/model"))
        tiny.randomize(adapted)
        adapted.save_adapter(tmp_path / "adapter")
        hub.repo("org/adapter", {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()})
        asked = len(hub.requests)
        for told in ranks.results(moments.downloaded, 2, hub.url, tmp_path / "of adapter", None, "org/adapter"):
            assert told[0] == commit
            matrices = {name: value for name, value in told[1].items() if "lora" in name}
            assert len(matrices) == 4
            assert all(torch.equal(adapted.get_parameter(name), value) for name, value in matrices.items())
        got = [request.path for request in hub.requests[asked:] if request.method == "GET"]
        assert len([path for path in got if path.endswith("adapter_model.safetensors")]) == 1
        failed: list[Any] = ranks.run(moments.downloaded, 2, hub.url, tmp_path / "other", "no-such-branch")
        assert failed[0].startswith("NotFoundError")
        assert failed[1].startswith("ParallelError")
    finally:
        hub.close()
