"""Adding architectures: by function, by decorator, through the Auto classes, by entry point."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from loadstone import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    list_architectures,
    register,
    register_causal_lm,
)
from loadstone.errors import RegistrationError, UnsupportedModelError
from loadstone.registry import table


@pytest.fixture(autouse=True)
def clean_table() -> Iterator[None]:
    """The table as it was before, whatever a test registers."""
    rows, read = dict(table._table), table._plugins_read
    yield
    table._table.clear()
    table._table.update(rows)
    table._plugins_read = read


def classes(model_type: str) -> tuple[type[LlamaConfig], type[LlamaForCausalLM]]:
    """A Llama relative under a name of its own."""
    config = type("RelativeConfig", (LlamaConfig,), {"model_type": model_type, "__annotations__": {}})
    model = type("RelativeForCausalLM", (LlamaForCausalLM,), {"config_class": config})
    return config, model


def checkpoint(directory: Path, model_type: str) -> Path:
    tiny.checkpoint(directory, "llama")
    (directory / "config.json").write_text(json.dumps(tiny.values("llama", model_type=model_type)))
    return directory


def works(directory: Path, model_type: str, config: type, model: type) -> None:
    """Every door leads to the registered classes."""
    checkpoint(directory, model_type)
    assert type(AutoConfig.from_pretrained(directory)) is config
    assert type(AutoConfig.for_model(model_type)) is config
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert type(loaded) is model
    assert loaded.load_report.fits
    assert type(AutoModelForCausalLM.from_config(loaded.config)) is model
    loaded.save_pretrained(directory / "again")
    stored = json.loads((directory / "again" / "config.json").read_text())
    assert stored["model_type"] == model_type
    assert stored["architectures"] == [model.__name__]
    assert type(AutoModelForCausalLM.from_pretrained(directory / "again")) is model


def test_register(tmp_path: Path) -> None:
    config, model = classes("relative")
    register("relative", config, model)
    works(tmp_path, "relative", config, model)
    assert [row.model_type for row in list_architectures("rel*")] == ["relative"]


def test_decorator(tmp_path: Path) -> None:
    config, model = classes("relative")
    assert register_causal_lm("relative")(model) is model
    works(tmp_path, "relative", config, model)


def test_through_the_auto_classes(tmp_path: Path) -> None:
    config, model = classes("relative")
    AutoConfig.register("relative", config)
    assert type(AutoConfig.for_model("relative")) is config
    with pytest.raises(UnsupportedModelError, match=r"AutoModelForCausalLM\.register"):
        AutoModelForCausalLM.from_config(config.from_dict(tiny.values("llama")))
    AutoModelForCausalLM.register(config, model)
    works(tmp_path, "relative", config, model)


def test_the_model_alone_brings_its_configuration(tmp_path: Path) -> None:
    config, model = classes("relative")
    AutoModelForCausalLM.register(config, model)
    works(tmp_path, "relative", config, model)


def test_taken_names() -> None:
    config, model = classes("relative")
    register("relative", config, model)
    other_config, other_model = classes("relative")
    for again in (
        lambda: register("relative", config, model),
        lambda: register("relative", other_config, other_model),
        lambda: AutoConfig.register("relative", other_config),
        lambda: AutoModelForCausalLM.register(config, model),
        lambda: AutoModelForCausalLM.register(other_config, other_model),
        lambda: register_causal_lm("relative")(other_model),
    ):
        with pytest.raises(RegistrationError, match="exist_ok=True"):
            again()
        assert table.lookup("relative").model_class() is model
    register("relative", other_config, other_model, exist_ok=True)
    assert table.lookup("relative").model_class() is other_model
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    assert table.lookup("relative").config_class() is config
    register_causal_lm("relative", exist_ok=True)(other_model)
    assert table.lookup("relative").config_class() is other_config


def test_built_in_names_are_taken_too() -> None:
    config, model = classes("llama")
    with pytest.raises(RegistrationError, match="by loadstone"):
        register("llama", config, model)
    assert table.lookup("llama").model_class() is LlamaForCausalLM
    register("llama", config, model, exist_ok=True)
    assert table.lookup("llama").model_class() is model
    table.unregister("llama")
    assert table.lookup("llama").model_class() is LlamaForCausalLM


def test_classes_that_do_not_fit() -> None:
    config, model = classes("relative")
    other, _ = classes("relative")
    for call, words in (
        (lambda: register("cousin", config, model), "'relative'.*'cousin'"),
        (lambda: register("relative", other, model), "config_class"),
        (lambda: register("relative", dict, model), "PreTrainedConfig"),  # type: ignore[arg-type]
        (lambda: register("relative", config, torch.nn.Linear), "CausalLM"),  # type: ignore[arg-type]
        (lambda: register("", config, model), "non-empty"),
        (lambda: register(3, config, model), "string"),  # type: ignore[arg-type]
        (lambda: AutoModelForCausalLM.register(other, model), "config_class"),
        (lambda: AutoModelForCausalLM.register("relative", model), "classes"),  # type: ignore[arg-type]
        (lambda: AutoConfig.register("cousin", config), "'cousin'"),
    ):
        with pytest.raises(RegistrationError, match=words):
            call()
        assert not list_architectures("relative")
        assert not list_architectures("cousin")


def test_a_subclass_without_registration_uses_its_parents_model() -> None:
    class Mine(LlamaConfig):
        pass

    assert type(AutoModelForCausalLM.from_config(Mine.from_dict(tiny.values("llama")))) is LlamaForCausalLM

    class Nobodys(PreTrainedConfig):
        model_type = "nobodys"

    orphan, _ = classes("orphan")  # a type of its own, although a Llama by descent: what it saved could not be loaded
    for config in (Nobodys(), orphan.from_dict(tiny.values("llama", model_type="orphan"))):
        with pytest.raises(UnsupportedModelError, match=config.model_type):
            AutoModelForCausalLM.from_config(config)


def test_unknown_types_name_the_nearest() -> None:
    with pytest.raises(UnsupportedModelError, match=r"did you mean 'mistral'\?.*registered: .*loadstone\.register"):
        AutoConfig.for_model("mistrall")
    assert [row.model_type for row in list_architectures()] == sorted(row.model_type for row in list_architectures())
    assert {"gpt2", "llama", "mistral"} <= {row.model_type for row in list_architectures()}


def test_many_threads(tmp_path: Path) -> None:
    """Registering and looking up at once: one of two rivals wins, and no reader sees a half-made row."""
    checkpoint(tmp_path, "llama")
    failures: list[BaseException] = []
    won: list[str] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            start.wait()
            for index in range(15):
                config, model = classes(f"type{index}")
                try:
                    register(f"type{index}", config, model)
                    won.append(f"type{index}")
                except RegistrationError:
                    pass
                row = table.lookup(f"type{index}")
                assert row.model_class().config_class is row.config_class()
                assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaConfig
                list_architectures("type*")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(won) == sorted(f"type{index}" for index in range(15))


# Entry points


PLUGIN = """
from loadstone import LlamaConfig, LlamaForCausalLM

class PluginConfig(LlamaConfig):
    model_type = "{model_type}"

class PluginForCausalLM(LlamaForCausalLM):
    config_class = PluginConfig

NOT_A_MODEL = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Installs a fake distribution with entry points; returns the function that does it."""
    site = tmp_path / "site"
    modules: list[str] = []

    def install(module: str, points: dict[str, str], source: str = PLUGIN, model_type: str = "plugged") -> None:
        site.mkdir(exist_ok=True)
        (site / f"{module}.py").write_text(source.replace("{model_type}", model_type))
        info = site / f"{module}_dist-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-dist\nVersion: 1.0\n")
        lines = "".join(f"{name} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[loadstone.architectures]\n{lines}")
        modules.append(module)

    monkeypatch.syspath_prepend(str(site))
    table._plugins_read = False
    yield install
    for module in modules:
        sys.modules.pop(module, None)


def test_entry_points_are_read_when_a_type_is_unknown(plugin: Any, tmp_path: Path) -> None:
    plugin("plug_a", {"plugged": "plug_a:PluginForCausalLM"})
    checkpoint(tmp_path / "llama", "llama")
    AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert table._plugins_read is False  # a known type asks nobody
    rows = list_architectures("plug*")
    assert [(row.model_type, row.origin) for row in rows] == [("plugged", "plug_a-dist")]
    assert "plug_a" not in sys.modules  # listed, not imported
    config = AutoConfig.from_pretrained(checkpoint(tmp_path / "c", "plugged"))
    module = sys.modules["plug_a"]
    works(tmp_path / "d", "plugged", module.PluginConfig, module.PluginForCausalLM)
    assert type(config) is module.PluginConfig


def test_a_plugins_configuration_finds_the_plugins_model(plugin: Any) -> None:
    """Although its class derives from Llama's, and nobody has asked for the type by name yet."""
    plugin("plug_b", {"plugged": "plug_b:PluginForCausalLM"})
    import plug_b  # type: ignore[import-not-found]

    model = AutoModelForCausalLM.from_config(plug_b.PluginConfig.from_dict(tiny.values("llama")))
    assert type(model) is plug_b.PluginForCausalLM


def test_registered_and_built_in_types_win_over_entry_points(plugin: Any) -> None:
    plugin("plug_c", {"llama": "plug_c:PluginForCausalLM", "mine": "plug_c:PluginForCausalLM"})
    config, model = classes("mine")
    register("mine", config, model)
    list_architectures()
    assert table.lookup("llama").model_class() is LlamaForCausalLM
    assert table.lookup("mine").model_class() is model
    assert "plug_c" not in sys.modules


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("plug_d:Missing", "plug_d-dist.*Missing"),
        ("no_such_module:Model", "no_such_module"),
        ("plug_d:NOT_A_MODEL", "PreTrainedConfig"),
        ("plug_d:PluginForCausalLM", "'other'"),  # its model_type is another
    ],
)
def test_broken_plugins_fail_when_used(plugin: Any, target: str, words: str) -> None:
    plugin("plug_d", {"plugged": target}, model_type="other")
    assert AutoConfig.for_model("llama").model_type == "llama"
    assert [row.model_type for row in list_architectures("plugged")] == ["plugged"]
    with pytest.raises(RegistrationError, match=words):
        AutoConfig.for_model("plugged")
