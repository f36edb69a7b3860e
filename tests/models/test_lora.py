"""LoRA without PEFT: what the layers compute, what is trained, merging, files, and files that are not to be trusted."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, Linear4bit, Linear8bitLt, LoraConfig
from loadstone.errors import (
    ArgumentError,
    ConfigError,
    FormatError,
    LoadstoneError,
    MissingWeightsError,
    NotFoundError,
    PathError,
    QuantizationError,
    ShapeMismatchError,
    UnexpectedWeightsError,
    UnsafeFormatError,
)
from loadstone.models.adapters.layer import LoraLinear
from loadstone.models.layers import Conv1D
from loadstone.quant.gptq import GPTQLinear
from loadstone.quant.weight_only import Int4WeightOnlyLinear, Int8WeightOnlyLinear

IDS = torch.arange(1, 19).view(2, 9)
NAMED = {"llama": ["q_proj", "down_proj"], "mistral": ["v_proj", "o_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
FILES = ("adapter_config.json", "adapter_model.safetensors")


def lora(targets: Any = "all-linear", **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": targets, "init_lora_weights": False, **options})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, attention_mask=torch.ones_like(IDS)).logits


def adapted(kind: str, seed: int = 0, **options: Any) -> Any:
    """A tiny model with a random adapter that changes its logits."""
    model = tiny.model(kind)
    torch.manual_seed(seed)
    model.add_adapter(lora(**options))
    return model


def layers() -> st.SearchStrategy[tuple[nn.Module, int, int]]:
    """(a layer of any kind, in_features, out_features)."""

    def build(kind: str, rows: int, columns: int, seed: int) -> tuple[nn.Module, int, int]:
        torch.manual_seed(seed)
        plain = nn.Linear(columns, rows, dtype=torch.float64 if kind == "double" else None)
        if kind == "conv":
            made: nn.Module = Conv1D(rows, columns)
            tiny.randomize(made, seed)
        else:
            packed: dict[str, Any] = {"4bit": Linear4bit, "8bit": Linear8bitLt}
            made = packed[kind].from_linear(plain) if kind in packed else plain
        return made, columns, rows

    sizes = st.sampled_from((2, 6, 16))
    return st.builds(
        build, st.sampled_from(("plain", "double", "conv", "4bit", "8bit")), sizes, sizes, st.integers(0, 99)
    )


def effective(layer: Any) -> Tensor:
    """The weight a layer multiplies with, (out, in)."""
    if hasattr(layer, "dequantized_weight"):
        return layer.dequantized_weight(torch.float32)
    return layer.weight.t() if isinstance(layer, Conv1D) else layer.weight


@tiny.examples(40)
@given(layers(), st.integers(1, 5), st.floats(0.1, 16), st.booleans(), st.integers(0, 99))
def test_forward_is_the_formula_and_merging_writes_it_into_the_weight(
    made: tuple[nn.Module, int, int], rank: int, alpha: float, stable: bool, seed: int
) -> None:
    base, columns, rows = made
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=stable, init_lora_weights=False)
    layer = LoraLinear(base).eval()
    layer.add("a", config)
    layer.active = "a"
    double = next(base.parameters()).dtype == torch.float64
    x = torch.randn(3, columns, dtype=torch.float64 if double else torch.float32)
    up, down = layer.lora_B["a"].weight, layer.lora_A["a"].weight
    assert up.shape == (rows, rank)
    assert down.shape == (rank, columns)
    scale = alpha / (rank**0.5 if stable else rank)
    expected = base(x).double() + scale * (x.double() @ down.double().t() @ up.double().t())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))

    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    target = effective(base).double() + scale * up.double() @ down.double()
    old = layer(x)
    layer.merge()
    weight = effective(base).double()
    packed = hasattr(base, "dequantized_weight")
    if packed:  # what encoding the sum gives, no less: from a fresh layer
        fresh = nn.Linear(columns, rows)
        fresh.weight.data = target.float()
        torch.testing.assert_close(weight, effective(type(base).from_linear(fresh)).double(), rtol=0.05, atol=1e-2)
    else:
        torch.testing.assert_close(weight, target, rtol=1e-5, atol=1e-5 * float(target.detach().abs().max()))
        torch.testing.assert_close(layer(x), old, rtol=1e-4, atol=1e-4 * float(old.detach().abs().max()))
    layer.unmerge()
    for name, tensor in base.state_dict().items():
        if packed:
            assert torch.equal(tensor, before[name])
        else:
            torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-5 * float(target.detach().abs().max()))


@pytest.mark.parametrize("packed", [Int8WeightOnlyLinear, Int4WeightOnlyLinear, GPTQLinear])
def test_other_packed_layers_and_those_that_cannot_be_written_to(packed: Any) -> None:
    torch.manual_seed(0)
    only_read = packed is GPTQLinear
    base = packed(128, 64) if only_read else packed.from_linear(nn.Linear(128, 64))
    layer = LoraLinear(base)
    layer.add("a", lora())
    layer.active = "a"
    x = torch.randn(3, 128)
    before, expected = base(x), layer(x)
    held = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    if only_read:
        with pytest.raises(QuantizationError, match="cannot be written to"):
            layer.merge()
        assert layer.merged is None
    else:
        layer.merge()
        assert (layer(x) - expected).abs().max() < (before - expected).abs().max()
        layer.unmerge()
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(tensor, held[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(kind: str, dtype: torch.dtype) -> None:
    model = tiny.model(kind).to(dtype)
    before = logits(model)
    model.add_adapter(LoraConfig(target_modules=NAMED[kind]))
    assert torch.equal(logits(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in trained)
    assert all(model.get_parameter(name).dtype == torch.float32 for name in trained)
    model.train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trained
    assert model.active_adapters() == ["default"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_all_linear_is_every_linear_layer_but_the_head(kind: str) -> None:
    model = adapted(kind)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    per_layer = 4 if kind == "gpt2" else 7
    assert len(wrapped) == per_layer * model.config.num_hidden_layers
    assert not isinstance(model.lm_head, LoraLinear)
    by_expression = tiny.model(kind)
    by_expression.add_adapter(lora(r".*\.(attn|mlp|self_attn)\.\w+"))
    assert wrapped == [name for name, m in by_expression.named_modules() if isinstance(m, LoraLinear)]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_merge_unmerge_unload(kind: str) -> None:
    plain = logits(tiny.model(kind))
    model = adapted(kind)
    with_adapter = logits(model)
    assert (with_adapter - plain).abs().max() > 0.1
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-4)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    model.enable_adapters()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), with_adapter, rtol=1e-4, atol=1e-4)
    unloaded = model.unload()
    torch.testing.assert_close(logits(unloaded), plain, rtol=1e-4, atol=1e-4)
    for model in (merged, unloaded):
        assert not model.adapters
        assert set(model.state_dict()) == set(tiny.model(kind).state_dict())


def test_several_adapters_one_at_a_time() -> None:
    model = adapted("llama")
    first = logits(model)
    model.add_adapter(lora(["q_proj"], r=2), "other")
    second = logits(model)
    assert not torch.equal(first, second)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".other." in name for name in trained)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    assert model.active_adapters() == []
    model.set_adapter("other")
    assert torch.equal(logits(model), second)
    assert not isinstance(model.model.layers[0].mlp.down_proj, LoraLinear)
    with pytest.raises(ArgumentError, match="no adapter 'default'"):
        model.set_adapter("default")


def test_what_merging_forbids() -> None:
    model = adapted("llama")
    model.merge_adapter()
    for call in (lambda: model.add_adapter(lora(), "b"), lambda: model.set_adapter("default"),
                 lambda: model.delete_adapter("default")):  # fmt: skip
        with pytest.raises(ArgumentError, match="unmerge_adapter"):
            call()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_quantized_models(tmp_path: Path, kind: str, bits: int) -> None:
    tiny.checkpoint(tmp_path / "base", kind)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model)
    torch.manual_seed(0)
    model.add_adapter(lora())
    trained = logits(model)
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    model.save_adapter(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=quantization)
    assert torch.equal(logits(loaded), trained)
    assert loaded.is_quantized
    assert loaded.active_adapters() == ["default"]
    model.merge_adapter()
    assert (logits(model) - trained).abs().max() < (plain - trained).abs().max()
    model.unload()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pure_quantized_weights_refuse_to_train(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config={"load_in_8bit": True, **BNB})
    with pytest.raises(QuantizationError, match="dd adapters"):
        model.requires_grad_(True)
    model.requires_grad_(False)
    model.train()
    with pytest.raises(QuantizationError, match="dd adapters"):
        model(IDS, labels=IDS)


BNB = {"quant_method": "bitsandbytes"}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_files_round_trip_and_from_pretrained_takes_them(tmp_path: Path, kind: str) -> None:
    tiny.checkpoint(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model.add_adapter(lora(NAMED[kind], lora_alpha=5.0, use_rslora=True), "mine")
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")  # with adapters, that is the adapter
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == sorted(FILES)
    written = json.loads((tmp_path / "adapter" / FILES[0]).read_text())
    assert written["fan_in_fan_out"] is (kind == "gpt2")
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    by_auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    by_class = type(model).from_pretrained(tmp_path / "adapter")
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    by_hand.load_adapter(tmp_path / "adapter", "again")
    for loaded in (by_auto, by_class, by_hand):
        assert torch.equal(logits(loaded), expected)
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
    by_hand.unload()
    by_hand.load_adapter(tmp_path / "adapter", is_trainable=True)
    assert any(p.requires_grad for p in by_hand.parameters())
    by_hand.save_adapter(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_a_directory_with_a_model_and_an_adapter_is_its_own_base(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "both", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    model.add_adapter(lora())
    model.adapters["default"].base_model_name_or_path = "nobody/nothing"
    model.save_adapter(tmp_path / "both")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))


def test_arguments_reach_the_base(tmp_path: Path) -> None:
    directory = adapter_on_disk(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager", output_loading_info=True
    )
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"]
    assert model.config._attn_implementation == "eager"
    assert model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32


def test_copies_and_pickles() -> None:
    for kind in tiny.KINDS:
        model = adapted(kind)
        expected = logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), expected)
            other.merge_adapter()
            assert torch.equal(logits(model), expected)


def test_training_is_deterministic_and_dropout_is_in_training_only() -> None:
    def losses(seed: int) -> list[float]:
        model = adapted("llama", lora_dropout=0.3)
        assert torch.equal(logits(model), logits(model))
        torch.manual_seed(seed)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        found = []
        for _ in range(6):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    first = losses(0)
    assert first == losses(0)
    assert first[0] != losses(1)[0]
    assert first[-1] < first[0]


def test_the_loss_stays_fused_over_a_frozen_head() -> None:
    model = adapted("llama").train()
    outputs = model(IDS, labels=IDS)
    assert outputs.logits is None
    fused = torch.autograd.grad(outputs.loss, [p for p in model.parameters() if p.requires_grad])
    loss = model(IDS, labels=IDS, skip_logits=False).loss
    plain = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    for left, right in zip(fused, plain, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model = adapted("llama").train()
        if recompute:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for left, right in zip(*gradients, strict=True):
        assert torch.equal(left, right)


# What is refused


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0}, {"r": -1}, {"r": 2.0}, {"r": True}, {"r": 1 << 30}, {"lora_alpha": float("nan")}, {"lora_alpha": "8"},
        {"lora_dropout": 1.0}, {"lora_dropout": -0.1}, {"bias": "all"}, {"use_rslora": 1}, {"target_modules": []},
        {"target_modules": ""}, {"target_modules": [1]}, {"target_modules": {"a": 1}}, {"init_lora_weights": "pissa"},
        {"init_lora_weights": 1}, {"base_model_name_or_path": 5}, {"revision": []},
    ],
    ids=str,
)  # fmt: skip
def test_bad_configurations(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="LoraConfig"):
        LoraConfig(**fields)
    with pytest.raises(ConfigError):
        LoraConfig.from_dict({"peft_type": "LORA", **fields})


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        (None, ConfigError, "q_proj"),
        (["q_prj"], ConfigError, "q_proj"),
        (["embed_tokens"], ConfigError, "Embedding"),
        ("(", ConfigError, "regular expression"),
        ("nothing", ConfigError, "no linear layer"),
    ],
)
def test_bad_targets(targets: Any, error: type[Exception], match: str) -> None:
    model = tiny.model("llama")
    before = set(model.state_dict())
    with pytest.raises(error, match=match):
        model.add_adapter(lora(targets))
    assert set(model.state_dict()) == before
    assert not model.adapters


def test_a_tied_head_is_refused_and_an_untied_one_is_not() -> None:
    model = tiny.model("llama", tie_word_embeddings=True)
    with pytest.raises(ArgumentError, match="tied"):
        model.add_adapter(lora(["lm_head"]))
    free = adapted("llama", targets=["lm_head"])
    assert isinstance(free.lm_head, LoraLinear)
    outputs = free.train()(IDS, labels=IDS)
    assert outputs.logits is not None
    outputs.loss.backward()


@pytest.mark.parametrize("name", ["a.b", "", "a/b", "../x", "x" * 65, 3])
def test_bad_adapter_names(name: Any) -> None:
    with pytest.raises(ArgumentError, match="name"):
        tiny.model("llama").add_adapter(lora(), name)


def test_a_name_in_use_is_refused() -> None:
    with pytest.raises(ArgumentError, match="already"):
        adapted("llama").add_adapter(lora())


def adapter_on_disk(tmp_path: Path) -> Path:
    tiny.checkpoint(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(lora())
    model.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(tmp_path: Path, directory: Path) -> LoadstoneError:
    """The error that loading gives, by either way; the model must be left as it was."""
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    names, requires = set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(LoadstoneError) as caught:
        model.load_adapter(directory)
    assert set(model.state_dict()) == names
    assert not model.adapters
    assert requires == [p.requires_grad for p in model.parameters()]
    with pytest.raises(type(caught.value)):
        AutoModelForCausalLM.from_pretrained(directory)
    return caught.value


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "JSON"), ("[]", "object"), ('{"peft_type": "LORA", "r": NaN}', "JSON"), ("[" * 100_000, "JSON"),
        ('{"peft_type": "LORA", "peft_type": "IA3"}', "twice"), ('{"peft_type": "IA3"}', "IA3"), ("{}", "None"),
        ('{"peft_type": ["LORA"]}', "LORA"), ('{"peft_type": "LORA", "use_dora": true}', "use_dora"),
        ('{"peft_type": "LORA", "layer_replication": [[0, 4]]}', "layer_replication"),
        ('{"peft_type": "LORA", "alpha_pattern": {"a": 1}}', "alpha_pattern"),
        ('{"peft_type": "LORA", "modules_to_save": ["lm_head"]}', "modules_to_save"),
        ('{"peft_type": "LORA", "bias": "lora_only"}', "bias"),
        ('{"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}', "init_lora_weights"),
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_bad_configuration_files(tmp_path: Path, text: str, match: str) -> None:
    directory = adapter_on_disk(tmp_path)
    (directory / FILES[0]).write_text(text)
    error = refused(tmp_path, directory)
    assert isinstance(error, ConfigError)
    assert match in str(error)


def test_a_huge_or_linked_configuration_file(tmp_path: Path) -> None:
    directory = adapter_on_disk(tmp_path)
    path = directory / FILES[0]
    good = path.read_bytes()
    path.write_bytes(good + b" " * (2 << 20))
    assert "is at most" in str(refused(tmp_path, directory))
    path.unlink()
    (tmp_path / "elsewhere.json").write_bytes(good)
    path.symlink_to(tmp_path / "elsewhere.json")
    assert isinstance(refused(tmp_path, directory), PathError)


def _without(key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != key}


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_WEIGHTS: dict[str, tuple[Any, type[Exception]]] = {
    "one side only": (lambda t: _without(KEY, t), MissingWeightsError),
    "nothing": (lambda t: {}, MissingWeightsError),
    "another rank": (lambda t: {**t, KEY: torch.zeros(4, 32)}, ShapeMismatchError),
    "another width": (lambda t: {**t, KEY: torch.zeros(3, 31)}, ShapeMismatchError),
    "integers": (lambda t: {**t, KEY: torch.zeros(3, 32, dtype=torch.int64)}, UnexpectedWeightsError),
    "a layer that is not there": (
        lambda t: {**t, KEY.replace("layers.0", "layers.9"): torch.zeros(3, 32)}, UnexpectedWeightsError,
    ),
    "a module that is not linear": (
        lambda t: {**t, "base_model.model.model.norm.lora_A.weight": torch.zeros(3, 32)}, UnexpectedWeightsError,
    ),
    "dora": (lambda t: {**t, KEY.replace("lora_A", "lora_magnitude_vector"): torch.zeros(3)}, UnexpectedWeightsError),
    "the base's own": (lambda t: {**t, "model.norm.weight": torch.zeros(32)}, UnexpectedWeightsError),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_bad_weight_files(tmp_path: Path, fault: str) -> None:
    directory = adapter_on_disk(tmp_path)
    change, error = BAD_WEIGHTS[fault]
    save_file(change(load_file(directory / FILES[1])), directory / FILES[1])
    assert isinstance(refused(tmp_path, directory), error)


def test_missing_pickled_and_damaged_weights(tmp_path: Path) -> None:
    directory = adapter_on_disk(tmp_path)
    whole = (directory / FILES[1]).read_bytes()
    (directory / FILES[1]).write_bytes(whole[:-1])
    assert isinstance(refused(tmp_path, directory), FormatError)
    (directory / FILES[1]).unlink()
    assert isinstance(refused(tmp_path, directory), NotFoundError)
    torch.save({}, directory / "adapter_model.bin")
    assert isinstance(refused(tmp_path, directory), UnsafeFormatError)


@pytest.mark.parametrize(
    ("base", "error"),
    [(None, ConfigError), ("", ConfigError), ("/no/such/place", NotFoundError), ("adapter", ConfigError)],
)
def test_bad_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str | None, error: type[Exception]) -> None:
    directory = adapter_on_disk(tmp_path)
    monkeypatch.chdir(tmp_path)
    values = json.loads((directory / FILES[0]).read_text())
    (directory / FILES[0]).write_text(json.dumps({**values, "base_model_name_or_path": base}))
    with pytest.raises(error):
        AutoModelForCausalLM.from_pretrained(directory)


def test_saving_and_pushing_what_cannot_be(tmp_path: Path) -> None:
    model = adapted("llama")
    with pytest.raises(ArgumentError, match="merge_and_unload"):
        model.save_pretrained(tmp_path, state_dict={})
    with pytest.raises(ArgumentError, match="merge_and_unload"):
        model.push_to_hub("me/model")
    with pytest.raises(ArgumentError, match="no adapter"):
        tiny.model("llama").save_adapter(tmp_path)
    with pytest.raises(ArgumentError, match="unknown argument"):
        model.load_adapter(tmp_path, "b", revison="main")
