"""Classes of repositories that are written for torch alone: loadstone's plan and stream, everything else their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import remote_code
import torch
from safetensors.torch import load_file, save_file

from loadstone import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from loadstone.cli import main
from loadstone.errors import (
    ArgumentError,
    DeviceMapError,
    InitializationError,
    MissingWeightsError,
    QuantizationError,
    RemoteCodeError,
    RemoteCodeRefused,
    ShapeMismatchError,
)

AUTO_MAP = {"AutoConfig": "guest.GuestConfig", "AutoModelForCausalLM": "guest.Guest"}
CODE = """
import torch
from torch import nn

class GuestConfig:
    model_type = "guest"

    def __init__(self, width=8, layers=3, vocab_size=11, dtype=None, tie=True, **others):
        self.width, self.layers, self.vocab_size, self.dtype, self.tie = width, layers, vocab_size, dtype, tie
        self.__dict__.update(others)

    @classmethod
    def from_dict(cls, values):
        return cls(**values)

    def to_dict(self):
        return dict(vars(self))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.width)
        self.gain = nn.Parameter(torch.ones(config.width))
        self.register_buffer("steps", torch.arange(config.width).float() / config.width, persistent=False)

    def forward(self, x):
        return x + self.up(self.norm(x)) * self.gain + self.steps

class Guest(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""


def by_hand(config: dict[str, Any] | None = None, code: str = CODE) -> Any:
    """The model that the code makes, with random weights."""
    names: dict[str, Any] = {"__name__": "guest"}
    exec(code, names)
    torch.manual_seed(0)
    model = names["Guest"](names["GuestConfig"](**(config or {})))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model.eval()


def write(place: Path, code: str = CODE, **config: Any) -> Any:
    place.mkdir(exist_ok=True)
    model = by_hand(config, code)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}
    if not config.get("tie", True):
        tensors["head.weight"] = model.head.weight.detach().clone()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps({"model_type": "guest", "auto_map": AUTO_MAP, **config}))
    (place / "guest.py").write_text(code)
    return model


def trusted(place: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **options)


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("tie", [True, False])
def test_a_guest_loads(tmp_path: Path, tie: bool) -> None:
    made = write(tmp_path, tie=tie)
    model = trusted(tmp_path)
    assert type(model).__name__ == "Guest"
    assert not model.training
    assert torch.equal(model(IDS), made(IDS))
    assert (model.head.weight is model.embed.weight) == tie
    assert model.load_report.fits
    assert model.load_report.bytes_mapped > 0
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert (type(config), config.name_or_path) == (type(model.config), str(tmp_path))
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype="bfloat16")
    assert type(fresh) is type(model)
    assert fresh.training
    assert fresh.embed.weight.dtype == torch.bfloat16
    for call in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, config=config),
        lambda: AutoModelForCausalLM.from_config(config),
    ):
        with pytest.raises(RemoteCodeRefused):
            call()


def test_options_of_loading(tmp_path: Path) -> None:
    made = write(tmp_path)
    model, info = trusted(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.blocks[0].steps.dtype == torch.float32  # the code asks for it
    assert info["missing_keys"] == set()
    assert [str(place) for place in trusted(tmp_path, device_map={"": "cpu"}).hf_device_map.values()] == ["cpu"]
    split = trusted(tmp_path, device_map={"embed": "cpu", "head": "cpu", "blocks": "cpu"})
    assert torch.equal(split(IDS), made(IDS))
    two = trusted(tmp_path, layers=2, ignore_mismatched_sizes=True)
    assert len(two.blocks) == 2
    given = {name: tensor * 0 for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert not trusted(tmp_path, state_dict=given)(IDS).any()
    assert torch.equal(trusted(tmp_path, config=model.config, dtype="float32")(IDS), made(IDS))
    assert all(parameter.is_meta for parameter in trusted(tmp_path, device_map="meta").parameters())


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    write(tmp_path)
    for options, kind, words in (
        ({"width": 16}, ShapeMismatchError, "shape"),
        ({"widht": 16}, ArgumentError, "did you mean 'width'"),
        ({"kernels": "torch"}, ArgumentError, "kernels="),
        ({"device_map": {"embed": "cpu"}}, DeviceMapError, ""),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, QuantizationError, "not loadstone's class"),
        ({"layers": 4}, InitializationError, r"blocks\.3"),
    ):
        with pytest.raises(kind, match=words):
            trusted(tmp_path, **options)
    with pytest.raises(ArgumentError, match="kernels"):
        AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(tmp_path, trust_remote_code=True), trust_remote_code=True, kernels="torch"
        )


def test_names_that_do_not_match_are_an_error(tmp_path: Path) -> None:
    """Not a model with some layers at random: whoever wrote the class may rename weights when loading."""
    made = write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.replace(".up.", ".upward."): tensor for name, tensor in tensors.items()}
    save_file(old, tmp_path / "model.safetensors")
    for options in ({}, {"strict": False}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(MissingWeightsError, match=r"blocks\.0\.up\.weight.*upward.*key_mapping"):
            trusted(tmp_path, **options)
    model = trusted(tmp_path, key_mapping={r"\.upward\.": ".up."})
    assert torch.equal(model(IDS), made(IDS))


def test_missing_weights_are_initialised_by_the_class_or_not_at_all(tmp_path: Path) -> None:
    fills = "\n    def _init_weights(self, module):\n        for p in module.parameters(recurse=False):\n"
    write(tmp_path, CODE + fills + "            p.data.fill_(0.5)\n")
    model = trusted(tmp_path, layers=4)
    assert (model.blocks[3].up.weight == 0.5).all()
    assert not (model.blocks[2].up.weight == 0.5).all()
    assert model.load_report.missing


def test_buffers_are_real_or_an_error(tmp_path: Path) -> None:
    allocated = CODE.replace("torch.arange(config.width).float() / config.width", "torch.empty(config.width).zero_()")
    write(tmp_path, allocated)
    with pytest.raises(InitializationError, match=r"steps.*reset_buffers"):
        trusted(tmp_path)
    persistent = CODE.replace(", persistent=False", "")
    write(tmp_path, persistent)
    tensors = {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if "steps" not in name}
    save_file(tensors, tmp_path / "model.safetensors")
    model = trusted(tmp_path)  # not in the file: what the class computes
    assert torch.equal(model.blocks[1].steps, torch.arange(8) / 8)
    assert torch.equal(model(IDS), by_hand()(IDS))


def test_classes_that_cannot_be_built(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "guest.py").write_text(CODE.replace("self.config = config", "raise OSError('no')"))
    with pytest.raises(RemoteCodeError, match=r"Guest\(config\) failed: OSError: no"):
        trusted(tmp_path)
    (tmp_path / "guest.py").write_text(CODE.replace("def from_dict", "def make"))
    with pytest.raises(RemoteCodeError, match="no from_dict"):
        trusted(tmp_path)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    assert main(["inspect", str(tmp_path), "--trust-remote-code", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    made = by_hand()
    assert facts["parameters"] == sum(parameter.numel() for parameter in made.parameters())
    assert facts["plan"]["missing"] == facts["plan"]["unexpected"] == []
    assert facts["model_class"] == "Guest"
    places = ("--device-map", "sequential", "--max-memory", "0=1KB", "cpu=1GB")
    assert main(["inspect", str(tmp_path), "--trust-remote-code", *places]) == 0
    assert "Guest (guest, of the code of" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--trust-remote-code", "--quantize", "nf4"]) == 2
    assert "not loadstone's class" in capsys.readouterr().err
    tokenizer = Path(remote_code.__file__).parents[1] / "models" / "demo" / "tokenizer_config.json"
    (tmp_path / tokenizer.name).write_bytes(tokenizer.read_bytes())
    quantize = ("quantize", str(tmp_path), str(tmp_path / "q"), "--nf4")
    for command in (("generate", str(tmp_path), "--prompt", "a"), quantize):
        assert main([*command, "--trust-remote-code"]) == 2
        assert "does not derive from loadstone.CausalLM" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_threads_keep_their_own_defaults(tmp_path: Path) -> None:
    """Building takes no global state: the default dtype and device are what they were."""
    write(tmp_path, CODE.replace("self.config = config", "assert torch.get_default_dtype() == torch.float32"))
    trusted(tmp_path, dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32
    assert remote_code.loaded()
