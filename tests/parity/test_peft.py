"""PEFT on our models, plain and quantized, and our LoRA against PEFT's: numbers, files, training."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import smollm2
import tiny
import torch
from parity.peers import PEER_MODELS, transformers
from torch import Tensor, nn

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, LoraConfig
from loadstone.cli.rhymes import RHYMES
from loadstone.errors import GenerationError, QuantizationError
from loadstone.models.adapters.layer import LoraLinear
from loadstone.quant.gptq import GPTQLinear
from loadstone.quant.weight_only import Int4WeightOnlyLinear, Int8WeightOnlyLinear

peft = pytest.importorskip("peft", reason="peft, whose adapters are read and written, is not installed (extra: test)")

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning", "ignore:.*Merge lora:UserWarning")
IDS = torch.arange(1, 19).view(2, 9)
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "mistral": ["k_proj", "o_proj", "gate_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
    "nf4 in bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
}


def options(kind: str, **more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind], **more}


def peft_config(kind: str, **more: Any) -> Any:
    return peft.LoraConfig(**options(kind, task_type="CAUSAL_LM", init_lora_weights=False, **more))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def wrapped(model: Any, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    kind = model.config.model_type
    return peft.get_peft_model(model, peft_config(kind, **more)).eval()


def held(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors, as bytes: packed ones may look like NaN."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for name, t in tensors.items()
            if "lora_" not in name}  # fmt: skip


def peer_base(kind: str) -> Any:
    """The peer's model with the weights of `tiny.model`."""
    base = PEER_MODELS[kind](transformers.AutoConfig.for_model(**tiny.values(kind), attn_implementation="eager")).eval()
    base.load_state_dict(tiny.model(kind).state_dict())
    return base


# PEFT on our models


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_peft_does_on_our_models_what_it_does_on_the_peers(kind: str, tmp_path: Path) -> None:
    mine = tiny.model(kind)
    ours, theirs = wrapped(mine), wrapped(peer_base(kind))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (ours, theirs)]  # GPT-2 has dropout in training
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)
    for number, model in enumerate((ours, theirs)):
        model.save_pretrained(tmp_path / str(number))
    crossed = peft.PeftModel.from_pretrained(peer_base(kind), tmp_path / "0").eval()
    torch.testing.assert_close(logits(crossed), logits(ours.eval()), rtol=1e-4, atol=1e-4)
    crossed = peft.PeftModel.from_pretrained(tiny.model(kind), tmp_path / "1").eval()
    torch.testing.assert_close(logits(crossed), logits(theirs.eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_merging_and_generating_through_peft(kind: str) -> None:
    plain = tiny.model(kind)
    model = wrapped(tiny.model(kind))
    expected = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(plain))
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**prompt)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    assert set(merged.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(**prompt), tokens)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_all_linear_and_pefts_own_defaults(kind: str) -> None:
    every = wrapped(tiny.model(kind), target_modules="all-linear")  # the head is left out, as for the peer's models
    adapted = [n for n, m in every.named_modules() if hasattr(m, "base_layer")]
    assert len(adapted) == (4 if kind == "gpt2" else 7) * every.config.num_hidden_layers
    usual = wrapped(tiny.model(kind), target_modules=None)
    names = {n.rpartition(".")[2] for n, m in usual.named_modules() if hasattr(m, "base_layer")}
    assert names == ({"c_attn"} if kind == "gpt2" else {"q_proj", "v_proj"})


def test_the_loss_through_peft_is_fused_unless_the_head_is_adapted() -> None:
    assert wrapped(tiny.model("llama")).train()(input_ids=IDS, labels=IDS).logits is None
    head = wrapped(tiny.model("llama"), target_modules=["lm_head"]).train()
    outputs = head(input_ids=IDS, labels=IDS)
    assert outputs.logits is not None
    outputs.loss.backward()


def test_saved_models_name_their_base(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "base", "llama")
    model = wrapped(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_prompt_tuning_trains_but_refuses_to_generate() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=32, num_layers=2,
                                     num_attention_heads=4)  # fmt: skip
    base = tiny.model("llama")
    model = peft.get_peft_model(base, config)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(GenerationError, match="prepare_inputs_for_generation"):
        model.generate(input_ids=IDS, max_new_tokens=2)
    assert base.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2).shape == (2, 11)


def test_conv1d_is_its_own_class_all_the_same() -> None:
    model = tiny.model("gpt2")
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer).__module__ == "loadstone.models.layers"
    assert isinstance(layer, transformers.pytorch_utils.Conv1D)
    assert isinstance(layer, type(layer))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert torch.equal(other.weight, layer.weight)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 32)
    torch.testing.assert_close(compiled(x), layer(x))


# PEFT on our quantized models


def quantized(directory: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=BitsAndBytesConfig(**QUANTIZATIONS[name])
    )


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("safe", [False, True])
def test_peft_on_quantized_models(tmp_path: Path, kind: str, name: str, safe: bool) -> None:
    tiny.checkpoint(tmp_path / "base", kind, stored=torch.bfloat16)
    base = peft.prepare_model_for_kbit_training(quantized(tmp_path / "base", name))
    assert base.is_gradient_checkpointing
    plain = logits(base)
    model = wrapped(base)
    trained = logits(model)
    before = held(base)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")

    model.merge_adapter(safe_merge=safe)
    merged = logits(model)
    assert (merged - trained).abs().max() < (plain - trained).abs().max()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in held(base).items())
    model.unmerge_adapter()
    after = held(base)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert torch.equal(logits(model), trained)

    again = peft.prepare_model_for_kbit_training(quantized(tmp_path / "base", name))
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), trained)
    unloaded = loaded.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(unloaded), merged)
    assert unloaded.is_quantized
    assert not any(hasattr(m, "base_layer") for m in unloaded.modules())


def test_copies_of_a_wrapped_quantized_model_merge_themselves(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    model = wrapped(quantized(tmp_path, "int8"))
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.merge_adapter(safe_merge=True)
        assert not torch.equal(logits(other), expected)
        assert torch.equal(logits(model), expected)
        other.unmerge_adapter()
        assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("wish", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_what_needs_the_matrix_itself_is_refused_on_codes(tmp_path: Path, wish: dict[str, Any]) -> None:
    tiny.checkpoint(tmp_path, "llama")
    with pytest.raises(QuantizationError, match=next(iter(wish))):
        peft.get_peft_model(quantized(tmp_path, "int8"), peft.LoraConfig(**options("llama", **wish)))


@pytest.mark.parametrize("packed", [Int8WeightOnlyLinear, Int4WeightOnlyLinear, GPTQLinear])
@pytest.mark.parametrize("safe", [False, True])
def test_peft_on_other_packed_layers(packed: Any, safe: bool) -> None:
    torch.manual_seed(0)
    only_read = packed is GPTQLinear
    base = packed(128, 64) if only_read else packed.from_linear(nn.Linear(128, 64))
    model = peft.get_peft_model(
        nn.Sequential(base), peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    )
    x, codes = torch.randn(3, 128), held(base)
    before, expected = base(x), model(x)
    if only_read:
        with pytest.raises(QuantizationError, match="cannot be written to"):
            model.merge_adapter(safe_merge=safe)
    else:
        model.merge_adapter(safe_merge=safe)
        assert (model(x) - expected).abs().max() < (before - expected).abs().max()
        model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    assert all(torch.equal(tensor, codes[name]) for name, tensor in held(base).items())


def test_a_merge_that_fails_leaves_the_codes(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    model = wrapped(quantized(tmp_path, "nf4"))
    before = held(model)
    with torch.no_grad():
        next(m for m in model.modules() if hasattr(m, "base_layer")).lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(model).items())


# Our LoRA and PEFT's


@pytest.mark.parametrize("name", ["plain", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_our_lora_is_pefts_lora_and_files_cross(tmp_path: Path, kind: str, name: str) -> None:
    tiny.checkpoint(tmp_path / "base", kind)

    def base() -> Any:
        if name in QUANTIZATIONS:
            return quantized(tmp_path / "base", name)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="bfloat16" if name == "bf16" else None)

    theirs = wrapped(base(), use_rslora=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = base()
    ours.load_adapter(tmp_path / "theirs", is_trainable=True)
    assert torch.equal(logits(ours), logits(theirs))
    gradients = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.eval()
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))

    ours.save_adapter(tmp_path / "ours")
    crossed = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert torch.equal(logits(crossed), logits(theirs))
    expected = theirs.merge_and_unload().state_dict()
    found = ours.merge_and_unload().state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_adapter_of_ours_on_the_peers_model(tmp_path: Path, kind: str) -> None:
    tiny.checkpoint(tmp_path / "base", kind)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    ours.add_adapter(LoraConfig(**options(kind, init_lora_weights=False)))
    ours.save_adapter(tmp_path / "adapter")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        as_users_do = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(as_users_do.eval()), logits(theirs), rtol=1e-4, atol=1e-4)


def test_new_adapters_start_as_pefts_do() -> None:
    """A within ±1/sqrt(in), spread as a uniform's; B zero; or A normal with deviation 1/r."""
    for start in (True, "gaussian"):
        ours = tiny.model("llama", hidden_size=256, num_attention_heads=4)
        ours.add_adapter(LoraConfig(r=16, target_modules=["q_proj"], init_lora_weights=start))
        theirs = peft.get_peft_model(
            tiny.model("llama", hidden_size=256, num_attention_heads=4),
            peft.LoraConfig(r=16, target_modules=["q_proj"], init_lora_weights=start),
        )
        spreads = []
        for model in (ours, theirs):
            layer = next(m for m in model.modules() if hasattr(m, "base_layer"))
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert not up.any()
            spreads.append([float(down.detach().std()), float(down.detach().abs().max())])
        assert spreads[0][0] == pytest.approx(spreads[1][0], rel=0.06)
        if start is True:
            assert spreads[0][1] <= 256**-0.5
        assert isinstance(next(m for m in ours.modules() if hasattr(m, "base_layer")), LoraLinear)


def test_add_adapter_takes_pefts_configuration() -> None:
    model = tiny.model("llama")
    model.add_adapter(peft.LoraConfig(**options("llama")))
    assert sorted(model.adapters["default"].target_modules) == sorted(TARGETS["llama"])
    assert model.adapters["default"].lora_alpha == 6


# QLoRA on real weights

_REASON = smollm2.why_not()


def _blocks(directory: Path, length: int = 48) -> Tensor:
    from loadstone.loading import resolve_source
    from loadstone.models.tokenizer import load_tokenizer

    ids = load_tokenizer(resolve_source(directory)).encode("\n".join(RHYMES))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def qlora_losses(model: Any, blocks: Tensor, steps: int) -> list[float]:
    """The loss before each of some AdamW steps, two blocks a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    model.train()
    losses = []
    for step in range(steps):
        batch = blocks[[(2 * step + k) % len(blocks) for k in range(2)]]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def qlora_curves(steps: int, layers: int, tmp_path: Path) -> tuple[list[float], list[float]]:
    """(ours: our model and LoRA; the peer's: transformers, bitsandbytes, PEFT), from one initial adapter.

    layers: of SmolLM2's 30, to save time; docs/adapters.md has longer runs.
    """
    directory = smollm2.smollm2_directory()
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    blocks = _blocks(directory)
    ours = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, num_hidden_layers=layers, quantization_config=BitsAndBytesConfig(**quantization)
    )
    torch.manual_seed(0)
    ours.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    ours.save_adapter(tmp_path)
    mine = qlora_losses(ours, blocks, steps)
    del ours
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        num_hidden_layers=layers,
        quantization_config=transformers.BitsAndBytesConfig(**quantization),
    )
    peer = peft.PeftModel.from_pretrained(peer, tmp_path, is_trainable=True)
    return mine, qlora_losses(peer, blocks, steps)


@pytest.mark.slow
@pytest.mark.skipif(_REASON is not None, reason=_REASON or "")
def test_qlora_follows_the_peers_loss_curve(tmp_path: Path) -> None:
    """fp32 products on both sides: the curves part by rounding only, which training amplifies."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the peer, is not installed (extra: test)")
    pytest.importorskip("tokenizers")
    mine, peers = qlora_curves(8, 6, tmp_path)
    assert mine[-1] < mine[0] - 0.2
    for left, right in zip(mine, peers, strict=True):
        assert left == pytest.approx(right, rel=1e-4)
