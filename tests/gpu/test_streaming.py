"""Loading onto a GPU: the pinned ring, the side stream and the cast on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from loadstone.loading import ring

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Larger than the ring, in several shards, so that slots are used again."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM.from_config(config)
    directory = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(directory, max_shard_size="100MB")
    return directory, model.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device_map", ["cuda", 0, "auto", {"": "cuda:0"}])
def test_weights_arrive_bit_for_bit(checkpoint: tuple[Path, dict], dtype: torch.dtype, device_map: object) -> None:
    directory, state = checkpoint
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map=device_map)
    for name, tensor in model.state_dict().items():
        assert tensor.is_cuda
        assert torch.equal(tensor.cpu(), state[name].to(dtype)), name
    assert model.model.rotary_emb.inv_freq.device == torch.device("cuda:0")


def test_memory_is_the_model_and_a_bounded_rest(checkpoint: tuple[Path, dict]) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32, device_map="cuda")
    assert torch.cuda.max_memory_allocated() - before <= model.get_memory_footprint() + (64 << 20)
    reserved = torch.cuda.memory_reserved()
    del model
    again = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32, device_map="cuda")
    assert torch.cuda.memory_reserved() <= reserved + (64 << 20), "what the load used is used again"
    del again


def test_quantized_on_the_device_with_one_tensor_more_at_a_time(checkpoint: tuple[Path, dict]) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], quantization_config=config, device_map="cuda")
    largest = 1024 * 2816 * 4  # in fp32, as which a recipe may look at it
    footprint = model.get_memory_footprint()
    assert torch.cuda.max_memory_allocated() - before <= footprint + 4 * largest + (64 << 20)
    there = AutoModelForCausalLM.from_pretrained(checkpoint[0], quantization_config=config, device_map="cpu")
    for name, tensor in there.state_dict().items():
        if "weight" in name and tensor.dtype == torch.uint8:
            differ = (model.state_dict()[name].cpu() != tensor).float().mean()
            assert differ < 1e-3, name


@pytest.mark.parametrize("option", [{}, {"disable_mmap": True}])
def test_small_slots_and_many_loads(
    checkpoint: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, option: dict[str, bool]
) -> None:
    """Slots far smaller than most tensors: every one is used again hundreds of times while others are on their way."""
    monkeypatch.setattr(ring, "SLOT", 1 << 18)
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float16, device_map="cuda", **option)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), checkpoint[1][name].half()), name


def test_logits_on_the_gpu_are_those_on_the_cpu(checkpoint: tuple[Path, dict]) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        cpu = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32)(ids).logits
        gpu = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32, device_map="cuda")
        out = gpu(ids.cuda()).logits.cpu()
    assert ((out - cpu).abs().max() / cpu.abs().max()).item() < 1e-3  # TF32 may be on


def test_offloaded_layers_run_through_hooks(checkpoint: tuple[Path, dict]) -> None:
    device_map = {"model.embed_tokens": 0, "model.layers": 0, "model.layers.7": "cpu", "model.norm": 0, "lm_head": 0,
                  "model.rotary_emb": 0}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32, device_map=device_map)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32, device_map="cuda")
    ids = torch.arange(24)[None].cuda()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-4)
