"""Files read instead of mapped: by request, on far file systems, and what happens when the reading fails."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import examples

from loadstone import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from loadstone.errors import ArgumentError, IntegrityError, ReadError
from loadstone.loading import arena, files, filesystem, fill, reading
from loadstone.loading.load import load_into

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MOUNTS = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:25 / /proc rw - proc proc rw
31 22 0:40 / {far} rw,nosuid shared:2 master:1 - {kind} server:/export rw
"""


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the test's directory look like a mount of a file system of some type."""

    def mount(kind: str, place: Path = tmp_path) -> None:
        table = tmp_path / "mountinfo"
        table.write_text(MOUNTS.format(far=str(place).replace(" ", "\\040"), kind=kind))
        monkeypatch.setattr(filesystem, "MOUNTS", table)

    return mount


def load_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loadstone")]


def is_mapped(directory: Path) -> bool:
    return str(directory.resolve()) in Path("/proc/self/maps").read_text()


# Read


@given(st.data())
@examples(40)
def test_any_tensors_are_read_bit_for_bit(tmp_path: Path, data: st.DataObject) -> None:
    shapes = st.lists(st.integers(0, 9), max_size=3)
    dtypes = st.sampled_from([*FLOATS, torch.int64, torch.uint8, torch.bool])
    spec = data.draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=6))
    target = data.draw(st.sampled_from([None, *FLOATS]))
    tensors = {f"t{number}": (torch.randn(shape) * 4).to(dtype) for number, (shape, dtype) in enumerate(spec)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill, "PIECE", data.draw(st.integers(8, 400)))
        model = toy.Bag(tensors, target)
        report = load_into(model, toy.opened(tmp_path), strict=True, disable_mmap=True)
    for name, tensor in tensors.items():
        loaded = getattr(model, name).detach()
        wanted = tensor.to(target) if target is not None and tensor.is_floating_point() else tensor
        assert loaded.dtype == wanted.dtype
        assert torch.equal(loaded, wanted)
        assert loaded.untyped_storage().nbytes() == wanted.nbytes
    assert (report.bytes_mapped, report.bytes_copied) == (0, sum(tensor.nbytes for tensor in tensors.values()))


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_mapped_on_request(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**toy.weights(), "big": torch.randn(3_000_000)}
    toy.save(tmp_path, tensors, shards=3)
    seen: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        original = files.Files.read
        patch.setattr(files.Files, "read", lambda *args: (seen.append(is_mapped(tmp_path)), original(*args))[1])
        model, report = toy.load(tmp_path, toy.meta(dtype), disable_mmap=True)
    assert seen
    assert not any(seen)
    assert not is_mapped(tmp_path)
    assert all(torch.equal(value, tensors[name].to(dtype)) for name, value in model.state_dict().items())
    assert report.not_mapped == "disable_mmap=True"
    assert "read, not mapped" in str(report)
    model, report = toy.load(tmp_path, disable_mmap=False)
    assert is_mapped(tmp_path)
    assert report.not_mapped is None


def test_large_tensors_lie_in_huge_pages_and_survive_their_file(tmp_path: Path) -> None:
    tensors = {"big": torch.randn(2_500_001), "small": torch.randn(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = toy.Bag(tensors)
    load_into(model, toy.opened(tmp_path), disable_mmap=True)
    assert model.big.data_ptr() % arena.HUGE < arena.PAGE
    os.truncate(tmp_path / "model.safetensors", 10)
    assert torch.equal(model.big.detach(), tensors["big"])
    model.small.data.zero_()


def test_from_pretrained_takes_the_argument(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4)).save_pretrained(tmp_path)  # fmt: skip
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path, disable_mmap=True),
                  LlamaForCausalLM.from_pretrained(tmp_path, disable_mmap=True)):  # fmt: skip
        assert model.load_report.not_mapped == "disable_mmap=True"
        assert model.load_report.to_dict()["not_mapped"] == "disable_mmap=True"
        assert all(torch.equal(value, mapped.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", ["yes", 1, 0.0, [True]])
def test_what_is_no_choice(tmp_path: Path, value: Any) -> None:
    toy.save(tmp_path, toy.weights())
    with pytest.raises(ArgumentError, match="disable_mmap"):
        toy.load(tmp_path, disable_mmap=value)


# Chosen by itself


@pytest.mark.parametrize("kind", ["nfs4", "fuse.hf-mount", "cifs", "fuse", "9p", "lustre"])
def test_far_file_systems_are_read(tmp_path: Path, far: Any, kind: str) -> None:
    toy.save(tmp_path / "model", toy.weights(), shards=2)
    far(kind)
    model, report = toy.load(tmp_path / "model")
    assert toy.same(model, toy.weights())
    assert report.bytes_mapped == 0
    assert kind in str(report.not_mapped)
    _, report = toy.load(tmp_path / "model", disable_mmap=False)
    assert report.bytes_copied == 0


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fusectl"])
def test_local_file_systems_are_mapped(tmp_path: Path, far: Any, kind: str) -> None:
    toy.save(tmp_path, toy.weights())
    far(kind)
    _, report = toy.load(tmp_path)
    assert (report.bytes_copied, report.not_mapped) == (0, None)


def test_the_file_itself_counts_not_the_link_to_it(tmp_path: Path, far: Any) -> None:
    """As in the Hub's cache, whose snapshots link to blobs; a mount point whose name begins like another's is none."""
    far("nfs", tmp_path / "far away")
    (tmp_path / "far away").mkdir()
    (tmp_path / "far away and more").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far away" / "blob")
    assert filesystem.far_file_system([link]) == "nfs"
    assert filesystem.far_file_system([tmp_path / "far away and more" / "file"]) is None
    assert filesystem.far_file_system([tmp_path / "here", link]) == "nfs"


@pytest.mark.parametrize("table", [None, "", "garbage - \n1 2\n - nfs x"])
def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str | None) -> None:
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "mountinfo")
    if table is not None:
        (tmp_path / "mountinfo").write_text(table)
    assert filesystem.far_file_system([tmp_path / "file"]) is None


def test_what_does_not_fit_the_memory_stays_mapped(
    tmp_path: Path, far: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    toy.save(tmp_path, toy.weights())
    far("nfs4")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       1 kB\n")
    monkeypatch.setattr(filesystem, "MEMORY", tmp_path / "meminfo")
    _, report = toy.load(tmp_path)
    assert report.bytes_copied == 0
    assert "nfs4" in caplog.text


# What fails


def failing(number: int, after: int) -> Any:
    """A system whose reads fail with an error number from the ``after``-th on."""
    calls = 0
    original = reading._read

    def read(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        return original(*arguments)

    return read


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int) -> None:
    toy.save(tmp_path, toy.weights(), shards=2)
    monkeypatch.setattr(reading, "_read", failing(number, after))
    model = toy.meta()
    with pytest.raises(ReadError, match=r"model-0000\d-of-00002\.safetensors cannot be read") as caught:
        toy.load(tmp_path, model, disable_mmap=True)
    assert caught.value.errno == number
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not load_threads()


@linux
@pytest.mark.parametrize("where", ["cast", "compared", "quantized"])
def test_a_disk_that_fails_under_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What the system says of pages that it cannot bring in; reading them then tells why."""
    toy.save(tmp_path, toy.weights())
    original = files.advise

    def advise(tensor: torch.Tensor, advice: int, **rest: Any) -> int:
        return errno.EFAULT if advice == arena.POPULATE_READ else original(tensor, advice, **rest)

    monkeypatch.setattr(files, "advise", advise)
    monkeypatch.setattr(reading, "_read", failing(errno.EIO, 0))
    model = toy.quantized(load_in_4bit=True) if where == "quantized" else toy.meta(torch.bfloat16)
    with pytest.raises(ReadError, match=r"model\.safetensors cannot be read"):
        toy.load(tmp_path, model, **({"ties": toy.TIES} if where == "compared" else {}))
    assert all(parameter.is_meta for parameter in model.parameters())


@linux
def test_a_mapping_that_fails_though_the_file_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.save(tmp_path, toy.weights())
    monkeypatch.setattr(files, "advise", lambda *_, **__: errno.EFAULT)
    with pytest.raises(ReadError, match="its mapping cannot"):
        toy.load(tmp_path, toy.meta(torch.bfloat16))


@linux
@pytest.mark.parametrize("disable_mmap", [True, False])
@pytest.mark.parametrize("change", ["cut", "replaced", "gone"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, change: str, disable_mmap: bool) -> None:
    """After half of the pieces of a cast; a real truncation, which a touch of the mapping would not survive."""
    tensors = {f"t{number}": torch.randn(400_000) for number in range(6)}
    save_file(tensors, tmp_path / "model.safetensors")
    path, done = tmp_path / "model.safetensors", 0
    original = fill.Filler.__call__

    def call(self: Any, piece: Any) -> int:
        nonlocal done
        done += 1
        if done == 6:
            if change == "cut":
                os.truncate(path, 400_000)
            elif change == "replaced":
                save_file(tensors, tmp_path / "new")
                os.replace(tmp_path / "new", path)
            else:
                path.unlink()
        return original(self, piece)

    model = toy.Bag(tensors, torch.bfloat16)
    checkpoint = toy.opened(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill.Filler, "__call__", call)
        patch.setattr(fill, "PIECE", 400_000)
        with pytest.raises(IntegrityError, match=r"model\.safetensors"):
            load_into(model, checkpoint, disable_mmap=disable_mmap)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not load_threads()


@pytest.mark.parametrize("disable_mmap", [True, False])
def test_another_file_in_its_place_before_it_is_read(tmp_path: Path, disable_mmap: bool) -> None:
    toy.save(tmp_path, toy.weights())
    checkpoint = toy.opened(tmp_path)
    raw = checkpoint.files[0].read_bytes()
    checkpoint.files[0].unlink()
    checkpoint.files[0].write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        load_into(toy.meta(), checkpoint, disable_mmap=disable_mmap)


@pytest.mark.parametrize("disable_mmap", [True, False])
@pytest.mark.parametrize("where", ["here", "in a helper"])
def test_an_interrupt_leaves_model_and_threads_as_they_were(tmp_path: Path, where: str, disable_mmap: bool) -> None:
    tensors = {f"t{number}": torch.randn(100_000) for number in range(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    model, main = toy.Bag(tensors, torch.bfloat16), threading.main_thread()
    before = dict(model.named_parameters())
    original = fill.Filler.__call__

    def call(self: Any, piece: Any) -> int:
        if (threading.current_thread() is main) == (where == "here"):
            raise KeyboardInterrupt
        return original(self, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill, "PIECE", 1000)
        patch.setattr(fill, "threads_for", lambda shares: 3)
        patch.setattr(fill.Filler, "__call__", call)
        with pytest.raises(KeyboardInterrupt):
            load_into(model, toy.opened(tmp_path), disable_mmap=disable_mmap)
    assert dict(model.named_parameters()) == before
    assert not load_threads()
    load_into(model, toy.opened(tmp_path), disable_mmap=disable_mmap)
    assert torch.equal(model.t7, tensors["t7"].bfloat16())


@linux
def test_signals_at_any_moment(tmp_path: Path) -> None:
    """Real ones, in another process: each model is whole or as it was, and no thread is left."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interrupt_driver.py")), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["counts"].keys() == {"mapped", "read", "ring"}
    for way, counts in found["counts"].items():
        assert counts.keys() <= {"loaded", "interrupted", "outside"}, way
        assert counts.get("interrupted", 0) + counts.get("outside", 0) > 0, way
    assert found["torch threads"] == torch.get_num_threads()


@linux
def test_no_file_stays_open(tmp_path: Path) -> None:
    toy.save(tmp_path, toy.weights(), shards=3)

    def opened() -> int:
        gc.collect()
        return sum(1 for fd in Path("/proc/self/fd").iterdir() if os.path.realpath(fd).startswith(str(tmp_path)))

    models = [toy.load(tmp_path, toy.meta(torch.bfloat16), disable_mmap=flag)[0] for flag in (True, False)]
    assert opened() == 0
    assert len(models) == 2


@pytest.mark.parametrize("without", ["posix_fadvise", "preadv", "both"])
def test_systems_without_these_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    for name in ("posix_fadvise", "preadv") if without == "both" else (without,):
        monkeypatch.delattr(os, name, raising=False)
    toy.save(tmp_path, toy.weights(), shards=2)
    for dtype in (torch.float32, torch.float16):
        model, _ = toy.load(tmp_path, toy.meta(dtype), disable_mmap=True)
        assert all(torch.equal(value, toy.weights()[name].to(dtype)) for name, value in model.state_dict().items())


@linux
def test_the_disk_is_asked_for_what_follows_and_only_for_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(10_000)}, tmp_path / "model.safetensors")
    checkpoint = toy.opened(tmp_path)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, size, advice: asked.append((begin, size)))
    monkeypatch.setattr(reading, "_STRIDE", 1000)
    cached = {0, 3000}
    monkeypatch.setattr(reading, "_resident", lambda fd, begin: begin in cached)
    reader = reading.Reader(checkpoint)
    reader.ahead(checkpoint.files[0], 0, 4000)
    reader.ahead(checkpoint.files[0], 500, 5500)
    reader.ahead(checkpoint.files[0], 500, 5000)
    assert [begin for begin, size in asked if size] == [1000, 2000, 4000, 5000]
