"""Pickles, GGUF files and state dicts onto a GPU: decoded on the way, quantized there, the same bits as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from loadstone import AutoModelForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "vocab_size": 4000}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    place = tmp_path_factory.mktemp("src")
    model = tiny.checkpoint(place, "llama", **SIZES)
    found: dict[str, dict[str, Any]] = {"state_dict": {"config": model.config, "state_dict": model.state_dict()}}
    for form in ("zip", "older"):
        folder = place / form
        folder.mkdir()
        (folder / "config.json").write_bytes((place / "config.json").read_bytes())
        torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
        found[form] = {"name": folder, "use_safetensors": False}
    gguf_files = pytest.importorskip("gguf") and __import__("gguf_files")
    for kind in ("F16", "Q8_0", "Q4_K"):
        file: Path = gguf_files.save(model, place / "gguf" / f"{kind}.gguf", kind)
        found[kind] = {"name": file.parent, "gguf_file": file.name}
    return found


def load(arguments: dict[str, Any], **options: Any) -> Any:
    rest = {key: value for key, value in arguments.items() if key != "name"}
    return AutoModelForCausalLM.from_pretrained(arguments.get("name"), **rest, **options)


@pytest.mark.parametrize("form", ["zip", "older", "F16", "Q8_0", "Q4_K", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_bit_for_bit(sources: dict[str, dict[str, Any]], form: str, dtype: torch.dtype) -> None:
    right = load(sources[form], dtype=dtype).state_dict()
    for device_map in ("cuda", "auto", {"": 0, "model.embed_tokens": "cpu"}):
        model = load(sources[form], dtype=dtype, device_map=device_map)
        assert model.model.norm.weight.is_cuda
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.cpu().view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize("form", ["zip", "Q8_0", "state_dict"])
def test_quantized_there(sources: dict[str, dict[str, Any]], form: str) -> None:
    model = load(sources[form], quantization_config={"load_in_4bit": True}, device_map="cuda")
    held = load(sources[form]).state_dict()
    config = load(sources[form], device_map="meta").config
    right = load({"config": config, "state_dict": held}, quantization_config={"load_in_4bit": True}, device_map="cuda")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert all(torch.equal(tensor, right.state_dict()[name]) for name, tensor in model.state_dict().items())
