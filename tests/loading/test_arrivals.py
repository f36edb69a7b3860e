"""Sharded checkpoints of the Hub: planned before any shard is downloaded, loaded while later shards still are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from loadstone.errors import (
    FormatError,
    GatedError,
    HubError,
    IntegrityError,
    MissingWeightsError,
    NotFoundError,
    ShapeMismatchError,
)
from loadstone.loading import arrivals, fill, glimpse
from loadstone.loading.checkpoint import open_checkpoint
from loadstone.loading.load import load_into
from loadstone.loading.source import resolve_source

SHARDS = 3
PATIENCE = 30.0  # seconds before a test gives up that waits for another thread


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    toy.save(tmp_path / "made", toy.weights(), SHARDS)
    made = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    return {"config.json": b"{}", **made}


@pytest.fixture
def repo(hub: Any, files: dict[str, bytes]) -> Any:
    return hub.repo("org/name", files)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's back-off without the time it takes."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loadstone")]


def load(model: Any = None, **options: Any) -> tuple[Any, Any]:
    model = toy.meta() if model is None else model
    checkpoint = open_checkpoint(resolve_source("org/name", **options), early=True)
    return model, load_into(model, checkpoint, initialize=toy.initialize)


def shard(number: int) -> str:
    return f"model-{number:05d}-of-{SHARDS:05d}.safetensors"


def asked(hub: Any) -> tuple[list[str], list[str]]:
    """Requests for parts of shards, and for shards, since the last call."""
    weights = [request for request in hub.take() if request.partition("?")[0].find("-of-") > 0]
    return [one for one in weights if "bytes=" in one], [one for one in weights if "bytes=" not in one]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_headers_first_then_each_shard_once(hub: Any, repo: Any, dtype: torch.dtype) -> None:
    model, report = load(toy.meta(dtype))
    assert report.fits
    assert all(torch.equal(value, toy.weights()[name].to(dtype)) for name, value in model.state_dict().items())
    requests = [request for request in hub.take() if "-of-" in request]
    assert len(requests) == 3 * SHARDS
    assert all("bytes=0-" in request for request in requests[:SHARDS])
    assert sorted(request.split(" ")[0] for request in requests[SHARDS:]) == ["GET"] * SHARDS + ["HEAD"] * SHARDS
    load()
    assert asked(hub) == ([], [])
    load(revision=repo.refs["main"], local_files_only=True)
    assert hub.take() == []


def test_what_does_not_fit_is_known_before_any_shard_is_downloaded(hub: Any, files: dict[str, bytes]) -> None:
    hub.repo("org/name", files)
    model = toy.meta()
    model.lm_head = torch.nn.Linear(toy.WIDTH, 17, bias=False, device="meta")
    with pytest.raises(ShapeMismatchError, match=r"lm_head\.weight"):
        load(model)
    parts, whole = asked(hub)
    assert (len(parts), whole) == (SHARDS, [])


def test_on_meta_nothing_is_downloaded(hub: Any, repo: Any) -> None:
    model = toy.meta()
    load_into(model, open_checkpoint(resolve_source("org/name"), early=True), device_map="meta")
    assert asked(hub)[1] == []


def test_a_preview_downloads_no_weights(hub: Any, tmp_path: Path) -> None:
    from loadstone import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from loadstone.models.preview import preview

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "made", max_shard_size="20kB")
    hub.repo("org/name", {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()})
    seen = preview(LlamaForCausalLM, resolve_source("org/name"))
    assert not seen.plan.missing
    parts, downloads = asked(hub)
    assert parts
    assert downloads == []
    model = AutoModelForCausalLM.from_pretrained("org/name")
    local = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in local.state_dict().items())
    parts, downloads = asked(hub)
    assert len(downloads) == 2 * len(parts) > 2


@pytest.mark.parametrize("way", ["cast", "read", "quantized"])
def test_a_shard_is_loaded_while_a_later_one_is_not_there(
    hub: Any, repo: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The last shard is not given before something of another one is in its place."""
    begun, held = threading.Event(), []

    def hold(handler: Any) -> bool:
        if handler.command == "GET" and shard(SHARDS) in handler.path and not handler.headers.get("Range"):
            held.append(begun.wait(PATIENCE))
        return False

    def loaded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = original(*arguments)
            begun.set()
            return result

        return call

    hub.fault = hold
    monkeypatch.setattr(fill.Filler, "__call__", loaded(fill.Filler.__call__))
    if way == "quantized":
        from loadstone.loading import quantize

        monkeypatch.setattr(quantize, "make_codes", loaded(quantize.make_codes))
        model, options = toy.quantized(load_in_8bit=True), {}
    else:
        model, options = toy.meta(torch.float16 if way == "cast" else torch.float32), {"disable_mmap": way == "read"}
    load_into(model, open_checkpoint(resolve_source("org/name"), early=True), initialize=toy.initialize, **options)
    assert held == [True]
    assert torch.equal(model.model.scale, toy.weights()["model.scale"].to(model.model.scale.dtype))


# A server that gives no parts


def whole(handler: Any) -> bool:
    if handler.headers.get("Range"):
        del handler.headers["Range"]
    return False


def answered(status: int, body: bytes = b"", **headers: str) -> Callable[[Any], bool]:
    def fault(handler: Any) -> bool:
        if handler.headers.get("Range"):
            handler.answer(status, body, **headers)
            return True
        return False

    return fault


def cut_off(handler: Any) -> bool:
    if handler.headers.get("Range"):
        handler.answer(206, b"x" * 10, Content_Range="bytes 0-99999/100000", Content_Length="100000")
        handler.close_connection = True
        return True
    return False


FAULTS = {
    "ignores ranges": whole,
    "refuses": answered(416),
    "fails": answered(500),
    "forbids": answered(403),
    "gives another part": answered(206, b"x" * 10, Content_Range="bytes 5-14/100"),
    "gives too much": answered(206, b"x" * 200_000, Content_Range=f"bytes 0-{glimpse.FIRST - 1}/900000"),
    "does not say which part": answered(206, b"x" * 10),
    "talks nonsense": answered(206, b"x" * 10, Content_Range="bytes -/?"),
    "gives an empty file": answered(206, b"", Content_Range="bytes 0-0/0"),
    "gives a web page": answered(206, b"<html>", Content_Range="bytes 0-5/6"),
    "is cut off": cut_off,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_parts_all_is_downloaded_first(hub: Any, repo: Any, fault: str) -> None:
    hub.fault = FAULTS[fault]
    model, _ = load()
    assert toy.same(model, toy.weights())
    parts, downloads = asked(hub)
    assert len(parts) == 1, "that it does not give parts costs one request"
    assert len(downloads) == 2 * SHARDS


def test_one_shard_without_parts(hub: Any, repo: Any) -> None:
    hub.fault = lambda handler: shard(2) in handler.path and answered(500)(handler)
    assert toy.same(load()[0], toy.weights())
    parts, downloads = asked(hub)
    assert (len(parts), len(downloads)) == (SHARDS, 2 * SHARDS)


def test_long_headers_take_a_second_request(
    hub: Any, repo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glimpse, "FIRST", 40)
    assert toy.same(load()[0], toy.weights())
    parts, _ = asked(hub)
    assert len(parts) == 2 * SHARDS
    monkeypatch.setattr(glimpse, "MOST", 100)
    source = resolve_source("org/name", cache_dir=str(tmp_path / "another"))
    assert source.expect([shard(1), shard(2)]) is None, "a header too long to be fetched this way"


def test_a_bad_header_is_an_error_before_the_download(hub: Any, files: dict[str, bytes]) -> None:
    raw = files[shard(2)]
    hub.repo("org/name", {**files, shard(2): raw + b"\0" * 9})
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.safetensors.*9 bytes after"):
        load()
    assert asked(hub)[1] == []


def test_absent_shards_are_named(hub: Any, files: dict[str, bytes]) -> None:
    del files[shard(1)], files[shard(2)]
    hub.repo("org/name", files)
    with pytest.raises(MissingWeightsError, match=r"model-00001-of-00003.*model-00002-of-00003"):
        load()


def test_what_is_cached_is_not_asked_for(hub: Any, repo: Any) -> None:
    resolve_source("org/name").fetch([shard(2)])
    hub.take()
    assert toy.same(load()[0], toy.weights())
    assert not [request for request in hub.take() if shard(2) in request]


def test_the_last_shard_that_is_not_there(hub: Any, repo: Any) -> None:
    resolve_source("org/name").fetch([shard(1), shard(2)])
    hub.take()
    assert toy.same(load()[0], toy.weights())
    parts, downloads = asked(hub)
    assert (len(parts), len(downloads)) == (1, 2)


@pytest.fixture
def one_file(hub: Any, tmp_path: Path) -> Any:
    toy.save(tmp_path / "one", toy.weights())
    raw = (tmp_path / "one" / "model.safetensors").read_bytes()
    return hub.repo("org/name", {"config.json": b"{}", "model.safetensors": raw})


def test_a_single_file_is_planned_before_it_is_downloaded(hub: Any, one_file: Any) -> None:
    model = toy.meta()
    model.lm_head = torch.nn.Linear(toy.WIDTH, 17, bias=False, device="meta")
    with pytest.raises(ShapeMismatchError, match=r"lm_head\.weight"):
        load(model)
    path = f"/org/name/resolve/{one_file.refs['main']}/model.safetensors"
    assert [request for request in hub.take() if "model.safe" in request] == [f"GET {path} bytes=0-{glimpse.FIRST - 1}"]
    model, _ = load(toy.meta(torch.bfloat16))
    assert torch.equal(model.model.scale, toy.weights()["model.scale"].bfloat16())
    assert [request for request in hub.take() if "model.safe" in request][1:] == [f"HEAD {path}", f"GET {path}"]
    load()
    assert not [request for request in hub.take() if "model.safe" in request]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_single_file_without_parts(hub: Any, one_file: Any, fault: str) -> None:
    hub.fault = FAULTS[fault]
    assert toy.same(load()[0], toy.weights())


def test_force_download_downloads_all(hub: Any, repo: Any) -> None:
    load()
    hub.take()
    load(force_download=True)
    parts, downloads = asked(hub)
    assert (parts, len(downloads)) == ([], 2 * SHARDS)


def test_the_token_stays_with_the_hub(hub: Any, files: dict[str, bytes]) -> None:
    other = type(hub)()
    try:
        hub.redirect_to = other.url.replace("127.0.0.1", "localhost")
        hub.repo("org/name", files, token="hf_secretsecretsecret")
        assert toy.same(load(token="hf_secretsecretsecret")[0], toy.weights())
        parts = [request for request in other.requests if request.range]
        assert len(parts) == SHARDS
        assert all(request.authorization is None for request in other.requests)
    finally:
        other.close()


def test_parts_go_through_the_proxies(hub: Any, repo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.loading import proxies

    seen: list[Any] = []
    original = glimpse._header
    monkeypatch.setattr(glimpse, "_header", lambda *args: (seen.append(proxies._chosen.get()), original(*args))[1])
    load(proxies={"https": "nowhere:3128"})
    assert seen == [(("https://", "http://nowhere:3128"),)] * (SHARDS + 1), "the single file that is not there, too"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_verified_before_they_are_used(hub: Any, repo: Any, dtype: torch.dtype) -> None:
    """A flipped bit of the weights, which no header tells."""
    assert toy.same(load(verify=True, revision=repo.refs["main"])[0], toy.weights())
    other = dict(repo.commits[repo.refs["main"]])
    repo.commit({**other, "config.json": b"{ }"})

    def fault(handler: Any) -> bool:
        if handler.command == "GET" and shard(2) in handler.path and not handler.headers.get("Range"):
            raw = bytearray(other[shard(2)])
            raw[-1] ^= 1
            handler.answer(200, bytes(raw))
            return True
        return False

    hub.fault = fault
    model = toy.meta(dtype)
    for path in Path(resolve_source("org/name").find("config.json")).parents[2].glob("blobs/*"):
        if path.stat().st_size > 100:
            path.unlink()
    with pytest.raises(IntegrityError, match=shard(2)):
        load(model, verify=True)
    assert all(parameter.is_meta for parameter in model.parameters())


# What fails while shards arrive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, SHARDS])
def test_a_download_that_fails(hub: Any, repo: Any, no_waiting: None, number: int, dtype: torch.dtype) -> None:
    def fault(handler: Any) -> bool:
        if shard(number) in handler.path and not handler.headers.get("Range"):
            handler.answer(503)
            return True
        return False

    hub.fault = fault
    model = toy.meta(dtype)
    before = dict(model.named_parameters())
    with pytest.raises(HubError, match=shard(number)):
        load(model)
    assert dict(model.named_parameters()) == before
    hub.fault = None
    assert load(model)[1].fits


def test_a_shard_that_goes_meanwhile(hub: Any, repo: Any) -> None:
    def fault(handler: Any) -> bool:
        if shard(2) in handler.path and not handler.headers.get("Range"):
            handler.error(404, "EntryNotFound", X_Repo_Commit=repo.refs["main"])
            return True
        return False

    hub.fault = fault
    with pytest.raises((MissingWeightsError, NotFoundError), match=shard(2)):
        load()


def test_another_file_than_its_header_promised(hub: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    """Of the same size, with the same tensors in another order."""
    repo = hub.repo("org/name", files)
    commit = repo.refs["main"]

    def fault(handler: Any) -> bool:
        if handler.command == "HEAD" and shard(2) in handler.path:
            repo.commits[commit][shard(2)] = files[shard(2)].replace(b"layers.1.", b"layers.8.")
        return False

    hub.fault = fault
    with pytest.raises(IntegrityError, match=shard(2)):
        load(toy.meta(torch.bfloat16))


class Dribble:
    """Gives the last shard in small pieces, without end, until it is told to stop or the other side has gone."""

    def __init__(self) -> None:
        self.begun, self.stop, self.gone = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, handler: Any) -> bool:
        if handler.command != "GET" or shard(SHARDS) not in handler.path or handler.headers.get("Range"):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 30))
        handler.end_headers()
        try:
            while not self.stop.wait(0.005):
                handler.wfile.write(b"x" * 2000)
                self.begun.set()
        except OSError:
            self.gone.set()
        handler.close_connection = True
        return True


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_ends_the_downloads(
    hub: Any, repo: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    dribble = Dribble()
    hub.fault = dribble

    def call(self: Any, piece: Any) -> int:
        assert dribble.begun.wait(PATIENCE)
        raise error("injected")

    monkeypatch.setattr(fill.Filler, "__call__", call)
    model = toy.meta(torch.bfloat16)
    try:
        with pytest.raises(error, match="injected"):
            load(model)
        assert dribble.gone.wait(PATIENCE)
    finally:
        dribble.stop.set()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_after_an_interrupt_shards_that_came_are_there(
    hub: Any, repo: Any, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    raw, sent = files[shard(SHARDS)], threading.Event()

    def half(handler: Any) -> bool:
        if handler.command != "GET" or shard(SHARDS) not in handler.path or handler.headers.get("Range"):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        try:
            handler.wfile.write(raw[: len(raw) // 2])
            sent.set()
            for place in range(len(raw) // 2, len(raw) - 1):  # until the other side has gone
                time.sleep(0.01)
                handler.wfile.write(raw[place : place + 1])
        except OSError:
            pass
        handler.close_connection = True
        return True

    def call(self: Any, piece: Any) -> int:
        assert sent.wait(PATIENCE)
        raise KeyboardInterrupt

    hub.fault = half
    with monkeypatch.context() as patch:
        patch.setattr(fill.Filler, "__call__", call)
        with pytest.raises(KeyboardInterrupt):
            load(toy.meta(torch.bfloat16))
    hub.fault = None
    hub.take()
    assert toy.same(load()[0], toy.weights())
    requests = hub.take()
    again = {number for number in range(1, SHARDS + 1) if any(shard(number) in request for request in requests)}
    assert len(again) < SHARDS


@pytest.mark.parametrize("early", [True, False])
def test_one_failure_ends_the_other_downloads(
    hub: Any, repo: Any, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """Also of a load that downloads everything first: nobody waits for gigabytes that are of no use any more."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    dribble = Dribble()

    def fault(handler: Any) -> bool:
        if shard(1) in handler.path and not handler.headers.get("Range"):
            assert dribble.begun.wait(PATIENCE)
            handler.error(403, "GatedRepo")
            return True
        return dribble(handler)

    hub.fault = fault
    try:
        with pytest.raises(GatedError, match=shard(1)):
            load_into(toy.meta(torch.bfloat16), open_checkpoint(resolve_source("org/name"), early=early))
        assert dribble.gone.wait(PATIENCE)
    finally:
        dribble.stop.set()


def test_clients_that_cannot_be_watched(hub: Any, repo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of huggingface_hub have no way to end a download; it then ends by itself."""
    import huggingface_hub

    original = huggingface_hub.hf_hub_download

    def older(repo_id: str, filename: str, *, revision: Any, cache_dir: Any, force_download: bool,
              local_files_only: bool, token: Any) -> str:  # fmt: skip
        return original(repo_id, filename, revision=revision, cache_dir=cache_dir, force_download=force_download,
                        local_files_only=local_files_only, token=token)  # fmt: skip

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", older)
    assert toy.same(load()[0], toy.weights())


def test_arrivals_that_nobody_waits_for_are_not_downloaded(tmp_path: Path) -> None:
    path = tmp_path / "x"
    asked: list[Path] = []

    def download(file: Path, watch: Callable[[], None]) -> Path:
        asked.append(file)
        return file

    with arrivals.Arrivals({path: None}, download) as coming:  # type: ignore[dict-item]
        coming.wait(tmp_path / "another")
    assert asked == []


def test_a_failure_elsewhere_wakes_who_waits(tmp_path: Path) -> None:
    path, free = tmp_path / "x", threading.Event()

    def download(file: Path, watch: Callable[[], None]) -> Path:
        while not free.wait(0.005):
            watch()
        return file

    coming = arrivals.Arrivals({path: None}, download)  # type: ignore[dict-item]
    timer = threading.Timer(0.05, coming.abandon)
    timer.start()
    with pytest.raises(arrivals.Abandoned), coming:
        coming.wait(path)
    timer.join()
