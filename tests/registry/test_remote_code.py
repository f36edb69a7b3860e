"""A checkpoint's own code: refused by default, run when trusted, under a name of its own, and gone if it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import remote_code
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from remote_code import AUTO_MAP, CODE, MODELING

import loadstone
from loadstone import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from loadstone.errors import (
    ArgumentError,
    LoadstoneError,
    NotFoundError,
    PathError,
    RemoteCodeError,
    RemoteCodeRefused,
    UnsupportedModelError,
)
from loadstone.registry import table
from loadstone.registry.auto_map import parse_reference
from loadstone.registry.remote_package import PREFIX

DOORS = (AutoConfig, AutoModelForCausalLM)


@pytest.fixture(autouse=True)
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return remote_code.write(tmp_path / "own-code")


def trusted(place: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **options)


# Refused


@pytest.mark.parametrize("trust", [None, False])
def test_refused_by_default(place: Path, trust: bool | None) -> None:
    before = remote_code.loaded()
    for door, reference in zip(DOORS, AUTO_MAP.values(), strict=True):
        with pytest.raises(RemoteCodeRefused) as caught:
            door.from_pretrained(place, trust_remote_code=trust)
        file, _, name = reference.rpartition(".")
        for words in (str(place / f"{file}.py"), name, "tiny-remote", "trust_remote_code=True", "read it"):
            assert words in str(caught.value)
        assert isinstance(caught.value, ValueError)
    assert remote_code.loaded() == before


@pytest.mark.parametrize("trust", ["yes", "True", "", 1, 0, 1.0, [True], {"trust": True}])
def test_only_true_is_trust(place: Path, trust: Any) -> None:
    before = remote_code.loaded()
    config = LlamaConfig.from_dict(tiny.values("llama"))
    for call in (
        lambda: AutoConfig.from_pretrained(place, trust_remote_code=trust),
        lambda: trusted_as(place, trust),
        lambda: LlamaForCausalLM.from_pretrained(place, trust_remote_code=trust),
        lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=trust),
        lambda: LlamaForCausalLM.from_config(config, trust_remote_code=trust),
    ):
        with pytest.raises(ArgumentError, match="only True"):
            call()
    assert remote_code.loaded() == before


def trusted_as(place: Path, trust: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, trust_remote_code=trust)


def test_a_file_cannot_trust_itself(place: Path) -> None:
    values = {**json.loads((place / "config.json").read_text()), "trust_remote_code": True, "_trust_remote_code": True}
    values["text_config"] = {"trust_remote_code": True, "auto_map": AUTO_MAP}
    (place / "config.json").write_text(json.dumps(values))
    (place / "generation_config.json").write_text(json.dumps({"trust_remote_code": True}))
    for door in DOORS:
        with pytest.raises(RemoteCodeRefused):
            door.from_pretrained(place)


def test_trust_is_not_inherited_by_what_trusted_code_loads(place: Path, tmp_path: Path) -> None:
    inner = remote_code.write(tmp_path / "inner", seed=1)
    nested = f"import loadstone\nloadstone.AutoModelForCausalLM.from_pretrained({str(inner)!r})\n"
    (place / "modeling_tiny.py").write_text(nested + MODELING)
    with pytest.raises(RemoteCodeError, match=r"modeling_tiny\.py:2.*RemoteCodeRefused") as caught:
        trusted(place)
    assert isinstance(caught.value.__cause__, RemoteCodeRefused)


AUDIT = """
import sys
place = {place!r}
seen = []
def hook(event, args):
    if event in ("open", "import", "exec", "compile") and place in str(args[:2]):
        if not (event == "open" and str(args[0]).endswith(("config.json", "model.safetensors"))):
            seen.append((event, str(args[:2])))
    if event == "exec" and place in str(getattr(args[0], "co_filename", "")):
        seen.append((event, args[0].co_filename))
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        seen.append((event, str(args)))
import loadstone
from loadstone.errors import ArgumentError, RemoteCodeRefused, RemoteCodeError
sys.addaudithook(hook)
for trust in (None, False, "yes", 1):
    for door in (loadstone.AutoConfig, loadstone.AutoModelForCausalLM):
        try:
            door.from_pretrained(place, trust_remote_code=trust)
        except (RemoteCodeRefused, ArgumentError):
            continue
        raise SystemExit("not refused")
print("untrusted", seen)
try:
    loadstone.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
except RemoteCodeError:
    print("trusted", bool(seen))
"""


@pytest.mark.parametrize("reference", [AUTO_MAP["AutoModelForCausalLM"], "org/other--modeling_tiny.TinyForCausalLM"])
def test_nothing_is_opened_run_or_requested_without_trust(place: Path, tmp_path: Path, reference: str) -> None:
    """By an audit hook, which also shows that it would have seen it."""
    auto_map = {"AutoConfig": reference, "AutoModelForCausalLM": reference}
    values = {**json.loads((place / "config.json").read_text()), "auto_map": auto_map}
    (place / "config.json").write_text(json.dumps(values))
    marker = tmp_path / "ran"
    for file in place.rglob("*.py"):
        file.write_text(f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('ran')\n")
    code = AUDIT.format(place=str(place))
    own = "--" not in reference
    if not own:
        code = code.split("try:\n    loadstone.AutoModel")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "untrusted []\n" + ("trusted True\n" if own else ""), done.stderr
    assert marker.exists() is own


# Run


def test_own_classes_load(place: Path) -> None:
    model = trusted(place)
    config = AutoConfig.from_pretrained(place, trust_remote_code=True)
    plain = tiny.model("llama", 0, attn_implementation="sdpa")
    assert (type(config), config.flavour, config.model_type) == (type(model.config), "plain", "tiny-remote")
    assert type(model).__name__ == "TinyForCausalLM"
    assert type(model).__module__.startswith(PREFIX)
    assert torch.equal(remote_code.logits(model), remote_code.logits(plain) * 6.0)
    assert model.load_report.fits
    assert not model.training
    assert type(trusted(place)) is type(model)
    assert type(trusted(place, config=config)) is type(model)


ALONE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "huggingface_hub", "accelerate", "tests", "kernels"):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Block())
import loadstone
for place in {places!r}:
    try:
        model = loadstone.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        print(type(model).__name__)
    except loadstone.errors.RemoteCodeError as error:
        print(error)
"""


def test_it_takes_no_other_library_unless_the_code_does(place: Path, tmp_path: Path) -> None:
    """transformers is not imported; code that needs it is told so."""
    needy = remote_code.write(tmp_path / "needy")
    (needy / "modeling_tiny.py").write_text("import os\nfrom transformers import PreTrainedModel\n")
    code = ALONE.format(places=[str(place), str(needy)])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    first, second = done.stdout.splitlines()
    assert first == "TinyForCausalLM", done.stderr
    assert "modeling_tiny.py:2" in second
    assert "needs the package 'transformers': install it" in second


def test_options_of_loading_work_for_own_classes(place: Path) -> None:
    model = trusted(place, dtype="bfloat16", device_map={"": "cpu"}, flavour="sour")
    assert model.dtype == torch.bfloat16
    assert model.config.flavour == "sour"
    four = trusted(place, quantization_config=loadstone.BitsAndBytesConfig(load_in_4bit=True))
    assert four.is_loaded_in_4bit
    with pytest.raises(ArgumentError, match="did you mean 'flavour'"):
        trusted(place, flavor="sour")


def test_names_in_the_interpreter_stay_free(place: Path) -> None:
    before = set(sys.modules)
    trusted(place)
    new = {name for name in set(sys.modules) - before if not name.startswith(("loadstone", "_loadstone", "torch"))}
    assert not {name for name in new if name.partition(".")[0] in ("modeling_tiny", "configuration_tiny", "constants")}


def test_two_places_and_two_versions_do_not_share_modules(place: Path, tmp_path: Path) -> None:
    first = trusted(place)
    twin = trusted(remote_code.write(tmp_path / "twin"))
    (place / "constants.py").write_text("BASE = 5.0\n")
    edited = trusted(place)
    kinds = {type(model) for model in (first, twin, edited)}
    assert len(kinds) == len({kind.__module__ for kind in kinds}) == 3
    assert [model.scale for model in (first, twin, edited)] == [6.0, 6.0, 15.0]


def test_later_changes_do_not_mix_with_what_was_read(place: Path) -> None:
    late = "def late():\n    from .late import VALUE\n    return VALUE\n"
    (place / "modeling_tiny.py").write_text(MODELING + late)
    (place / "late.py").write_text("VALUE = 'as it was'\n")
    model = trusted(place)
    (place / "late.py").write_text("VALUE = 'changed'\n")
    assert sys.modules[type(model).__module__].late() == "as it was"


def test_native_class_without_trust_own_class_with_it(place: Path) -> None:
    code = {**CODE, "configuration_tiny.py": CODE["configuration_tiny.py"].replace('"tiny-remote"', '"llama"')}
    remote_code.write(place, code=code, model_type="llama")
    for trust in (None, False):
        assert type(trusted_as(place, trust)) is LlamaForCausalLM
        assert type(AutoConfig.from_pretrained(place, trust_remote_code=trust)) is LlamaConfig
    assert type(trusted(place)).__name__ == "TinyForCausalLM"
    assert type(AutoConfig.from_pretrained(place, trust_remote_code=True)).__name__ == "TinyConfig"
    assert type(trusted_as(place, None)) is LlamaForCausalLM


def test_a_class_that_the_user_registered_wins(place: Path) -> None:
    class MyConfig(LlamaConfig):
        model_type = "tiny-remote"

    class Mine(LlamaForCausalLM):
        config_class = MyConfig

    loadstone.register("tiny-remote", MyConfig, Mine)
    try:
        for trust in (None, False, True):
            assert type(trusted_as(place, trust)) is Mine
    finally:
        table.unregister("tiny-remote")


def test_code_registers_nothing_for_others(place: Path) -> None:
    more = (
        "import loadstone\n"
        "loadstone.AutoConfig.register('tiny-remote', TinyConfig)\n"
        "loadstone.AutoModelForCausalLM.register(TinyConfig, TinyForCausalLM)\n"
        "loadstone.register_causal_lm('tiny-remote')(TinyForCausalLM)\n"
    )
    (place / "modeling_tiny.py").write_text(MODELING + more)
    before = [row.model_type for row in loadstone.list_architectures()]
    trusted(place)
    assert [row.model_type for row in loadstone.list_architectures()] == before
    with pytest.raises(RemoteCodeRefused):
        trusted_as(place, None)
    loadstone.register("after", type("After", (LlamaConfig,), {"model_type": "after"}))  # the table is open again
    table.unregister("after")


def test_configuration_alone_and_model_alone(place: Path) -> None:
    remote_code.write(place, auto_map={"AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"]})
    assert trusted(place).config.flavour == "plain"
    with pytest.raises(UnsupportedModelError, match="serves 'AutoModelForCausalLM', not AutoConfig"):
        AutoConfig.from_pretrained(place, trust_remote_code=True)
    remote_code.write(place, auto_map={"AutoConfig": AUTO_MAP["AutoConfig"]})
    assert AutoConfig.from_pretrained(place, trust_remote_code=True).flavour == "plain"
    with pytest.raises(UnsupportedModelError, match="serves 'AutoConfig', not AutoModelForCausalLM"):
        trusted(place)
    remote_code.write(place, auto_map={"AutoTokenizer": ["a.B", None]})
    with pytest.raises(UnsupportedModelError, match="AutoTokenizer"):
        trusted_as(place, None)


def test_a_configuration_file_and_a_subfolder(place: Path, tmp_path: Path) -> None:
    """Code lies at the top of a repository, as transformers has it, or beside the configuration."""
    assert AutoConfig.from_pretrained(place / "config.json", trust_remote_code=True).flavour == "plain"
    sub = place / "weights"
    sub.mkdir()
    for name in ("config.json", "model.safetensors"):
        (place / name).rename(sub / name)
    assert type(trusted(place, subfolder="weights")).__name__ == "TinyForCausalLM"
    remote_code.write(tmp_path / "outer" / "inner")
    assert trusted(tmp_path / "outer", subfolder="inner").scale == 6.0


def test_from_config(place: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(place, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model) is type(trusted(place))
    assert model.training
    for trust in (None, False):
        with pytest.raises(RemoteCodeRefused, match="modeling_tiny"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        with pytest.raises(RemoteCodeRefused, match="modeling_tiny"):
            trusted_as_config(place, config, trust)
    # A class of ours that names code: that of the place it was read from.
    remote_code.write(place, model_type="llama", code={**CODE, "configuration_tiny.py": CODE[
        "configuration_tiny.py"].replace('"tiny-remote"', '"llama"')})  # fmt: skip
    plain = AutoConfig.from_pretrained(place)
    assert type(AutoModelForCausalLM.from_config(plain)) is LlamaForCausalLM
    assert type(AutoModelForCausalLM.from_config(plain, trust_remote_code=True)).__name__ == "TinyForCausalLM"
    plain.name_or_path = ""
    with pytest.raises(UnsupportedModelError, match="name_or_path"):
        AutoModelForCausalLM.from_config(plain, trust_remote_code=True)
    with pytest.raises(ArgumentError, match="cache_dir"):
        AutoModelForCausalLM.from_config(plain, cache_dir="x")


def trusted_as_config(place: Path, config: Any, trust: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, config=config, trust_remote_code=trust)


# Imports


def layout(place: Path, modeling: str, **more: str) -> Path:
    """The repository with ``modeling`` before the model's class, and more files ("__" is a folder)."""
    code = {**CODE, "modeling_tiny.py": modeling + MODELING}
    return remote_code.write(place, code=code | {name.replace("__", "/") + ".py": text for name, text in more.items()})


def test_imports_of_every_form(place: Path) -> None:
    layout(
        place,
        "from . import a, constants as c\nfrom .b import *\nfrom .pack import THING, sub\nfrom .pack.deep.er import E\n"
        "from .space.one import ONE\nfrom . import space\n"
        "try:\n    from .absent import X\nexcept ImportError:\n    X = 'none'\n"
        "FOUND = (a.A, c.BASE, B, THING, sub.S, E, ONE, X)\n",
        a="A = 1",
        b="from .a import A\nB = A + 1",
    )  # fmt: skip
    for name, text in {
        "pack/__init__.py": "from .sub import S\nTHING = S * 2\n",
        "pack/sub.py": "S = 10",
        "pack/deep/er.py": "from ...a import A\nfrom ..sub import S\nE = A + S",
        "space/one.py": "ONE = 1.0",
        "__init__.py": "raise RuntimeError('the top folder is no module')",
    }.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    model = trusted(place)
    assert sys.modules[type(model).__module__].FOUND == (1, 2.0, 2, 20, 10, 11, 1.0, "none")


def test_a_relative_import_cannot_leave_the_repository(place: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("raise RuntimeError('ran')")
    layout(place, "from ..outside import X\n")
    with pytest.raises(RemoteCodeError, match=r"modeling_tiny\.py:1.*beyond top-level package"):
        trusted(place)


def test_classes_in_a_subfolder(place: Path) -> None:
    code = {f"code/{name}": text for name, text in CODE.items()}
    remote_code.write(place / "x", code=code, auto_map={name: f"code/{ref}" for name, ref in AUTO_MAP.items()})
    model = trusted(place / "x")
    assert model.scale == 6.0
    assert type(model).__module__.endswith(".code.modeling_tiny")


# Hostile references

KEYS = st.sampled_from([*AUTO_MAP, "AutoModel", "AutoTokenizer", "", "x"])
HOSTILE = [
    "../../x.Cls", "../x.Cls", "a;b.C", "/etc/passwd.C", "/x.Cls", "C:\\x.Cls", "a\\b.C", "a\0b.C", "a.\0C", "..Cls",
    ".Cls", "x.", "x", "", ".", "--", "--x.C", "a--b--x.C", "/x--m.C", "../up--m.C", "a/b/c--m.C", "./m.C", "m//n.C",
    "m/.C", "a b.C", "m.C;import os", "m.C()", "m.__class__", "m.class", "m.None", "os.path.join", "m.py.C", "m.C\n",
    "\nm.C", "~/m.C", "$HOME/m.C", "%2e%2e/m.C", "http://h/m.C", "org/na..me--m.C", "org/name.git--m.C",
    "x" * 300 + ".C",
    3, None, ["m.C"], {"m": "C"}, True,
]  # fmt: skip


@pytest.mark.parametrize("reference", HOSTILE, ids=lambda value: ascii(value)[:24])
def test_hostile_references(place: Path, reference: Any) -> None:
    before = remote_code.loaded()
    remote_code.write(place, auto_map={"AutoConfig": reference, "AutoModelForCausalLM": reference})
    for door in DOORS:
        with pytest.raises(RemoteCodeError, match="auto_map names"):
            door.from_pretrained(place, trust_remote_code=True)
        with pytest.raises(RemoteCodeRefused):
            door.from_pretrained(place)
    assert remote_code.loaded() == before


@pytest.mark.parametrize("auto_map", [[], "m.C", 3, ["m.C"]])
def test_auto_map_of_a_wrong_type(place: Path, auto_map: Any) -> None:
    remote_code.write(place, auto_map=auto_map)
    for door in DOORS:
        with pytest.raises(RemoteCodeError, match="must be an object"):
            door.from_pretrained(place, trust_remote_code=True)
        with pytest.raises(UnsupportedModelError):
            door.from_pretrained(place)


@given(st.text(alphabet="aB_1-./\\;: \0~é", max_size=12))
@tiny.examples(300)
def test_no_reference_names_anything_outside(given_text: str) -> None:
    """What is accepted is one file below the repository, and a Hub id."""
    try:
        reference = parse_reference(given_text)
    except RemoteCodeError:
        return
    parts = reference.file.split("/")
    assert all(part and set(part) <= set("aB_1-é.py") and part not in (".", "..") for part in parts)
    assert reference.name.isidentifier()
    assert reference.repository is None or reference.repository.count("/") <= 1
    assert str(reference).replace("/", ".").endswith(given_text.rpartition("--")[2].replace("/", "."))


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["m.C", "a--b.C"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=6)


@given(VALUES | st.dictionaries(KEYS, VALUES, max_size=4), st.sampled_from([None, False, True, 1]))
@tiny.examples(200)
def test_any_auto_map_is_refused_or_an_error(place: Path, auto_map: Any, trust: Any) -> None:
    """No file of the names given is there: whatever the map holds, nothing but a typed error comes of it."""
    before = remote_code.loaded()
    (place / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": auto_map}))
    for door in DOORS:
        with pytest.raises(LoadstoneError):
            door.from_pretrained(place, trust_remote_code=trust, local_files_only=True)
    assert remote_code.loaded() == before


def test_links_out_of_the_repository(place: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.py"
    outside.write_text("raise RuntimeError('ran')")
    for name in ("constants.py", "modeling_tiny.py"):
        kept = (place / name).read_bytes()
        (place / name).unlink()
        (place / name).symlink_to(outside)
        with pytest.raises(PathError, match="symbolic link out of it"):
            trusted(place)
        (place / name).unlink()
        (place / name).write_bytes(kept)
    assert trusted(place).scale == 6.0
    (place / "parts").rename(tmp_path / "parts")
    (place / "parts").symlink_to(tmp_path / "parts", target_is_directory=True)
    with pytest.raises(PathError, match="symbolic link out of it"):
        trusted(place)


def test_files_that_are_no_files(place: Path) -> None:
    for file in ("modeling_tiny.py", "constants.py"):
        kept = (place / file).read_bytes()
        (place / file).unlink()
        os.mkfifo(place / file)
        with pytest.raises(PathError, match="not a regular file"):  # at once: nobody writes into the pipe
            trusted(place)
        (place / file).unlink()
        (place / file).write_bytes(kept)
    assert trusted(place).scale == 6.0


# Broken code


def broken(place: Path, text: str, words: str, file: str = "modeling_tiny.py") -> RemoteCodeError:
    """Loading fails typed, names file and line, chains the cause, and leaves no module; mended, it loads."""
    kept, before = (place / file).read_text(), remote_code.loaded()
    (place / file).write_text(text)
    with pytest.raises(RemoteCodeError, match=words) as caught:
        trusted(place)
    assert remote_code.loaded() == before
    assert str(place) in str(caught.value)
    (place / file).write_text(kept)
    assert trusted(place).scale == 6.0
    return caught.value


def test_code_that_fails(place: Path) -> None:
    error = broken(place, "\n\n1 / 0\n", r"modeling_tiny\.py:3 .*ZeroDivisionError")
    assert isinstance(error.__cause__, ZeroDivisionError)
    error = broken(place, MODELING + "\nraise SystemExit(3)\n", "SystemExit: 3")
    assert isinstance(error.__cause__, SystemExit)
    broken(place, "x = 1\n\ndef f(:\n", r"modeling_tiny\.py:3 .*SyntaxError")
    broken(place, "raise ValueError('deep')", r"constants\.py:1 .*ValueError: deep", file="constants.py")
    broken(place, "BASE = 2.0\nx = ]", r"constants\.py:2 .*SyntaxError", file="constants.py")
    broken(place, "import no_such_package_at_all\n", "needs the package 'no_such_package_at_all'")
    broken(place, "from .nowhere import X\n", r"imports 'nowhere' relatively.*no nowhere\.py")
    broken(place, "x = '\udcff'".encode("utf-8", "surrogateescape").decode("latin-1"), "TinyForCausalLM")
    broken(place, "TinyForCausalLM = 3", "int, not a class")
    broken(place, "pass", "no 'TinyForCausalLM'")
    assert isinstance(error, (ImportError, ValueError))


def test_code_that_cannot_be_compiled(place: Path) -> None:
    before = remote_code.loaded()
    for content in (b"\0\0", b"x = '\xff'", b"# coding: nonsense\n", b"x = " + b"(" * 100_000, b"\xff\xfe"):
        (place / "constants.py").write_bytes(content)
        with pytest.raises(RemoteCodeError, match=r"constants\.py:1 "):
            trusted(place)
        assert remote_code.loaded() == before
    (place / "constants.py").write_bytes(b"#" * (9 << 20))
    with pytest.raises(RemoteCodeError, match="has more than"):
        trusted(place)


def test_files_that_are_missing(place: Path) -> None:
    (place / "modeling_tiny.py").unlink()
    with pytest.raises(NotFoundError, match=r"no file 'modeling_tiny\.py'"):
        trusted(place)
    assert AutoConfig.from_pretrained(place, trust_remote_code=True).flavour == "plain"


def test_an_interrupt_leaves_nothing(place: Path) -> None:
    before = remote_code.loaded()
    (place / "constants.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        trusted(place)
    assert remote_code.loaded() == before


def test_a_failure_keeps_what_was_there(place: Path) -> None:
    """The configuration's module, loaded before, stays one and the same when the model's fails."""
    (place / "modeling_tiny.py").write_text("raise ValueError")
    config = AutoConfig.from_pretrained(place, trust_remote_code=True)
    before = remote_code.loaded()
    with pytest.raises(RemoteCodeError):
        trusted(place)
    assert remote_code.loaded() == before
    assert type(AutoConfig.from_pretrained(place, trust_remote_code=True)) is type(config)


# Classes that are not ours


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("class TinyForCausalLM: pass", "is no model"),
        ("import loadstone\nclass TinyForCausalLM(loadstone.CausalLM): pass", "config_class"),
        ("import loadstone\nclass TinyForCausalLM(loadstone.CausalLM):\n    config_class = 3", "config_class 3"),
    ],
)
def test_classes_that_do_not_fit(place: Path, base: str, words: str) -> None:
    (place / "modeling_tiny.py").write_text(base)
    with pytest.raises(RemoteCodeError, match=words):
        trusted(place)
    (place / "configuration_tiny.py").write_text("class TinyConfig(dict): pass")
    with pytest.raises(RemoteCodeError, match=r"is no configuration"):
        AutoConfig.from_pretrained(place, trust_remote_code=True)


def test_a_class_of_loadstone_under_another_name(place: Path) -> None:
    """It may be named, and is not marked as the repository's."""
    remote_code.write(place, model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_tiny.Model"})
    (place / "modeling_tiny.py").write_text("from loadstone import LlamaForCausalLM as Model\n")
    assert type(trusted(place)) is LlamaForCausalLM
    assert LlamaForCausalLM._auto_class is None
    assert LlamaConfig._auto_class is None


# Threads


@pytest.mark.parametrize("fails", [False, True])
def test_threads_race_for_a_first_load(place: Path, tmp_path: Path, fails: bool) -> None:
    """The code runs once, everybody gets the same class; if it fails, everybody gets the error."""
    ran = tmp_path / "ran"
    slow = f"import time\ntime.sleep(0.05)\nopen({str(ran)!r}, 'a').write('x')\n"
    layout(place, slow + ("raise ValueError('no')\n" if fails else ""))
    start, results = threading.Barrier(8), []

    def load(door: Any) -> None:
        start.wait()
        try:
            results.append(door.from_pretrained(place, trust_remote_code=True))
        except LoadstoneError as error:
            results.append(error)

    threads = [threading.Thread(target=load, args=(AutoModelForCausalLM,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len({type(result) for result in results}) == 1
    assert type(results[0]).__name__ == ("RemoteCodeError" if fails else "TinyForCausalLM")
    assert len(ran.read_text()) == (8 if fails else 1)


def test_threads_load_different_repositories(tmp_path: Path) -> None:
    places = [remote_code.write(tmp_path / str(number)) for number in range(4)]
    for number, one in enumerate(places):
        (one / "constants.py").write_text(f"BASE = {number}\n")
    scales: dict[int, float] = {}
    threads = [
        threading.Thread(target=lambda n=number, p=one: scales.__setitem__(n, trusted(p).scale))
        for number, one in enumerate(places)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scales == {number: 3 * number for number in range(4)}
