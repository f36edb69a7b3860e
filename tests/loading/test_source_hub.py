"""Hub repositories through the real client, against a Hub on the loopback interface."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loadstone.errors import (
    ConfigError,
    GatedError,
    HubError,
    MissingWeightsError,
    NotFoundError,
    OfflineError,
    PathError,
    RepoIdError,
)
from loadstone.loading.source import resolve_source

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 5000, "sub/config.json": b'{"a": 1}', "sub/x.bin": b"x"}
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def repo(hub: Any) -> Any:
    return hub.repo("org/name", FILES)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's back-off without the time it takes."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_files_come_from_the_repository(hub: Any, repo: Any) -> None:
    source = resolve_source("org/name")
    assert source.name == "org/name"
    assert source.commit == repo.refs["main"]
    assert source.require("config.json").read_bytes() == b"{}"
    assert source.find("model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert source.find("absent.json") is None
    assert source.listing() == sorted(FILES)


def test_first_load_resolves_the_revision_once(hub: Any, repo: Any) -> None:
    source = resolve_source("org/name")
    assert hub.take() == [f"{verb} /org/name/resolve/main/config.json" for verb in ("HEAD", "GET")]
    source.require("config.json")
    assert hub.take() == []
    source.require("model.safetensors")
    assert hub.take() == [f"{verb} /org/name/resolve/{source.commit}/model.safetensors" for verb in ("HEAD", "GET")]


def test_later_files_come_from_the_same_commit(hub: Any, repo: Any) -> None:
    source = resolve_source("org/name")
    repo.commit({"config.json": b"{}", "model.safetensors": b"new"})
    assert source.require("model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert resolve_source("org/name").require("model.safetensors").read_bytes() == b"new"


def test_cached_load_makes_one_head_request(hub: Any, repo: Any) -> None:
    def load() -> None:
        source = resolve_source("org/name")
        source.require("config.json")
        assert source.find("generation_config.json") is None
        assert source.find("model.safetensors.index.json") is None
        source.fetch(["model.safetensors"])

    load()
    hub.take()
    load()
    assert hub.take() == ["HEAD /org/name/resolve/main/config.json"]


@pytest.mark.parametrize("how", ["commit", "local_files_only", "offline"])
def test_pinned_or_local_load_makes_no_request(hub: Any, repo: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_source("org/name")
    first.fetch(["config.json", "model.safetensors"])
    assert first.find("generation_config.json") is None
    hub.take()
    options: dict[str, Any] = {"commit": {"revision": first.commit}, "local_files_only": {"local_files_only": True}}
    if how == "offline":
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = resolve_source("org/name", **options.get(how, {}))
    assert source.commit == first.commit
    assert source.find("generation_config.json") is None
    assert source.fetch(["config.json", "model.safetensors"]) == first.fetch(["config.json", "model.safetensors"])
    assert hub.take() == []


def test_absent_file_is_asked_for_once(hub: Any, repo: Any) -> None:
    source = resolve_source("org/name")
    hub.take()
    assert [source.find("generation_config.json") for _ in range(3)] == [None] * 3
    assert hub.take() == [f"HEAD /org/name/resolve/{source.commit}/generation_config.json"]


def test_subfolder(hub: Any, repo: Any) -> None:
    source = resolve_source("org/name", subfolder="sub")
    assert source.require("config.json").read_bytes() == b'{"a": 1}'
    assert source.find("model.safetensors") is None
    assert source.listing() == ["config.json", "x.bin"]
    assert source.commit == repo.refs["main"]


def test_revision_names_a_branch(hub: Any, repo: Any) -> None:
    repo.commit({"config.json": b"[]"}, "dev")
    assert resolve_source("org/name", revision="dev").require("config.json").read_bytes() == b"[]"


def test_repository_without_config(hub: Any) -> None:
    repo = hub.repo("org/adapter", {"adapter_config.json": b"{}"})
    source = resolve_source("org/adapter")
    assert source.commit == repo.refs["main"]
    assert source.find("config.json") is None
    assert source.find("adapter_config.json") is not None
    with pytest.raises(NotFoundError, match=r"no file 'config\.json'.*adapter_config\.json"):
        source.require("config.json")


def test_many_shards_at_once(hub: Any) -> None:
    names = [f"model-{number:05d}-of-00012.safetensors" for number in range(1, 13)]
    hub.repo("org/big", {"config.json": b"{}", **{name: name.encode() for name in names}})
    source = resolve_source("org/big")
    assert [path.read_bytes() for path in source.fetch(names)] == [name.encode() for name in names]


def test_missing_shards_are_all_named(hub: Any) -> None:
    hub.repo("org/part", {"config.json": b"{}", "a.safetensors": b"1"})
    with pytest.raises(MissingWeightsError, match=r"2 weight file.*'b\.safetensors', 'c\.safetensors'"):
        resolve_source("org/part").fetch(["a.safetensors", "b.safetensors", "c.safetensors"])


def test_force_download_asks_again_but_once_per_source(hub: Any, repo: Any) -> None:
    resolve_source("org/name").require("model.safetensors")
    hub.take()
    source = resolve_source("org/name", force_download=True)
    source.require("model.safetensors")
    source.require("model.safetensors")
    assert [line for line in hub.take() if line.startswith("GET")] == [
        "GET /org/name/resolve/main/config.json",
        f"GET /org/name/resolve/{source.commit}/model.safetensors",
    ]


def test_force_download_contradicts_local_files_only(hub: Any, repo: Any) -> None:
    with pytest.raises(OfflineError, match=r"force_download=True.*local_files_only=True"):
        resolve_source("org/name", force_download=True, local_files_only=True)
    assert hub.take() == []


def test_cache_dir(hub: Any, repo: Any, tmp_path: Path) -> None:
    path = resolve_source("org/name", cache_dir=tmp_path / "mine").require("config.json")
    assert path.is_relative_to(tmp_path / "mine")


def test_file_names_stay_inside(hub: Any, repo: Any) -> None:
    source = resolve_source("org/name")
    hub.take()
    for name in ("../config.json", "/etc/passwd", "a/../../b", "c:\\x", "", "a\0b"):
        with pytest.raises(PathError):
            source.find(name)
    assert hub.take() == []


def test_unknown_repository(hub: Any) -> None:
    with pytest.raises(NotFoundError, match=r"'org/nope'.*neither a directory nor a Hub repository") as caught:
        resolve_source("org/nope")
    assert caught.value.__cause__ is not None
    assert isinstance(caught.value, (OSError, FileNotFoundError))


def test_unknown_revision(hub: Any, repo: Any) -> None:
    with pytest.raises(NotFoundError, match="no such branch, tag or commit"):
        resolve_source("org/name", revision="nope")
    hub.take()
    for revision in ("../main", "a b", "/x", ""):
        with pytest.raises(NotFoundError, match="cannot be a revision"):
            resolve_source("org/name", revision=revision)
    assert hub.take() == []


def test_gated_repository(hub: Any) -> None:
    hub.repo("org/gated", FILES, gated=True)
    with pytest.raises(GatedError, match="gated") as caught:
        resolve_source("org/gated", token=TOKEN)
    assert caught.value.__cause__ is not None
    assert TOKEN not in str(caught.value)
    assert isinstance(caught.value, PermissionError)


def test_private_repository_needs_its_token(hub: Any, tmp_path: Path) -> None:
    hub.repo("org/private", FILES, token=TOKEN)
    assert resolve_source("org/private", token=TOKEN).find("config.json") is not None
    with pytest.raises(NotFoundError, match="needs token="):
        resolve_source("org/private", cache_dir=tmp_path / "empty")
    with pytest.raises(NotFoundError) as caught:
        resolve_source("org/private", token="hf_wrongwrong", revision="other")
    assert "hf_wrongwrong" not in str(caught.value)


def test_refused_without_a_code(hub: Any, repo: Any) -> None:
    hub.fault = lambda handler: handler.error(403) or True
    with pytest.raises(GatedError, match="refused access") as caught:
        resolve_source("org/name", token=TOKEN)
    assert TOKEN not in str(caught.value)


def test_malformed_ids_reach_no_network(hub: Any) -> None:
    for name in ("x" * 97, "org/name.git", "org/--name", "-org/name", "org/na..me", "a b/c", ""):
        with pytest.raises(RepoIdError) as caught:
            resolve_source(name)
        assert isinstance(caught.value, ConfigError)
        assert isinstance(caught.value, OSError)
    assert hub.take() == []


def test_uncached_and_offline(hub: Any, repo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OfflineError, match=r"no directory 'org/name'.*local_files_only=True"):
        resolve_source("org/name", local_files_only=True)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
        resolve_source("org/name")
    source = resolve_source("org/name", revision=repo.refs["main"])
    assert source.find("config.json") is None
    with pytest.raises(OfflineError, match=r"'config\.json' of repository 'org/name'.*HF_HUB_OFFLINE is set"):
        source.require("config.json")
    assert hub.take() == []


def test_partly_cached_and_offline_names_the_files(hub: Any, repo: Any) -> None:
    resolve_source("org/name").require("config.json")
    source = resolve_source("org/name", local_files_only=True)
    with pytest.raises(OfflineError, match=r"1 file.*not in the cache.*'model\.safetensors'"):
        source.fetch(["config.json", "model.safetensors"])
    assert source.listing() == ["config.json"] or source.listing() == []


def test_dead_hub_with_everything_cached(
    hub: Any, repo: Any, point_client_at: Any, no_waiting: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    resolve_source("org/name").fetch(["config.json", "model.safetensors"])
    point_client_at(closed_port())
    source = resolve_source("org/name")
    with caplog.at_level(logging.WARNING):
        assert source.find("generation_config.json") is None  # not known to be absent, but optional
        assert source.find("other.json") is None
    assert len([record for record in caplog.records if "cannot be reached" in record.message]) == 1
    assert source.fetch(["model.safetensors"])[0].read_bytes() == FILES["model.safetensors"]
    assert "cannot be reached" in source.describe()
    assert no_waiting == []  # one quick request, no back-off


def test_dead_hub_and_nothing_cached(hub: Any, point_client_at: Any, no_waiting: list[float]) -> None:
    point_client_at(closed_port())
    with pytest.raises(OfflineError, match=r"'org/name'.*is not in the cache") as caught:
        resolve_source("org/name")
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("status", [500, 503, 429])
def test_failing_hub(hub: Any, repo: Any, status: int, no_waiting: list[float]) -> None:
    hub.fault = lambda handler: handler.error(status) or True
    with pytest.raises(HubError):
        resolve_source("org/name", token=TOKEN)


@pytest.mark.parametrize("header", ["ETag", "X_Repo_Commit"])
def test_answer_without_needed_headers(hub: Any, repo: Any, header: str) -> None:
    headers = {"ETag": '"1"', "X_Repo_Commit": repo.refs["main"]}
    del headers[header]
    hub.fault = lambda handler: handler.answer(200, b"{}", **headers) or True
    with pytest.raises(HubError, match="did not answer as it should"):
        resolve_source("org/name")


def test_short_body_leaves_no_file(hub: Any, repo: Any, no_waiting: list[float], tmp_path: Path) -> None:
    def cut(handler: Any) -> bool:
        if handler.command != "GET":
            return False
        handler.answer(200, b"{", Content_Length="1", ETag='"1"', X_Repo_Commit=repo.refs["main"])
        return True

    hub.fault = cut
    with pytest.raises(HubError):
        resolve_source("org/name")
    assert not [path for path in (tmp_path / "hub-cache").rglob("*") if path.is_file() and path.name == "config.json"]


def test_token_stays_with_the_hub(hub: Any) -> None:
    hub.repo("org/private", FILES, token=TOKEN)
    other = type(hub)()
    try:
        hub.redirect_to = other.url.replace("127.0.0.1", "localhost")
        path = resolve_source("org/private", token=TOKEN).require("model.safetensors")
        assert path.read_bytes() == FILES["model.safetensors"]
        assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}
        assert [request.authorization for request in other.requests] == [None]
    finally:
        other.close()


def test_environment_of_a_fresh_process(hub: Any, repo: Any, tmp_path: Path) -> None:
    code = "from loadstone.loading.source import resolve_source as r; print(r('org/name').require('config.json'))"
    own = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}  # other tests set them
    env = {**own, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "env"), "HF_HUB_DISABLE_XET": "1"}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], env={**env, **more}, capture_output=True, text=True)

    assert "OfflineError" in run(TRANSFORMERS_OFFLINE="1").stderr
    done = run()
    assert done.stdout.startswith(str(tmp_path / "env")), done.stderr
    hub.take()
    assert run(TRANSFORMERS_OFFLINE="1").stdout == done.stdout
    assert run(HF_HUB_OFFLINE="1").stdout == done.stdout
    assert hub.take() == []
