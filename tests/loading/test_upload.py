"""Pushing to a Hub on the loopback interface, through the real client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from loadstone.errors import GatedError, HubError, NotFoundError, PathError, RepoIdError
from loadstone.loading.save import save_checkpoint
from loadstone.loading.source import resolve_source
from loadstone.loading.upload import push_directory

TOKEN = "hf_secretsecretsecret"
STATE = {"a": torch.arange(10.0), "b": torch.ones(10)}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a checkpoint and gives its directory."""

    def save(limit: int = 1000) -> Path:
        save_checkpoint(tmp_path / "saved", STATE, texts={"config.json": "{}"}, max_shard_size=limit)
        return tmp_path / "saved"

    return save


def files(hub: Any, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repos[repo_id].at(revision)[1]


def test_new_repository(hub: Any, saved: Callable[..., Path]) -> None:
    info = push_directory(saved(), "me/model", commit_message="first", commit_description="long", token=TOKEN)
    held = files(hub, "me/model")
    assert held.keys() == {"config.json", "model.safetensors", "README.md"}
    assert load(held["model.safetensors"])["a"].equal(STATE["a"])
    assert hub.repos["me/model"].log == [{"summary": "first", "description": "long", "ref": "main"}]
    assert info.oid == hub.repos["me/model"].refs["main"]
    own = [request for request in hub.requests if request.path.startswith(("/api/models", "/api/repos", "/me/"))]
    assert {request.authorization for request in own} == {f"Bearer {TOKEN}"}
    assert {request.authorization for request in hub.requests if request.path.startswith("/lfs/")} == {None}


def test_what_is_pushed_can_be_loaded(hub: Any, saved: Callable[..., Path], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", STATE, texts={"config.json": "{}"}, max_shard_size=40)
    push_directory(tmp_path / "m", "me/model", token=TOKEN)
    source = resolve_source("me/model", token=TOKEN)
    for path in (tmp_path / "m").iterdir():
        assert source.require(path.name).read_bytes() == path.read_bytes()


def test_weights_that_are_replaced_are_removed(hub: Any, saved: Callable[..., Path]) -> None:
    hub.repo("me/model", {"model.safetensors": b"old", "model.fp16.safetensors": b"v", "tokenizer.json": b"t"})
    push_directory(saved(40), "me/model", token=TOKEN)
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    kept = {"model.fp16.safetensors", "tokenizer.json"}
    assert files(hub, "me/model").keys() == shards | kept | {"config.json", "README.md"}
    push_directory(saved(), "me/model", token=TOKEN)
    assert files(hub, "me/model").keys() == {"model.safetensors"} | kept | {"config.json", "README.md"}


def test_model_card_with_tags(hub: Any, saved: Callable[..., Path]) -> None:
    push_directory(saved(), "me/model", token=TOKEN, tags=["one", "two"])
    from huggingface_hub import ModelCard

    card = ModelCard(files(hub, "me/model")["README.md"].decode())
    assert card.data.tags == ["one", "two"]
    assert card.data.library_name == "loadstone"
    assert "# model" in card.text


def test_model_card_there_already(hub: Any, saved: Callable[..., Path], tmp_path: Path) -> None:
    own = "---\nlicense: mit\ntags:\n- one\n---\n\n# Mine\n"
    hub.repo("me/model", {"README.md": own.encode()})
    push_directory(saved(), "me/model", token=TOKEN)
    assert files(hub, "me/model")["README.md"].decode() == own
    push_directory(saved(), "me/model", token=TOKEN, tags="two")
    changed = files(hub, "me/model")["README.md"].decode()
    assert "- one\n- two" in changed
    assert "license: mit" in changed
    assert "# Mine" in changed
    save_checkpoint(tmp_path, STATE, texts={"config.json": "{}", "README.md": "# Folder's own\n"})
    push_directory(tmp_path, "me/other", token=TOKEN)
    assert files(hub, "me/other")["README.md"] == b"# Folder's own\n"


def test_revision_and_pull_request(hub: Any, saved: Callable[..., Path]) -> None:
    hub.repo("me/model", {"config.json": b"main"})
    push_directory(saved(), "me/model", token=TOKEN, revision="dev")
    assert files(hub, "me/model")["config.json"] == b"main"
    assert files(hub, "me/model", "dev")["config.json"] == b"{}"
    info = push_directory(saved(), "me/model", token=TOKEN, create_pr=True)
    assert hub.repos["me/model"].log[-1]["ref"] == "refs/pr/1"
    assert files(hub, "me/model")["config.json"] == b"main"
    assert info.pr_url.endswith("/discussions/1")


def test_private_is_passed_on(hub: Any, saved: Callable[..., Path]) -> None:
    bodies: list[bytes] = []

    def watch(handler: Any) -> bool:
        if handler.parts == ["api", "repos", "create"]:
            bodies.append(handler.body)
        return False

    hub.fault = watch
    push_directory(saved(), "me/model", token=TOKEN, private=True)
    assert b'"visibility":"private"' in bodies[0].replace(b" ", b"") or b'"private":true' in bodies[0].replace(
        b" ", b""
    )


@pytest.mark.parametrize(("status", "error"), [(401, GatedError), (403, GatedError), (400, HubError), (404, HubError)])
def test_refusals(hub: Any, saved: Callable[..., Path], status: int, error: type[Exception]) -> None:
    hub.fault = lambda handler: handler.error(status) or True
    with pytest.raises(error, match="me/model") as caught:
        push_directory(saved(), "me/model", token=TOKEN)
    assert isinstance(caught.value, HubError)
    assert caught.value.__cause__ is not None
    assert TOKEN not in str(caught.value)


def test_nothing_is_sent_for_bad_arguments(hub: Any, saved: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RepoIdError):
        push_directory(saved(), "a/b/c", token=TOKEN)
    with pytest.raises(PathError, match="not a directory"):
        push_directory(tmp_path / "absent", "me/model", token=TOKEN)
    assert hub.take() == []


def test_unknown_revision_reference(hub: Any, saved: Callable[..., Path]) -> None:
    hub.repo("me/model", {})
    with pytest.raises(NotFoundError, match="no such branch"):
        push_directory(saved(), "me/model", token=TOKEN, revision="refs/pr/9")
