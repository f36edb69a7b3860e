"""Saving carries the code of classes that are not loadstone's, where they are registered for an auto class."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import remote_code
import tiny
import torch
from remote_code import AUTO_MAP, CODE

import loadstone
from loadstone import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from loadstone.cli import main
from loadstone.errors import ArgumentError, PathError, RemoteCodeRefused


def trusted(place: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **options)


def auto_map_of(place: Path) -> Any:
    return json.loads((place / "config.json").read_text()).get("auto_map")


def python_files(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*.py")}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return remote_code.write(tmp_path / "own-code")


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Any]:
    """A package of the user's with a model in it; a function that imports one of its modules."""
    root = tmp_path / "site" / "mine"
    for name, text in CODE.items():
        (root / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "models" / name).write_text(text)
    for folder in (root, root / "models"):
        (folder / "__init__.py").write_text("")
    sys.path.insert(0, str(tmp_path / "site"))
    yield lambda name: importlib.import_module(f"mine.{name}")
    sys.path.remove(str(tmp_path / "site"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def test_code_from_a_checkpoint_goes_along(place: Path, tmp_path: Path) -> None:
    model = trusted(place)
    shutil.rmtree(place)  # it is held, not read again
    for _ in range(2):  # into a new directory, and over a checkpoint
        model.save_pretrained(tmp_path / "copy")
        assert python_files(tmp_path / "copy") == set(CODE)
        assert auto_map_of(tmp_path / "copy") == AUTO_MAP
        again = trusted(tmp_path / "copy")
        assert torch.equal(remote_code.logits(again), remote_code.logits(model))
    assert model.config.auto_map == AUTO_MAP


def test_saving_over_older_code(place: Path, tmp_path: Path) -> None:
    """One step, as for the weights: files of the new code replace the old, others stay."""
    trusted(place).save_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "parts" / "mine.txt").write_text("kept")
    (place / "parts" / "more.py").write_text("FACTOR = 50\n")
    trusted(place).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "parts" / "mine.txt").read_text() == "kept"
    assert trusted(tmp_path / "copy").scale == 100.0
    assert not [name for name in os.listdir(tmp_path) if "saving" in name]


def test_saving_file_by_file(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trusted(place)
    (tmp_path / "copy" / "parts").mkdir(parents=True)
    (tmp_path / "copy" / "parts" / "more.py").write_text("FACTOR = 50\n")
    monkeypatch.chdir(tmp_path / "copy")  # which cannot be exchanged then
    model.save_pretrained(".")
    assert trusted(tmp_path / "copy").scale == 6.0


def test_users_class_goes_along(package: Any, tmp_path: Path) -> None:
    modeling = package("models.modeling_tiny")
    modeling.TinyForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    modeling.TinyConfig.register_for_auto_class()
    model = modeling.TinyForCausalLM(modeling.TinyConfig(**tiny.values("llama"))).eval()
    model.save_pretrained(tmp_path / "saved")
    assert auto_map_of(tmp_path / "saved") == AUTO_MAP
    assert python_files(tmp_path / "saved") == set(CODE)
    again = trusted(tmp_path / "saved")
    assert type(again) is not type(model)
    assert torch.equal(remote_code.logits(again), remote_code.logits(model))
    model.config.save_pretrained(tmp_path / "config")
    assert auto_map_of(tmp_path / "config") == {"AutoConfig": AUTO_MAP["AutoConfig"]}
    assert python_files(tmp_path / "config") == {"configuration_tiny.py"}
    assert type(AutoConfig.from_pretrained(tmp_path / "config", trust_remote_code=True)).__name__ == "TinyConfig"
    assert getattr(model.config, "auto_map", None) is None


def test_code_in_several_folders_of_a_package(package: Any, tmp_path: Path) -> None:
    """Folders are kept from the one that all files share."""
    root = tmp_path / "site" / "mine"
    (root / "shared").mkdir()
    (root / "shared" / "base.py").write_text("BASE = 5.0\n")
    (root / "models" / "constants.py").write_text("from ..shared.base import BASE\n")
    modeling = package("models.modeling_tiny")
    modeling.TinyForCausalLM.register_for_auto_class(AutoModelForCausalLM)
    modeling.TinyForCausalLM(modeling.TinyConfig(**tiny.values("llama"))).save_pretrained(tmp_path / "saved")
    assert auto_map_of(tmp_path / "saved") == {"AutoModelForCausalLM": "models/modeling_tiny.TinyForCausalLM"}
    assert "shared/base.py" in python_files(tmp_path / "saved")
    assert trusted(tmp_path / "saved").scale == 15.0


def test_files_of_one_name_with_different_contents(place: Path, tmp_path: Path) -> None:
    """A model of one repository with a configuration of another: none of the files is lost."""
    other = remote_code.write(tmp_path / "other")
    (other / "constants.py").write_text("BASE = 9.0\n")
    (other / "configuration_tiny.py").write_text(
        "from .constants import BASE\n" + CODE["configuration_tiny.py"].replace('"plain"', 'f"of {BASE}"'))  # fmt: skip
    config = AutoConfig.from_pretrained(other, trust_remote_code=True)
    model = type(trusted(place)).from_config(config)
    model.save_pretrained(tmp_path / "saved")
    assert trusted(tmp_path / "saved").scale == 6.0
    assert AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True).flavour == "of 9.0"


def test_classes_that_are_not_registered_carry_nothing(package: Any, place: Path, tmp_path: Path) -> None:
    modeling = package("models.modeling_tiny")
    modeling.TinyForCausalLM(modeling.TinyConfig(**tiny.values("llama"))).save_pretrained(tmp_path / "a")
    assert (python_files(tmp_path / "a"), auto_map_of(tmp_path / "a")) == (set(), None)
    # Read without trust by a class of ours: the references would lead nowhere.
    remote_code.write(place, model_type="llama")
    AutoModelForCausalLM.from_pretrained(place).save_pretrained(tmp_path / "b")
    assert (python_files(tmp_path / "b"), auto_map_of(tmp_path / "b")) == (set(), None)
    AutoConfig.from_pretrained(place).save_pretrained(tmp_path / "c")
    assert auto_map_of(tmp_path / "c") is None


def test_registering_for_another_auto_class() -> None:
    class Mine(LlamaForCausalLM):
        config_class = LlamaConfig

    for auto_class in ("AutoModel", "AutoModelForCausalML", AutoConfig, 3):
        with pytest.raises(ArgumentError, match="can be registered for AutoModelForCausalLM"):
            Mine.register_for_auto_class(auto_class)
    for ours, auto_class in ((LlamaForCausalLM, AutoModelForCausalLM), (LlamaConfig, "AutoConfig")):
        with pytest.raises(ArgumentError, match="loadstone's own"):
            ours.register_for_auto_class(auto_class)
    with pytest.raises(ArgumentError, match="can be registered for AutoConfig"):
        LlamaConfig.register_for_auto_class("AutoModelForCausalLM")
    assert Mine._auto_class is None
    assert LlamaConfig._auto_class is None


@pytest.mark.parametrize("module", ["__main__", "no_such_module"])
def test_a_class_without_a_file_is_saved_with_a_warning(
    module: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the end of a training nothing may be lost for want of a file."""
    kind: Any = type("Mine", (LlamaForCausalLM,), {"config_class": LlamaConfig, "__module__": module})
    kind.register_for_auto_class()
    kind(LlamaConfig(**tiny.values("llama"))).save_pretrained(tmp_path)
    assert f"Mine is not saved: it is defined in {module}" in caplog.text
    assert ("cannot be saved along with it" in caplog.text) == (module == "__main__")
    assert auto_map_of(tmp_path) is None
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM


def test_code_that_cannot_be_read_is_not_saved(package: Any, tmp_path: Path, caplog: Any) -> None:
    modeling = package("models.modeling_tiny")
    modeling.TinyForCausalLM.register_for_auto_class()
    model = modeling.TinyForCausalLM(modeling.TinyConfig(**tiny.values("llama")))
    (tmp_path / "site" / "mine" / "models" / "constants.py").write_bytes(b"#" * (9 << 20))
    model.save_pretrained(tmp_path / "saved")
    assert "constants.py" in caplog.text
    assert "is not saved" in caplog.text
    assert (tmp_path / "saved" / "model.safetensors").exists()
    assert not python_files(tmp_path / "saved")


def test_an_adapter_on_a_base_with_code_of_its_own(place: Path, tmp_path: Path) -> None:
    model = trusted(place)
    model.add_adapter(loadstone.LoraConfig(r=2, target_modules=["q_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    wanted = remote_code.logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not python_files(tmp_path / "adapter")
    for trust in (None, False):
        with pytest.raises(RemoteCodeRefused, match="own-code"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=trust)
    again = trusted(tmp_path / "adapter")
    assert type(again) is type(model)
    assert torch.equal(remote_code.logits(again), wanted)


def test_code_cannot_take_the_place_of_weights(tmp_path: Path) -> None:
    from loadstone.loading.save import save_checkpoint

    for name in ("model.safetensors", "../x.py", "/x.py", "a//b.py"):
        with pytest.raises(PathError):
            save_checkpoint(tmp_path / "x", {}, texts={name: b""})
    assert not (tmp_path / "x").exists()


# The command


def test_commands_run_code_only_when_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    remote_code.write(place, vocab_size=258)
    shutil.copy(Path(tiny.__file__).parents[1] / "models" / "demo" / "tokenizer_config.json", place)
    generate = ("generate", str(place), "--prompt", "", "--max-new-tokens", "2", "--json")
    quantize = ("quantize", str(place), str(tmp_path / "nf4"), "--nf4", "--json")
    for command in (("inspect", str(place), "--json"), generate, quantize):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert "trust_remote_code" in err
        status, out, err = run(*command, "--trust-remote-code")
        assert status == 0, err
        assert json.loads(out)
    status, out, _ = run("inspect", str(place), "--trust-remote-code")
    assert "TinyForCausalLM (tiny-remote, of the code of" in out
    assert python_files(tmp_path / "nf4") == set(CODE)
    assert trusted(tmp_path / "nf4").is_loaded_in_4bit
    assert run("inspect", str(tmp_path / "nf4"), "--trust-remote-code")[0] == 0
