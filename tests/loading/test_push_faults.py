"""Faults at every endpoint of a push: typed errors, the repository and the directory as they were, then it works."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone.errors import GatedError, HubError
from loadstone.loading.save import save_checkpoint
from loadstone.loading.upload import push_directory

NAME, TOKEN = "me/model", "hf_secretsecretsecret"
ENDPOINTS = {
    "create": ("POST", "/api/repos/create"),
    "branch": ("POST", "/branch/dev"),
    "card": ("HEAD", "/README.md"),
    "tree": ("GET", "/tree/"),
    "preupload": ("POST", "/preupload/"),
    "lfs batch": ("POST", "/info/lfs/objects/batch"),
    "lfs object": ("PUT", "/lfs/"),
    "commit": ("POST", "/commit/"),
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    place = tmp_path / "model"
    save_checkpoint(place, {"a": torch.arange(500.0)}, texts={"config.json": "{}", "code/x.py": "x = 1\n"})
    return place


# The repository is there though it could not be made.
HARMLESS = {("create", 401), ("create", 403)}


def push(directory: Path) -> Any:
    return push_directory(directory, NAME, token=TOKEN, revision="dev")


def at(endpoint: str, answer: Any, seen: list[str]) -> Any:
    method, part = ENDPOINTS[endpoint]

    def fault(handler: Any) -> bool:
        if handler.command != method or part not in handler.path:
            return False
        seen.append(handler.path)
        answer(handler)
        return True

    return fault


@pytest.mark.parametrize("fault", [401, 403, 404, 429, 500, "cut"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_push_that_fails(hub: Any, directory: Path, endpoint: str, fault: Any) -> None:
    repo = hub.repo(NAME, {"config.json": b"old", "model-00001-of-00002.safetensors": b"old"})
    repo.refs["dev"] = repo.refs["main"]
    before = dict(repo.commits), dict(repo.refs)
    here = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    seen: list[str] = []

    def answer(handler: Any) -> None:
        if fault == "cut":
            handler.answer(200, b"{", Content_Length="100", Connection="close")
            handler.close_connection = True
        else:
            handler.error(fault)

    hub.fault = at(endpoint, answer, seen)
    if (endpoint, fault) in HARMLESS:
        push(directory)
    else:
        with pytest.raises(HubError, match=NAME) as caught:
            push(directory)
        assert (repo.commits, repo.refs) == before
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == here
        assert isinstance(caught.value, GatedError) or fault != 403
        chained: BaseException | None = caught.value
        while chained is not None:
            assert TOKEN not in str(chained)
            chained = chained.__cause__
    assert seen, "the push does not use this endpoint"
    hub.fault = None
    push(directory)
    _, files = repo.at("dev")
    assert files["model.safetensors"] == here[directory / "model.safetensors"]
    assert files["code/x.py"] == b"x = 1\n"
    assert "model-00001-of-00002.safetensors" not in files
