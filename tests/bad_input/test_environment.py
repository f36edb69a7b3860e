"""Disks that are full or read-only, processes that die or meet, files that change: nothing is lost or mixed."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input.inputs import good, good_sharded, put, snapshot
from bad_input.processes import said, start, unprivileged

from loadstone import AutoModelForCausalLM, LlamaConfig
from loadstone.errors import HubError, IntegrityError, OfflineError, WriteError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and signals of Linux")
LOAD = """
import sys, hashlib
from loadstone import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("org/name", progress=False)
total = hashlib.sha256()
for name, tensor in sorted(model.state_dict().items()):
    total.update(name.encode() + tensor.numpy().tobytes())
print(total.hexdigest())
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return put(tmp_path / "checkpoint", good())


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """The system refuses to let a file grow over so many bytes, as a full disk or a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def opened(directory: Path) -> Path:
    """A directory that any user can read but not write."""
    for path in (directory, *directory.parents):
        if path.name.startswith("pytest-"):
            path.chmod(path.stat().st_mode | 0o055)
    for parent in list(directory.parents)[:3]:
        if os.stat(parent).st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return directory


def digest(directory: Path) -> str:
    import hashlib

    total = hashlib.sha256()
    for name, tensor in sorted(AutoModelForCausalLM.from_pretrained(directory).state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


# The Hub's cache


def environment(hub: Any, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}  # fmt: skip


def test_two_processes_downloading_at_once(hub: Any, tmp_path: Path) -> None:
    """Both get the whole model; the weights come over the network once."""
    hub.repo("org/name", good_sharded())
    processes = [start(LOAD, **environment(hub, tmp_path)) for _ in range(2)]
    expected = digest(put(tmp_path / "whole", good_sharded()))
    assert [said(process) for process in processes] == [expected] * 2
    gets = [request for request in hub.take() if request.startswith("GET") and request.endswith(".safetensors")]
    assert len(gets) == 2
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_killed_while_downloading(hub: Any, tmp_path: Path) -> None:
    """What was cut off is no file of the cache; the next process loads the whole model."""
    files = {**good(), "model.safetensors": good()["model.safetensors"]}
    hub.repo("org/name", files)
    stalled = threading.Event()

    def stall(handler: Any) -> bool:
        if handler.command != "GET" or not handler.path.endswith("model.safetensors"):
            return False
        data = files["model.safetensors"]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        stalled.set()
        killed.wait(60)
        handler.close_connection = True
        return True

    killed = threading.Event()
    hub.fault = stall
    process = start(LOAD, **environment(hub, tmp_path))
    assert stalled.wait(60)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed.set()
    cache = tmp_path / "cache"
    assert not list(cache.rglob("snapshots/*/model.safetensors"))
    hub.fault = None
    assert said(start(LOAD, **environment(hub, tmp_path))) == digest(put(tmp_path / "whole", good()))


def test_a_disk_that_fills_while_downloading(hub: Any, tmp_path: Path) -> None:
    hub.repo("org/name", good())
    with small_files(20_000), pytest.raises(WriteError, match="cannot be put into the cache") as caught:
        AutoModelForCausalLM.from_pretrained("org/name")
    assert caught.value.errno == errno.EFBIG
    assert not list((tmp_path / "hub-cache").rglob("snapshots/*/model.safetensors"))
    assert AutoModelForCausalLM.from_pretrained("org/name").load_report.fits


def test_a_cache_that_is_read_only(hub: Any, tmp_path: Path) -> None:
    """What is cached loads; what is not is an error that names the cache, and nothing waits."""
    hub.repo("org/name", good())
    hub.repo("org/other", good())
    AutoModelForCausalLM.from_pretrained("org/name")
    opened(tmp_path / "hub-cache")

    def load(name: str) -> Callable[[], bool]:
        return lambda: AutoModelForCausalLM.from_pretrained(name, progress=False).load_report.fits

    assert unprivileged(load("org/name")) is True
    answer = unprivileged(load("org/other"))
    assert answer["known"], answer
    assert str(tmp_path / "hub-cache") in answer["text"]


def test_a_damaged_reference_of_the_cache(hub: Any, tmp_path: Path) -> None:
    hub.repo("org/name", good())
    AutoModelForCausalLM.from_pretrained("org/name")
    (reference,) = (tmp_path / "hub-cache").rglob("refs/main")
    for content in (b"../../../etc", b"", b"\xff\xfe", b"0" * 39):
        reference.write_bytes(content)
        with pytest.raises(HubError, match=r"damaged|not in the cache"):
            AutoModelForCausalLM.from_pretrained("org/name", local_files_only=True)
    reference.unlink()
    with pytest.raises(OfflineError):
        AutoModelForCausalLM.from_pretrained("org/name", local_files_only=True)


def test_a_cached_file_that_is_cut_off(hub: Any, tmp_path: Path) -> None:
    from loadstone.errors import FormatError

    hub.repo("org/name", good())
    AutoModelForCausalLM.from_pretrained("org/name")
    (link,) = (tmp_path / "hub-cache").rglob("snapshots/*/model.safetensors")
    blob = link.resolve()
    blob.write_bytes(good()["model.safetensors"][:-100])
    with pytest.raises(FormatError, match="truncated"):
        AutoModelForCausalLM.from_pretrained("org/name", local_files_only=True)
    blob.unlink()
    with pytest.raises((HubError, OSError)) as caught:
        AutoModelForCausalLM.from_pretrained("org/name", local_files_only=True)
    assert "model.safetensors" in str(caught.value)


# Saving


def test_a_target_that_is_read_only(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    opened(directory)
    before = snapshot(directory)

    def save() -> str:
        model.save_pretrained(directory)
        return "saved"

    answer = unprivileged(save)
    if answer == "saved":
        pytest.skip("this file system does not honour permissions")
    assert answer["error"] == "WriteError"
    assert answer["errno"] in (errno.EACCES, errno.EROFS)
    assert str(directory) in answer["text"]
    assert snapshot(directory) == before


def test_a_configuration_where_nothing_may_be_written(directory: Path) -> None:
    opened(directory)
    before = snapshot(directory)
    answer = unprivileged(lambda: LlamaConfig().save_pretrained(directory))
    assert answer["error"] == "WriteError"
    assert "config.json" in answer["text"]
    assert snapshot(directory) == before


@pytest.mark.parametrize("limit", [0, 100, 3000, 60_000])
def test_a_disk_that_fills_while_saving(directory: Path, limit: int) -> None:
    """Whatever writes: the model, an adapter, a quantized copy, a configuration."""
    from loadstone import LoraConfig
    from loadstone.loading.source import resolve_source
    from loadstone.models.llama import LlamaForCausalLM
    from loadstone.models.transcode import quantize_checkpoint

    model = AutoModelForCausalLM.from_pretrained(directory)
    adapted = AutoModelForCausalLM.from_pretrained(directory)
    adapted.add_adapter(LoraConfig(target_modules="all-linear", r=32))
    target, adapter = directory.parent / "quantized", directory.parent / "adapter"
    config = {"quant_method": "weight_only", "bits": 8}

    def quantize() -> None:
        quantize_checkpoint(LlamaForCausalLM, resolve_source(directory), target, config)

    quantize()
    adapted.save_pretrained(adapter)
    before = snapshot(directory.parent)
    writers: list[Callable[[], object]] = [
        lambda: model.save_pretrained(directory),
        lambda: adapted.save_adapter(adapter),
    ]
    if limit < 20_000:
        writers.append(quantize)
    if limit < 100:
        writers += [
            lambda: model.config.save_pretrained(directory),
            lambda: model.generation_config.save_pretrained(directory),
        ]
    for writer in writers:
        with small_files(limit), pytest.raises(WriteError) as caught:
            writer()
        assert caught.value.errno == errno.EFBIG
        assert snapshot(directory.parent) == before


SAVE = """
import sys, torch
from loadstone.loading.save import save_checkpoint
number = float(sys.argv[2])
state = {name: torch.full((500,), number) for name in "abcd"}
for limit in (2000, 4000, 100_000, 2000) * 6:
    texts = dict.fromkeys(("config.json", "generation_config.json"), sys.argv[2])
    save_checkpoint(sys.argv[1], state, texts=texts, max_shard_size=limit)
"""


def test_processes_saving_to_one_directory_at_once(tmp_path: Path) -> None:
    """A reader finds a whole checkpoint of one of them at the end, and nothing is left beside it."""
    target = tmp_path / "model"
    processes = [start(SAVE, str(target), str(number)) for number in range(2)]
    for process in processes:
        said(process)
    assert os.listdir(tmp_path) == ["model"]
    numbers = {(target / name).read_text() for name in ("config.json", "generation_config.json")}
    assert len(numbers) == 1
    from loadstone.loading.checkpoint import open_checkpoint
    from loadstone.loading.files import Files
    from loadstone.loading.source import resolve_source

    checkpoint = open_checkpoint(resolve_source(target))
    files = Files(checkpoint)
    assert sorted(checkpoint.entries) == list("abcd")
    assert {float(value) for entry in checkpoint.entries.values() for value in files.view(entry)} == {float(*numbers)}


# Files that change, and interrupts


def test_saving_over_the_files_a_model_is_mapped_from(directory: Path) -> None:
    """Replaced by renaming, the old file lives on under the model that is mapped from it."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.save_pretrained(directory)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert not any(tensor.any() for tensor in again.state_dict().values())


@pytest.mark.parametrize("change", ["cut", "replaced", "gone", "touched"])
def test_a_file_that_changes_after_its_header_was_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from loadstone.models import pretrained

    file = directory / "model.safetensors"
    plain = pretrained.build_on_meta

    def build(*arguments: Any) -> Any:
        data = file.read_bytes()
        if change == "cut":
            os.truncate(file, len(data) - 400)
        elif change == "replaced":
            (directory / "new").write_bytes(data)
            os.replace(directory / "new", file)
        elif change == "gone":
            file.unlink()
        else:
            os.utime(file, ns=(1, 1))
        return plain(*arguments)

    monkeypatch.setattr(pretrained, "build_on_meta", build)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(directory, dtype="float16")


@pytest.mark.parametrize("step", ["config", "headers", "build", "stream", "buffers"])
def test_an_interrupt_anywhere_in_a_load(directory: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The interrupt comes out, no thread is left, and the next load is right."""
    from loadstone.loading import checkpoint, load
    from loadstone.models import configuration, pretrained

    place: Any = {
        "config": (configuration, "read_json_file"),
        "headers": (checkpoint, "read_header"),
        "build": (pretrained, "build_on_meta"),
        "stream": (load, "stream"),
        "buffers": (load, "recompute_buffers"),
    }[step]

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    before, threads = snapshot(directory), threading.active_count()
    expected = digest(directory)
    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            AutoModelForCausalLM.from_pretrained(directory)
    assert threading.active_count() == threads
    assert snapshot(directory) == before
    assert digest(directory) == expected


def test_a_directory_that_goes_while_it_is_listed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.errors import LoadstoneError
    from loadstone.loading.source import LocalSource

    plain = LocalSource.find

    def find(self: LocalSource, name: str) -> Path | None:
        path = plain(self, name)
        if name == "model.safetensors":
            for file in directory.iterdir():
                file.unlink()
            directory.rmdir()
        return path

    monkeypatch.setattr(LocalSource, "find", find)
    with pytest.raises(LoadstoneError):
        AutoModelForCausalLM.from_pretrained(directory)


def test_the_facts_of_the_system_are_kept() -> None:
    told = WriteError.of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"), "nothing was saved")
    assert isinstance(told, OSError)
    assert (told.errno, told.filename) == (errno.ENOSPC, "/x")
    assert json.dumps(str(told)) == '"nothing was saved: No space left on device"'
