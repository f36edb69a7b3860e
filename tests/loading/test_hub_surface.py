"""The Hub's surface beyond the ordinary load: proxies, hashes, short revisions, resumption, the environment."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import tiny
import torch
from safetensors.torch import save

import loadstone
from loadstone import AutoConfig, AutoModelForCausalLM
from loadstone.errors import ArgumentError, HubError, IntegrityError, NotFoundError, OfflineError
from loadstone.loading import proxies as proxies_of
from loadstone.loading.source import resolve_source

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 5000}
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def repo(hub: Any) -> Any:
    return hub.repo("org/name", FILES)


# Proxies


class Proxy(BaseHTTPRequestHandler):
    """A forward proxy that knows where the host ``hub.invalid`` is, which nobody else does."""

    target = ""
    seen: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.seen.append(f"{self.command} {url.netloc}{url.path}")
        client = http.client.HTTPConnection(self.target)
        client.request(self.command, f"{url.path}?{url.query}", headers=dict(self.headers))
        answer = client.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        client.close()

    do_HEAD = do_GET


@pytest.fixture
def proxy(hub: Any, point_client_at: Any) -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy without which the fake Hub cannot be reached, and what it was asked for."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before, seen = _http._GLOBAL_CLIENT_FACTORY, []
    kind = type("Bound", (Proxy,), {"target": urlsplit(hub.url).netloc, "seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    point_client_at("http://hub.invalid")
    yield f"127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()
    thread.join()
    set_client_factory(before)


@pytest.mark.parametrize("spelling", ["{}", "http://{}", "http://user:secret@{}"])
def test_every_request_goes_through_the_proxy(hub: Any, repo: Any, proxy: Any, spelling: str) -> None:
    address, seen = proxy
    source = resolve_source("org/name", proxies={"http": spelling.format(address)})
    assert source.fetch(["config.json", "model.safetensors"])[1].read_bytes() == FILES["model.safetensors"]
    assert source.find("absent.json") is None
    assert source.listing() == sorted(FILES)
    assert len([line for line in seen if line.startswith(("HEAD", "GET"))]) == len(hub.take()) > 5
    assert "secret" not in repr(source)


def test_a_whole_load_through_a_proxy(hub: Any, proxy: Any) -> None:
    hub.repo("org/llama", model_files())
    chosen = {"http://hub.invalid": proxy[0], "https": None}
    model = AutoModelForCausalLM.from_pretrained("org/llama", proxies=chosen)
    assert AutoConfig.from_pretrained("org/llama", proxies=chosen) == loadstone.LlamaConfig.from_pretrained(
        "org/llama", proxies=chosen
    )
    assert model.load_report.fits
    assert proxy[1]


def sharded(count: int = 3) -> dict[str, bytes]:
    """The model in several files, whose headers are looked at before the files are there."""
    tensors = {name: tensor.clone() for name, tensor in tiny.model("llama").state_dict().items()}
    files, weight_map = {"config.json": model_files()["config.json"]}, {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[number::count])
        files[name] = save(part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


def test_shards_that_arrive_while_loading_go_through_the_proxy(hub: Any, proxy: Any) -> None:
    hub.repo("org/shards", sharded())
    model = AutoModelForCausalLM.from_pretrained("org/shards", proxies={"http": proxy[0]})
    assert model.load_report.fits
    assert len(proxy[1]) == len(hub.take()) > 8


def test_parts_of_shards_at_another_host_are_asked_for_without_the_token(hub: Any) -> None:
    hub.repo("org/private", sharded(), token=TOKEN)
    other = type(hub)()
    try:
        hub.redirect_to = other.url.replace("127.0.0.1", "localhost")
        model = AutoModelForCausalLM.from_pretrained("org/private", token=TOKEN, verify="sha256")
        assert torch.equal(model.lm_head.weight, tiny.model("llama").lm_head.weight)
        assert len(other.requests) >= 3
        assert {request.authorization for request in other.requests} == {None}
    finally:
        other.close()


def test_only_the_call_that_names_a_proxy_uses_it(
    hub: Any, repo: Any, proxy: Any, point_client_at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(HubError):
        resolve_source("org/name")
    resolve_source("org/name", proxies={"all": proxy[0]})
    proxy[1].clear()
    point_client_at(hub.url)
    resolve_source("org/name", cache_dir=tmp_path / "direct")
    assert proxy[1] == []


def test_a_dead_proxy_is_not_gone_around(hub: Any, repo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(HubError) as caught:
        resolve_source("org/name", proxies={"http": "http://user:secret@127.0.0.1:9"})
    assert "secret" not in str(caught.value)
    assert hub.take() == []


def test_proxies_do_not_offer_xet() -> None:
    """Its client would go around them."""
    answer = type("Answer", (), {"headers": {"X-Xet-Hash": "1", "x-xet-refresh-route": "2", "ETag": "3"}})()
    proxies_of._without_xet(answer)
    assert answer.headers == {"ETag": "3"}


@pytest.mark.parametrize(
    "given", ["127.0.0.1:1", [("http", "x")], {"ftp": "x:1"}, {"http": ""}, {"http": 3}, {3: "x:1"}, {"": "x:1"}]
)
def test_malformed_proxies(hub: Any, repo: Any, given: Any) -> None:
    with pytest.raises(ArgumentError, match="prox"):
        resolve_source("org/name", proxies=given)
    assert hub.take() == []


# Hashes


def model_files() -> dict[str, bytes]:
    tensors = {name: tensor.clone() for name, tensor in tiny.model("llama").state_dict().items()}
    return {
        "config.json": tiny.CONFIGS["llama"].from_dict(tiny.values("llama")).to_json_string().encode(),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


def flipped(name: str) -> Any:
    """A fault: one bit of a body is wrong, its length right."""

    def fault(handler: Any) -> bool:
        if handler.command != "GET" or not handler.path.endswith(name):
            return False
        content = bytearray(handler.hub.repos["org/llama"].at("main")[1][name])
        content[-1] ^= 1
        if handler.headers.get("Range"):  # a look at the header alone
            return False
        handler.answer(200, bytes(content))
        return True

    return fault


@pytest.mark.parametrize("verify", ["sha256", True])
def test_a_flipped_bit_is_found_on_request(hub: Any, verify: Any, tmp_path: Path) -> None:
    hub.repo("org/llama", model_files())
    hub.fault = flipped("model.safetensors")
    for unchecked in (None, False):
        AutoModelForCausalLM.from_pretrained("org/llama", verify=unchecked)  # sizes alone are compared
    for _ in range(2):  # what is cached, and what is downloaded now
        with pytest.raises(IntegrityError, match=r"'model\.safetensors'.*hash differs.*removed from the cache"):
            AutoModelForCausalLM.from_pretrained("org/llama", verify=verify)
        assert not [path for path in (tmp_path / "hub-cache").rglob("*") if path.name == "model.safetensors"]
    hub.fault = None
    model = AutoModelForCausalLM.from_pretrained("org/llama", verify=verify)
    assert torch.equal(model.lm_head.weight, tiny.model("llama").lm_head.weight)
    hub.take()
    AutoModelForCausalLM.from_pretrained("org/llama", verify=verify, local_files_only=True)
    assert hub.take() == []


def test_a_flipped_bit_in_a_shard_that_arrives_while_loading(hub: Any) -> None:
    hub.repo("org/llama", sharded())
    hub.fault = flipped("model-00002-of-00003.safetensors")
    with pytest.raises(IntegrityError, match=r"'model-00002-of-00003\.safetensors'.*hash differs"):
        AutoModelForCausalLM.from_pretrained("org/llama", verify="sha256")
    hub.fault = None
    model = AutoModelForCausalLM.from_pretrained("org/llama", verify="sha256")
    wanted = tiny.model("llama").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_a_configuration_is_verified_too(hub: Any, tmp_path: Path) -> None:
    hub.repo("org/llama", model_files())
    hub.fault = flipped("config.json")
    for door in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(IntegrityError, match=r"'config\.json'"):
            door.from_pretrained("org/llama", verify="sha256")


def test_small_files_have_hashes_of_git(hub: Any) -> None:
    content = b'{"a": 1}'
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    repo = hub.repo("org/git", {"config.json": content})

    def as_git(handler: Any) -> bool:
        handler._file(content, ETag=f'"{git}"', X_Repo_Commit=repo.refs["main"])
        return True

    hub.fault = as_git
    path = resolve_source("org/git", verify="sha256").require("config.json")
    assert Path(os.path.realpath(path)).name == git
    Path(os.path.realpath(path)).write_bytes(b'{"a": 2}')
    with pytest.raises(IntegrityError, match="hash differs"):
        resolve_source("org/git", verify="sha256", local_files_only=True).require("config.json")


def test_a_cache_that_does_not_know_the_hash(hub: Any, repo: Any) -> None:
    path = resolve_source("org/name").require("model.safetensors")
    path.unlink()
    path.write_bytes(FILES["model.safetensors"])  # as on systems without links
    with pytest.raises(IntegrityError, match="cannot be verified"):
        resolve_source("org/name", verify="sha256").require("model.safetensors")
    assert path.exists()


def test_what_cannot_be_verified(hub: Any, repo: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="is a directory"):
        resolve_source(tmp_path, verify="sha256")
    for verify in ("md5", "yes", 1, 0.0):
        with pytest.raises(ArgumentError, match=r"verify=.*'sha256'"):
            resolve_source("org/name", verify=verify)
    assert hub.take() == []


# Revisions


def test_a_short_revision_is_pinned_once(hub: Any, repo: Any) -> None:
    commit = repo.refs["main"]
    repo.commit({"config.json": b"[]", "model.safetensors": b"later"})
    source = resolve_source("org/name", revision=commit[:8])
    assert source.commit == commit
    source.require("model.safetensors")
    assert {line.split("/")[4] for line in hub.take() if "resolve" in line} == {commit[:8], commit}
    assert resolve_source("org/name", revision=commit[:8], local_files_only=True).commit == commit
    assert resolve_source("org/name", revision=commit[:12], local_files_only=True).commit == commit  # never asked for
    assert hub.take() == []
    with pytest.raises(OfflineError):
        resolve_source("org/name", revision="0123456", local_files_only=True)
    with pytest.raises(NotFoundError, match="no such branch"):
        resolve_source("org/name", revision="0123456")


def test_an_ambiguous_short_revision(hub: Any, repo: Any, tmp_path: Path) -> None:
    path = resolve_source("org/name").require("config.json")
    twin = path.parent.with_name(str(repo.refs["main"])[:-1] + ("0" if repo.refs["main"][-1] != "0" else "1"))
    twin.mkdir()
    with pytest.raises(NotFoundError, match="begins 2 commits"):
        resolve_source("org/name", revision=repo.refs["main"][:8], local_files_only=True)


# Transfers


def test_a_broken_transfer_is_resumed(hub: Any, repo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where it broke; the whole file is not asked for again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # it resumes after whole chunks
    ranges: list[str | None] = []

    def breaks(handler: Any) -> bool:
        if handler.command != "GET" or not handler.path.endswith("model.safetensors"):
            return False
        ranges.append(handler.headers.get("Range"))
        if len(ranges) > 1:
            return False
        handler.answer(200, FILES["model.safetensors"][:3000], Content_Length="5000", ETag='"1"')
        handler.close_connection = True
        return True

    hub.fault = breaks
    content = resolve_source("org/name").require("model.safetensors").read_bytes()
    assert content == FILES["model.safetensors"]
    assert ranges == [None, "bytes=3000-"]


def test_a_load_that_was_cut_off_keeps_its_whole_shards(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    names = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    hub.repo("org/shards", {"config.json": b"{}", **{name: name.encode() * 100 for name in names}})
    resolve_source("org/shards").fetch(names[:2])
    hub.fault = lambda handler: names[2] in handler.path and (handler.error(503) or True)
    source = resolve_source("org/shards")
    with pytest.raises(HubError):
        source.fetch(names)
    hub.fault = None
    hub.take()
    paths = resolve_source("org/shards").fetch(names)
    assert [path.read_bytes() for path in paths] == [name.encode() * 100 for name in names]
    asked = [line for line in hub.take() if line.startswith("GET")]
    assert not [line for line in asked if names[0] in line or names[1] in line]


def test_variant_and_subfolder_of_a_repository(hub: Any) -> None:
    files = model_files()
    inside = {"sub/config.json": files["config.json"], "sub/model.fp16.safetensors": files["model.safetensors"]}
    hub.repo("org/nested", {**inside, "README.md": b""})
    model = AutoModelForCausalLM.from_pretrained("org/nested", subfolder="sub", variant="fp16")
    assert model.load_report.fits
    with pytest.raises(NotFoundError):
        AutoModelForCausalLM.from_pretrained("org/nested", variant="fp16")


# The environment


def test_home_and_token_of_a_fresh_process(hub: Any, tmp_path: Path) -> None:
    """HF_HOME holds the cache and the token; the token is used and never shown."""
    hub.repo("org/private", FILES, token=TOKEN)
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "from loadstone.loading.source import resolve_source as r\n"
        "s = r('org/private'); print(s.require('config.json'))\n"
    )
    other = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env = {**other, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], env={**env, **more}, capture_output=True, text=True)

    assert "NotFoundError" in run().stderr
    (home / "token").write_text(TOKEN)
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run(**more)
        assert done.stdout.startswith(str(home / "hub")), done.stderr
        assert TOKEN not in done.stdout + done.stderr
    (home / "token").unlink()
    done = run(HF_TOKEN="hf_wrongwrongwrong", HF_HUB_CACHE=str(tmp_path / "other"))
    assert "NotFoundError" in done.stderr
    assert "hf_wrongwrongwrong" not in done.stderr
