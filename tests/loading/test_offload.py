"""Models on disk maps where the CPU computes: what they hold in memory, and that they are models all the same."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import tiny
import torch
import toy
from graphs import saved_tensors
from sparse import llama_70b, sparse_checkpoint

import loadstone
from loadstone import AutoModelForCausalLM, LoraConfig
from loadstone.errors import DeviceMapError, OffloadError
from loadstone.loading.offload import Guest, is_offloaded

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without accelerator")
IDS = torch.arange(22).view(2, 11) * 5 % 61
MB = 1 << 20

MEMORY = """
import json, sys
import torch, loadstone
from loadstone.loading import load, dispatch, offload, device_map, balance
torch.set_num_threads(2)

def peak(field="VmHWM"):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) << 10

def of_files():
    total, inside = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split(" ")[0] and not line.split(" ")[0].endswith(":"):
            inside = ".safetensors" in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total

loadstone.LlamaForCausalLM  # imported before the count starts
options = json.loads(sys.argv[2])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
model = loadstone.AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
loaded, touched = peak() - before, of_files()
if "--run" in sys.argv:
    with torch.inference_mode():
        model(torch.arange(2)[None])
print(json.dumps({"loaded": loaded, "touched": touched, "peak": peak() - before, "end": of_files()}))
"""


def memory(directory: Path, *flags: str, **options: Any) -> dict[str, int]:
    """Bytes by which a process grows that loads a checkpoint, and with ``--run`` runs it."""
    command = [sys.executable, "-c", MEMORY, str(directory), json.dumps(options), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A Llama of 0.5 GB with blocks of 53 MB, and its bytes."""
    config = loadstone.LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=8192, num_hidden_layers=9, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64, dtype="bfloat16",
    )  # fmt: skip
    place = tmp_path_factory.mktemp("large")
    sparse_checkpoint(place, config, shards=2)
    return place, sum(file.stat().st_size for file in place.glob("*.safetensors"))


@linux
def test_on_disk_a_model_takes_the_memory_of_a_block(large: tuple[Path, int]) -> None:
    place, total = large
    assert total > 450 * MB
    on_disk = memory(place, "--run", device_map="disk")
    assert on_disk["touched"] < 8 * MB
    assert on_disk["peak"] < 256 * MB
    assert on_disk["end"] < 16 * MB  # given back after each block
    whole = memory(place, "--run", device_map="cpu")
    assert total * 0.9 < whole["end"]
    assert whole["peak"] < total + 256 * MB


@linux
def test_what_is_cast_is_cast_block_by_block(large: tuple[Path, int]) -> None:
    place, total = large
    on_disk = memory(place, "--run", device_map="disk", dtype="float32")
    assert on_disk["peak"] < 128 * MB + 3 * 2 * 53 * MB
    whole = memory(place, device_map="cpu", dtype="float32")
    assert 2 * total * 0.9 < whole["peak"] < 2 * total + 256 * MB
    half = memory(place, device_map={"": "disk", "model.layers.3": "cpu", "model.layers.4": "cpu"}, dtype="float32")
    assert half["peak"] < 2 * 2 * 53 * MB + 128 * MB


@linux
@pytest.mark.parametrize("device_map", ["meta", "disk", "cpu"])
def test_70b_is_loaded_without_touching_its_bytes(tmp_path: Path, device_map: str) -> None:
    sparse_checkpoint(tmp_path, llama_70b(), shards=15)
    found = memory(tmp_path, device_map=device_map)
    assert found["touched"] < MB
    assert found["loaded"] < 128 * MB


def load(place: Path, device_map: Any = "disk", **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, device_map=device_map, **options)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("device_map", ["disk", {"": "disk"}, {"": "cpu", "{}.1": "disk"}, {"": "disk", "{}.1": "cpu"}])
def test_disk_maps_compute_and_save_as_any(tmp_path: Path, kind: str, device_map: Any) -> None:
    reference = tiny.checkpoint(tmp_path / "a", kind)
    layers = "transformer.h" if kind == "gpt2" else "model.layers"
    if isinstance(device_map, dict):
        device_map = {name.format(layers): place for name, place in device_map.items()}
    files = {file: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    model = load(tmp_path / "a", device_map, attn_implementation="eager")
    assert model.hf_device_map == ({"": device_map} if isinstance(device_map, str) else device_map)
    assert model.load_report.device_map == model.hf_device_map
    assert model.device == torch.device("cpu")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(IDS).logits)
    assert torch.equal(
        model.generate(IDS, max_new_tokens=4, do_sample=False),
        reference.generate(IDS, max_new_tokens=4, do_sample=False),
    )
    spec = {"": device_map} if isinstance(device_map, str) else device_map
    for name, parameter in model.named_parameters():
        where = spec.get(f"{layers}.1", spec[""]) if f"{layers}.1." in name else spec[""]
        assert parameter.requires_grad == (where == "cpu"), name
    model.save_pretrained(tmp_path / "a")  # over the very files that its weights are in
    model.save_pretrained(tmp_path / "b")
    for place in ("a", "b"):
        again = load(tmp_path / place, "cpu")
        assert all(torch.equal(again.state_dict()[name], t) for name, t in reference.state_dict().items())
    assert (tmp_path / "a" / "config.json").exists()
    assert set(files) <= {*(tmp_path / "a").iterdir()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_of_another_dtype_are_cast_while_they_are_used(tmp_path: Path, kind: str) -> None:
    tiny.checkpoint(tmp_path, kind, stored=torch.bfloat16)
    whole = load(tmp_path, "cpu", dtype=torch.float32)
    model = load(tmp_path, "disk", dtype=torch.float32)
    assert model.dtype == torch.float32
    held = {parameter.dtype for parameter in model.parameters()}
    assert held == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=3), whole.generate(IDS, max_new_tokens=3))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole.state_dict()[name])
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"
    assert all(torch.equal(load(tmp_path / "saved", "cpu").state_dict()[n], t) for n, t in whole.state_dict().items())
    with pytest.raises(OffloadError, match="cast"):
        model.half()
    assert model.to("cpu") is model
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, whole(IDS).logits)


def test_autograd_casts_again_instead_of_keeping_the_casts(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama", stored=torch.bfloat16)
    whole, model = load(tmp_path, "cpu", dtype=torch.float32), load(tmp_path, "disk", dtype=torch.float32)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    guests = [hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), Guest)]
    copies: list[int] = []
    kept: list[int] = []
    for guest in guests:
        guest._bring = spy(guest, copies)  # type: ignore[method-assign]
    results = []
    for one in (whole, model):
        torch.manual_seed(1)
        one.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        loss = one(IDS, labels=IDS).loss
        kept.extend(storages(loss.grad_fn) if one is model else [])
        loss.backward()
        results.append({name: parameter.grad for name, parameter in one.named_parameters() if parameter.requires_grad})
    assert copies
    assert kept
    assert not set(copies) & set(kept)
    assert results[0].keys() == results[1].keys()
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


def spy(guest: Guest, copies: list[int]) -> Any:
    def bring() -> None:
        Guest._bring(guest)
        copies.extend(copy.untyped_storage()._cdata for _, copy in guest._swapped)
        KEPT.extend(copy for _, copy in guest._swapped)  # alive, so that no address is used twice

    return bring


KEPT: list[torch.Tensor] = []


def storages(node: Any) -> list[int]:
    """The memories that a graph will hand to its backward pass."""
    found = saved_tensors(node)
    KEPT.extend(found)
    return [tensor.untyped_storage()._cdata for tensor in found]


@pytest.mark.parametrize("moment", ["before", "between"])
def test_without_memory_for_a_visit_nobody_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    tiny.checkpoint(tmp_path, "llama", stored=torch.bfloat16)
    model, whole = load(tmp_path, dtype=torch.float32), load(tmp_path, "cpu", dtype=torch.float32)
    real = Guest._copies

    def fail(self: Guest, seats: Any) -> list[torch.Tensor]:
        found = real(self, seats)
        if len(seats) > 5:
            monkeypatch.undo()  # once
            if moment == "between":
                return found[:-1]  # fewer than there are seats: an error while they are taken
            raise MemoryError("none left")
        return found

    monkeypatch.setattr(Guest, "_copies", fail)
    with torch.no_grad(), pytest.raises((MemoryError, ValueError)):
        model(IDS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiled_model_on_disk_gives_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    """Compiled in pieces: blocks are, what brings their weights is not."""
    tiny.checkpoint(tmp_path, "llama", stored=torch.bfloat16)
    model, whole = load(tmp_path, dtype=dtype), load(tmp_path, "cpu", dtype=dtype)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(IDS).logits, whole(IDS).logits)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_adapters_are_not_merged_into_files(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    model = load(tmp_path)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(OffloadError, match="disk"):
        model.merge_adapter()
    assert is_offloaded(model)
    assert not is_offloaded(load(tmp_path, "cpu"))


def test_missing_weights_of_a_disk_map_are_initialised_in_memory(tmp_path: Path) -> None:
    tensors = toy.weights()
    missing = tensors.pop("model.layers.3.up.weight")
    model, report = toy.load(toy.save(tmp_path, tensors), device_map={"": "disk"})
    assert report.missing == ("model.layers.3.up.weight",)
    assert torch.equal(model.model.layers[3].up.weight, torch.full_like(missing, 0.25))
    assert torch.equal(model.model.layers[2].up.weight, tensors["model.layers.2.up.weight"])


def test_limits_are_kept_or_the_load_is_refused(tmp_path: Path) -> None:
    built = tiny.checkpoint(tmp_path, "llama")
    total = built.get_memory_footprint()
    for limits in ({"cpu": total - 1}, {"cpu": total - 1, "disk": 10**9}):
        with pytest.raises(DeviceMapError, match=f"cpu: {total} bytes of weights, {total - 1} are allowed"):
            load(tmp_path, "cpu", max_memory=limits)
    with pytest.raises(DeviceMapError, match="disk"):
        load(tmp_path, "disk", max_memory={"cpu": 10**9, "disk": 100})


def test_pickled_weights_stay_in_their_file_too(tmp_path: Path) -> None:
    built = tiny.checkpoint(tmp_path / "a", "llama")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    torch.save(built.state_dict(), tmp_path / "b" / "pytorch_model.bin")
    model = load(tmp_path / "b", use_safetensors=False)
    assert model.load_report.bytes_copied == 0
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, built(IDS).logits, atol=1e-5)


def test_what_has_to_be_decoded_cannot_stay_on_disk(tmp_path: Path) -> None:
    built = tiny.model("llama", intermediate_size=64)
    gguf_files.save(built, tmp_path / "model.gguf", "Q8_0")
    with pytest.raises(DeviceMapError, match=r"decoded while loading.*'model\.layers\.0\.mlp"):
        load(tmp_path, gguf_file="model.gguf")


@no_accelerator
def test_automatic_maps_leave_on_disk_what_does_not_fit(tmp_path: Path) -> None:
    built = tiny.checkpoint(tmp_path, "llama")
    total = built.get_memory_footprint()
    model = load(tmp_path, "auto", max_memory={"cpu": total - 1}, offload_folder=str(tmp_path / "none"))
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert not (tmp_path / "none").exists()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, built(IDS).logits, atol=1e-5)
