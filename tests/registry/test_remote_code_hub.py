"""Code of Hub repositories: of the commit of the weights unless code_revision says otherwise, and offline too."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import remote_code
from remote_code import AUTO_MAP, CODE

from loadstone import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from loadstone.cli import main
from loadstone.errors import (
    ArgumentError,
    HubError,
    IntegrityError,
    NotFoundError,
    OfflineError,
    RemoteCodeError,
    RemoteCodeRefused,
)
from loadstone.registry import choice

NAME = "org/own-code"


@pytest.fixture
def repo(hub: Any) -> Any:
    return hub.repo(NAME, remote_code.files())


@pytest.fixture(autouse=True)
def all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_told", set())


def trusted(name: str = NAME, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)


def with_base(value: float) -> dict[str, str]:
    return {**CODE, "constants.py": f"BASE = {value}\n"}


def test_own_classes_load(hub: Any, repo: Any) -> None:
    model = trusted()
    assert type(model).__name__ == "TinyForCausalLM"
    assert model.config._commit_hash == repo.refs["main"]
    taken = [line for line in hub.take() if "bytes=" not in line]  # the weights' header comes before the weights
    assert {line.rpartition("/")[2] for line in taken if line.startswith("GET") and "resolve" in line} == {
        "config.json", "model.safetensors", *(name.rpartition("/")[2] for name in CODE)}  # fmt: skip
    assert type(trusted()) is type(model)
    assert hub.take() == [f"HEAD /{NAME}/resolve/main/config.json"]  # absent files are known to be absent
    assert type(trusted(local_files_only=True)) is type(model)
    assert type(trusted(revision=repo.refs["main"])) is type(model)
    assert hub.take() == []


def test_a_snapshot_of_the_cache_given_as_a_directory(hub: Any, repo: Any) -> None:
    """Its files are links to the cache's blobs."""
    model = trusted()
    snapshot = Path(sys.modules[type(model).__module__].__file__ or "").parent
    assert snapshot.name == repo.refs["main"]
    hub.take()
    assert trusted(str(snapshot)).scale == 6.0
    assert hub.take() == []


def test_refused_without_a_request_for_code(hub: Any, repo: Any) -> None:
    commit = repo.refs["main"]
    for door, file in ((AutoConfig, "configuration_tiny.py"), (AutoModelForCausalLM, "modeling_tiny.py")):
        with pytest.raises(RemoteCodeRefused) as caught:
            door.from_pretrained(NAME)
        assert f"{hub.url.replace('127.0.0.1', '')[:7]}" in str(caught.value)
        assert f"/{NAME}/blob/{commit}/{file}" in str(caught.value)
        assert commit[:12] in str(caught.value)
    assert not [line for line in hub.take() if ".py" in line]


def test_code_and_weights_come_from_one_commit(hub: Any, repo: Any) -> None:
    """Also if the branch moves between config.json and the code."""
    first = repo.refs["main"]
    moved: list[str] = []

    def move(handler: Any) -> bool:
        if handler.path.endswith("modeling_tiny.py") and not moved:
            moved.append(repo.commit(remote_code.files(1, code=with_base(7.0))))
        return False

    hub.fault = move
    before = trusted()
    hub.fault = None
    after = trusted()
    assert moved == [repo.refs["main"]]
    assert (before.scale, before.config._commit_hash) == (6.0, first)
    assert (after.scale, after.config._commit_hash) == (21.0, moved[0])
    assert trusted(revision=first).scale == 6.0
    assert type(trusted(revision=first)) is type(before)


def test_code_revision(hub: Any, repo: Any) -> None:
    weights = repo.refs["main"]
    repo.commit(remote_code.files(code=with_base(4.0)), "code")
    model = trusted(code_revision="code")
    assert (model.scale, model.config._commit_hash) == (12.0, weights)
    assert trusted().scale == 6.0
    assert trusted(revision="code", code_revision=weights).scale == 6.0
    config = AutoConfig.from_pretrained(NAME, trust_remote_code=True, code_revision="code")
    assert AutoModelForCausalLM.from_config(config, trust_remote_code=True).scale == 12.0
    assert AutoModelForCausalLM.from_config(config, trust_remote_code=True, code_revision=weights).scale == 6.0
    with pytest.raises(NotFoundError, match="no such branch"):
        trusted(code_revision="nowhere")


@pytest.fixture
def elsewhere(hub: Any, tmp_path: Path) -> Path:
    """A directory whose code lies in a repository."""
    hub.repo("org/other", {name: text.encode() for name, text in CODE.items()})
    place = {name: f"org/other--{reference}" for name, reference in AUTO_MAP.items()}
    return remote_code.write(tmp_path / "weights", auto_map=place, code={})


def test_code_of_another_repository(hub: Any, elsewhere: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "org" / "other").mkdir(parents=True)
    (tmp_path / "org" / "other" / "modeling_tiny.py").write_text("raise RuntimeError('a directory here is not meant')")
    monkeypatch.chdir(tmp_path)
    model = trusted(str(elsewhere))
    assert model.scale == 6.0
    assert type(AutoConfig.from_pretrained(elsewhere, trust_remote_code=True)) is type(model.config)
    other = hub.repos["org/other"]
    first = other.refs["main"]
    other.commit({name: text.encode() for name, text in with_base(1.0).items()})
    assert trusted(str(elsewhere)).scale == 3.0
    assert trusted(str(elsewhere), code_revision=first).scale == 6.0
    hub.take()
    with pytest.raises(RemoteCodeRefused, match=r"modeling_tiny\.py of org/other \(.*/org/other/blob/v1/modeling_tiny"):
        AutoModelForCausalLM.from_pretrained(elsewhere, code_revision="v1")
    assert hub.take() == []


def test_another_repository_that_is_not_there(hub: Any, elsewhere: Path) -> None:
    with pytest.raises(OfflineError, match="org/other"):
        trusted(str(elsewhere), local_files_only=True)
    del hub.repos["org/other"]
    with pytest.raises(NotFoundError, match="org/other"):
        trusted(str(elsewhere))


def test_own_repository_named_in_full(hub: Any) -> None:
    """It is the commit of the weights, as if it were not named."""
    place = {name: f"{NAME}--{reference}" for name, reference in AUTO_MAP.items()}
    repo = hub.repo(NAME, remote_code.files(auto_map=place))
    first = repo.refs["main"]
    repo.commit(remote_code.files(auto_map=place, code=with_base(9.0)))
    assert trusted(revision=first).scale == 6.0
    assert trusted().scale == 27.0


def test_the_commit_is_told_once_where_it_was_not_named(
    hub: Any, repo: Any, elsewhere: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        messages = [record.message for record in caplog.records if "Running code" in record.message]
        caplog.clear()
        return messages

    with caplog.at_level(logging.WARNING):
        trusted()
        (message,) = told()
        assert f"revision={repo.refs['main']!r}" in message
        assert "modeling_tiny.py" in message
        trusted()
        choice._told.clear()
        trusted(revision=repo.refs["main"])
        assert told() == []
        trusted(str(elsewhere))
        (message,) = told()
        assert f"code_revision={hub.repos['org/other'].refs['main']!r}" in message
        choice._told.clear()
        trusted(str(elsewhere), code_revision=hub.repos["org/other"].refs["main"])
        trusted(str(remote_code.write(elsewhere.parent / "local")))
        assert told() == []


def test_a_private_repository(hub: Any) -> None:
    hub.repo("org/private", remote_code.files(), token="hf_secret")
    assert trusted("org/private", token="hf_secret").scale == 6.0
    with pytest.raises(RemoteCodeRefused) as caught:
        AutoModelForCausalLM.from_pretrained("org/private", token="hf_secret")
    assert "hf_secret" not in str(caught.value)


def test_code_that_the_repository_lacks(hub: Any) -> None:
    hub.repo(NAME, remote_code.files(code={"configuration_tiny.py": CODE["configuration_tiny.py"]}))
    with pytest.raises(NotFoundError, match=r"has no file 'modeling_tiny\.py'"):
        trusted()
    hub.repo("org/part", remote_code.files(code={**CODE, "modeling_tiny.py": "from .gone import X"}))
    with pytest.raises(RemoteCodeError, match=r"modeling_tiny\.py:1 .*'gone'"):
        trusted("org/part")


def test_saved_elsewhere_the_code_goes_along_and_other_classes_keep_their_place(
    hub: Any, repo: Any, tmp_path: Path
) -> None:
    repo.commit(remote_code.files(auto_map={**AUTO_MAP, "AutoTokenizer": ["tok.Tok", None], "AutoModel": "x/y--m.M"}))
    trusted().save_pretrained(tmp_path / "copy")
    auto_map = json.loads((tmp_path / "copy" / "config.json").read_text())["auto_map"]
    assert auto_map == {**AUTO_MAP, "AutoTokenizer": [f"{NAME}--tok.Tok", None], "AutoModel": "x/y--m.M"}
    hub.take()
    assert trusted(str(tmp_path / "copy")).scale == 6.0
    assert hub.take() == []


def test_a_native_class_saves_where_the_code_is(hub: Any, tmp_path: Path) -> None:
    """The code was not trusted, so it is not carried: the reference says where it lies."""
    hub.repo(NAME, remote_code.files(model_type="llama"))
    model = AutoModelForCausalLM.from_pretrained(NAME)
    assert type(model) is LlamaForCausalLM
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["auto_map"] == {
        name: f"{NAME}--{reference}" for name, reference in AUTO_MAP.items()}  # fmt: skip
    assert not list((tmp_path / "a").glob("*.py"))


def test_push_to_hub_carries_the_code(hub: Any, repo: Any) -> None:
    trusted().push_to_hub("me/copy")
    _, files = hub.repos["me/copy"].at("main")
    assert {name for name in files if name.endswith(".py")} == set(CODE)
    assert trusted("me/copy").scale == 6.0


@pytest.mark.parametrize("file", ["modeling_tiny.py", "parts/scale.py"])
@pytest.mark.parametrize("fault", [401, 403, 429, 500, 503, "half"])
def test_faults_while_code_is_fetched(hub: Any, repo: Any, file: str, fault: Any, monkeypatch: Any) -> None:
    """A typed error, nothing run or left, and the next load works."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    before = remote_code.loaded()

    def answer(handler: Any) -> bool:
        if not handler.path.endswith(file) or (fault == "half" and handler.command == "HEAD"):
            return False
        if fault == "half":
            handler.answer(200, b"import", Content_Length=str(len(CODE[file])))
            handler.close_connection = True
        else:
            handler.error(fault)
        return True

    hub.fault = answer
    with pytest.raises(HubError, match=NAME):
        trusted()
    assert remote_code.loaded() == before
    hub.fault = None
    assert trusted().scale == 6.0


def test_code_that_is_not_what_the_hub_hashed_does_not_run(hub: Any, repo: Any, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    evil = f"open({str(ran)!r},'w')".encode()

    def answer(handler: Any) -> bool:
        if handler.command != "GET" or not handler.path.endswith("configuration_tiny.py"):
            return False
        size = len(CODE["configuration_tiny.py"])
        handler.answer(200, evil + b"#" * (size - len(evil)))
        return True

    assert len(evil) < len(CODE["configuration_tiny.py"])
    hub.fault = answer
    with pytest.raises(IntegrityError, match=r"'configuration_tiny\.py'.*hash differs"):
        trusted(verify="sha256")
    assert not ran.exists()
    hub.fault = None
    assert trusted(verify="sha256").scale == 6.0


def test_offline_with_part_of_the_code(hub: Any, repo: Any) -> None:
    AutoConfig.from_pretrained(NAME, trust_remote_code=True)  # the files of both classes are fetched
    with pytest.raises(HubError, match=r"only what is cached.*has no weights"):
        trusted(local_files_only=True)
    hub.repo("org/half", remote_code.files())
    LlamaConfig.get_config_dict("org/half")
    with pytest.raises(OfflineError, match=r"'configuration_tiny\.py' of repository 'org/half'"):
        AutoConfig.from_pretrained("org/half", trust_remote_code=True, local_files_only=True)


def test_code_revision_of_the_command(hub: Any, repo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    broken = repo.commit(remote_code.files(code={**CODE, "modeling_tiny.py": "1 / 0"}), "broken")
    command = ["inspect", NAME, "--trust-remote-code", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["model_class"] == "TinyForCausalLM"
    assert main([*command, "--code-revision", "broken"]) == 2
    assert f"(commit {broken[:12]}) failed: ZeroDivisionError" in capsys.readouterr().err
    assert main([*command, "--revision", "broken", "--code-revision", repo.refs["main"]]) == 0


def test_code_revision_has_no_effect_on_a_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert trusted(str(remote_code.write(tmp_path / "local")), code_revision="v1").scale == 6.0
    assert "code_revision='v1' has no effect" in caplog.text
    with pytest.raises(ArgumentError, match="code_revision"):
        trusted(str(tmp_path / "local"), code_revision=1)
