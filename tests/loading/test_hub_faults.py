"""Faults at every endpoint that a load uses: typed errors, nothing wrong left in the cache, and the next load works."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from loadstone.errors import GatedError, HubError, MissingWeightsError, NotFoundError, OfflineError
from loadstone.loading.source import resolve_source

CONFIG, WEIGHTS = b'{"a": 1}', b"w" * 5000
NAME, TOKEN = "org/name", "hf_secretsecretsecret"

# endpoint: (method, end of the path, whether the repository has a config.json)
ENDPOINTS = {
    "HEAD config.json": ("HEAD", "config.json", True),
    "GET config.json": ("GET", "config.json", True),
    "HEAD weights": ("HEAD", "model.safetensors", True),
    "GET weights": ("GET", "model.safetensors", True),
    "API revision": ("GET", "/api/models/org/name/revision/main", False),
}
STATUSES = (400, 401, 403, 404, 408, 429, 500, 503)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def repository(hub: Any, endpoint: str) -> Any:
    files = {"config.json": CONFIG} if ENDPOINTS[endpoint][2] else {}
    return hub.repo(NAME, {**files, "model.safetensors": WEIGHTS})


def load() -> bytes:
    """What a load does: the commit, an optional file, the weights."""
    source = resolve_source(NAME, token=TOKEN)
    source.find("generation_config.json")
    return source.fetch(["model.safetensors"])[0].read_bytes()


def at(endpoint: str, answer: Any) -> Any:
    """A fault that answers the requests to one endpoint."""
    method, end, _ = ENDPOINTS[endpoint]

    def fault(handler: Any) -> bool:
        if endpoint.startswith("API") and handler.command == "HEAD" and handler.path.endswith("config.json"):
            handler.error(404, "EntryNotFound")  # and no commit, so that the API has to be asked
            return True
        if handler.command != method or not handler.path.partition("?")[0].endswith(end):
            return False
        answer(handler)
        return True

    return fault


def failed_typed(hub: Any, cache: Path, kinds: tuple[type[Exception], ...]) -> Exception:
    """The load raises one of these, its text without the token; nothing partial or wrong is cached; then it works."""
    with pytest.raises(kinds) as caught:
        load()
    assert NAME in str(caught.value)
    chained: BaseException | None = caught.value
    while chained is not None:
        assert TOKEN not in str(chained)
        chained = chained.__cause__
    for path in cache.rglob("*"):
        if path.is_file() and "refs" not in path.parts and ".no_exist" not in path.parts and ".locks" not in path.parts:
            assert ".incomplete" not in path.name
            if "snapshots" in path.parts or "blobs" in path.parts:
                assert path.read_bytes() in (CONFIG, WEIGHTS), path
    hub.fault = None
    assert load() == WEIGHTS
    return caught.value


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_statuses(hub: Any, endpoint: str, status: int, tmp_path: Path) -> None:
    repository(hub, endpoint)
    hub.fault = at(endpoint, lambda handler: handler.error(status))
    error = failed_typed(hub, tmp_path / "hub-cache", (HubError, MissingWeightsError))
    if status in (401, 403):
        assert isinstance(error, (GatedError, NotFoundError))
    if status in (429, 500, 502, 503, 504):
        assert isinstance(error, OfflineError), error


@pytest.mark.parametrize("code", ["RepoNotFound", "RevisionNotFound", "GatedRepo"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_codes_of_the_hub(hub: Any, endpoint: str, code: str, tmp_path: Path) -> None:
    """The repository, the revision or the file goes away, or is closed, in the midst of a load."""
    repository(hub, endpoint)
    hub.fault = at(endpoint, lambda handler: handler.error(403 if code == "GatedRepo" else 404, code))
    error = failed_typed(hub, tmp_path / "hub-cache", (NotFoundError, GatedError, MissingWeightsError, HubError))
    if code == "GatedRepo":
        assert isinstance(error, GatedError)


def headers_but(handler: Any, missing: str, content: bytes) -> None:
    headers = {"ETag": '"%s"' % ("0" * 64), "X_Repo_Commit": handler.hub.repos[NAME].refs["main"]}
    headers.pop(missing, None)
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    if missing != "Content_Length":
        handler.send_header("Content-Length", str(len(content)))
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True


@pytest.mark.parametrize("missing", ["ETag", "X_Repo_Commit", "Content_Length"])
@pytest.mark.parametrize("endpoint", ["HEAD config.json", "HEAD weights"])
def test_missing_headers(hub: Any, endpoint: str, missing: str, tmp_path: Path) -> None:
    repository(hub, endpoint)
    content = CONFIG if "config" in endpoint else WEIGHTS
    hub.fault = at(endpoint, lambda handler: headers_but(handler, missing, content))
    if missing == "Content_Length":  # which the client can do without
        assert load() == WEIGHTS
    else:
        failed_typed(hub, tmp_path / "hub-cache", (HubError,))


BODIES = {
    "half": lambda content: (content[: len(content) // 2], len(content)),
    "nothing": lambda content: (b"", len(content)),
    "shorter, and says so": lambda content: (content[:-1], len(content) - 1),
    "longer, and says so": lambda content: (content + b"x", len(content) + 1),
    "a web page": lambda content: (b"<html>sign in</html>", 20),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("endpoint", ["GET config.json", "GET weights"])
def test_wrong_bodies(hub: Any, endpoint: str, body: str, tmp_path: Path) -> None:
    repository(hub, endpoint)

    def answer(handler: Any) -> None:
        content, length = BODIES[body](CONFIG if "config" in endpoint else WEIGHTS)
        handler.answer(200, content, Content_Length=str(length), ETag='"1"')
        handler.close_connection = True

    hub.fault = at(endpoint, answer)
    failed_typed(hub, tmp_path / "hub-cache", (HubError,))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"<html>", b'{"sha": null}', b'{"sha": 3}', b'{"id": "x"}']
)
def test_nonsense_of_the_api(hub: Any, body: bytes, tmp_path: Path) -> None:
    repository(hub, "API revision")
    hub.fault = at("API revision", lambda handler: handler.answer(200, body, Content_Type="application/json"))
    failed_typed(hub, tmp_path / "hub-cache", (HubError,))


@pytest.mark.parametrize("commit", ["", "main", "../../x", "0" * 39, "g" * 40, "A" * 40])
def test_a_commit_that_is_none(hub: Any, commit: str, tmp_path: Path) -> None:
    """It becomes a folder's name in the cache."""
    repository(hub, "HEAD config.json")
    hub.fault = at("HEAD config.json", lambda handler: handler._file(CONFIG, ETag='"1"', X_Repo_Commit=commit))
    with pytest.raises(HubError):
        load()
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob("hub-cache/x*"))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_token_goes_to_no_other_host(hub: Any, endpoint: str, status: int) -> None:
    repository(hub, endpoint)
    other = type(hub)()
    place = other.url.replace("127.0.0.1", "localhost")
    hub.fault = at(endpoint, lambda handler: handler.answer(status, Location=f"{place}/elsewhere"))
    try:
        with pytest.raises((HubError, MissingWeightsError)) as caught:
            load()
        assert TOKEN not in str(caught.value)
        assert {request.authorization for request in hub.requests} >= {f"Bearer {TOKEN}"}
        assert not [request for request in other.requests if request.authorization]
    finally:
        other.close()


@pytest.mark.parametrize("fault", ["404", "500", "half", "page"])
def test_a_storage_host_that_fails(hub: Any, fault: str, tmp_path: Path) -> None:
    """Large files are redirected to another host, which has its own troubles."""
    repository(hub, "GET weights")
    other = type(hub)()

    def answer(handler: Any) -> bool:
        if handler.command == "GET":
            if fault in ("404", "500"):
                handler.error(int(fault))
            else:
                handler.answer(200, WEIGHTS[:100] if fault == "half" else b"<html>", Content_Length="5000")
                handler.close_connection = True
            return True
        return False

    other.fault = answer
    hub.redirect_to = other.url.replace("127.0.0.1", "localhost")
    try:
        with pytest.raises((HubError, MissingWeightsError)):
            load()
        assert not [request for request in other.requests if request.authorization]
        assert not [name for _, _, names in os.walk(tmp_path / "hub-cache") for name in names if "incomplete" in name]
        other.fault = None
        assert load() == WEIGHTS
    finally:
        other.close()


def test_a_loop_of_redirects(hub: Any, tmp_path: Path) -> None:
    repository(hub, "HEAD config.json")
    hub.fault = at("HEAD config.json", lambda handler: handler.answer(302, Location=handler.path))
    failed_typed(hub, tmp_path / "hub-cache", (HubError,))
