"""Device maps on a GPU: what visits it, how much of it that takes, and that the next block comes meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, LoraConfig
from loadstone.errors import OffloadError
from loadstone.loading.courier import Courier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYERS = 12
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve blocks of 68 MB in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=2048, intermediate_size=4096, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("offload")
    LlamaForCausalLM.from_config(config).save_pretrained(directory, max_shard_size="300MB")
    return directory


def load(place: Path, device_map: Any = 0, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, device_map=device_map, **options)


def spread(place: str) -> dict[str, Any]:
    return {"": place, "model.layers.0": 0, "model.norm": 0}


def ids(length: int = 24) -> torch.Tensor:
    return torch.arange(length, device="cuda")[None] * 7 % 4096


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_blocks_give_the_same(checkpoint: Path, place: str) -> None:
    whole, model = load(checkpoint), load(checkpoint, spread(place))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(ids()).logits, whole(ids()).logits)
            assert torch.equal(model(ids().cpu()).logits.cuda(), whole(ids()).logits)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids(), **greedy), whole.generate(ids(), **greedy))
    layer = model.model.layers[3].mlp.up_proj
    assert layer.weight.device.type == "cpu"
    assert layer.weight.is_pinned() == (place == "cpu")
    assert not layer.weight.requires_grad
    assert model.device == torch.device("cuda:0")
    assert all(torch.equal(t.cuda(), whole.state_dict()[n]) for n, t in model.state_dict().items())
    with pytest.raises(OffloadError):
        model.to("cuda")


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("length", [1, 512])
def test_two_blocks_are_on_the_gpu_at_a_time(checkpoint: Path, place: str, length: int) -> None:
    """However far the host runs ahead of the device."""
    model = load(checkpoint, spread(place))
    block = sum(parameter.nbytes for parameter in model.model.layers[3].parameters())
    with torch.no_grad():
        model(ids(length), use_cache=False)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            model(ids(length), use_cache=False)
        torch.cuda.synchronize()
    activations = 64 * length * 2048 * 2 + (64 << 20)
    assert torch.cuda.max_memory_allocated() - before <= 2 * block + activations
    assert torch.cuda.memory_allocated() - before <= 1 << 20


def test_the_next_block_is_on_its_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoint, spread("cpu"))
    brought: list[bool] = []
    real = Courier.bring

    def watch(self: Courier, owner: Any, parcels: Any) -> Any:
        brought.append(self._waiting is not None and self._waiting[0] is owner)
        return real(self, owner, parcels)

    monkeypatch.setattr(Courier, "bring", watch)
    with torch.no_grad():
        model(ids())
    assert brought.count(False) == 1  # the first visitor
    assert brought.count(True) == LAYERS - 1  # the other blocks but the resident one, and the head


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_adapters_beside_offloaded_blocks(checkpoint: Path, checkpointing: bool) -> None:
    results = []
    for device_map in (0, spread("cpu")):
        model = load(checkpoint, device_map, dtype=torch.float32)
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=ids(), labels=ids()).loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        if device_map != 0:
            weights = sum(p.nbytes for n, p in model.named_parameters() if "lora" not in n)
            assert peak < weights / 2  # autograd keeps no block
        del model
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        assert torch.allclose(grad, results[1][name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_quantized_blocks_visit(checkpoint: Path, tmp_path: Path, method: str) -> None:
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    config = four if method == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    whole = load(checkpoint, quantization_config=config)
    whole.save_pretrained(tmp_path)
    for model in (load(tmp_path, spread("disk")), load(checkpoint, spread("cpu"), quantization_config=config)):
        with torch.no_grad():
            one, other = model(ids()).logits.float(), whole(ids()).logits.float()
        assert ((one - other).abs().max() / other.abs().max()).item() < 2e-2


def test_what_does_not_fit_is_offloaded(checkpoint: Path) -> None:
    model = load(checkpoint, "auto", max_memory={0: "500MB", "cpu": "200MB"})
    assert set(model.hf_device_map.values()) == {0, "cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, load(checkpoint)(ids()).logits)
    assert set(load(checkpoint, "auto").hf_device_map.values()) == {0}


def test_weights_on_disk_of_another_dtype(checkpoint: Path) -> None:
    model, whole = load(checkpoint, spread("disk"), dtype=torch.float16), load(checkpoint, dtype=torch.float16)
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, whole(ids()).logits)
    assert model.dtype == torch.float16


@two_gpus
@pytest.mark.parametrize("kind", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_several_gpus(checkpoint: Path, kind: str) -> None:
    model = load(checkpoint, kind, max_memory=dict.fromkeys(range(torch.cuda.device_count()), "600MB"))
    assert len(set(model.hf_device_map.values())) > 1
    with torch.no_grad():
        out = model(ids()).logits
        assert out.device == torch.device("cuda:0")
        assert torch.equal(out, load(checkpoint)(ids()).logits)
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad.device == p.device for p in model.parameters() if p.requires_grad)
