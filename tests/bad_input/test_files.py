"""Something else where a file of a checkpoint should be."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_input.inputs import Case, case, config, good, good_sharded, put, refused, table, watched, write

from loadstone import AutoModelForCausalLM
from loadstone.errors import FormatError, NotFoundError, PathError, UnsafeFormatError

FILE = "model.safetensors"


def instead(make: Callable[[Path], object], name: str = FILE) -> Callable[[Path], object]:
    """Take a file away and let ``make`` put something else there."""

    def spoil(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return spoil


def moved_out(name: str = FILE) -> Callable[[Path], object]:
    """The file itself outside of the directory, and a symbolic link to it."""

    def spoil(directory: Path) -> None:
        outside = directory.parent / "outside"
        outside.mkdir()
        (directory / name).rename(outside / name)
        (directory / name).symlink_to(outside / name)

    return spoil


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


class Evil:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def only_pickles(directory: Path) -> None:
    (directory / FILE).unlink()
    with open(directory / "pytorch_model.bin", "wb") as file:
        pickle.dump(Evil(directory / "ran"), file)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(Path("ran"))))
    return buffer.getvalue()


def saved_by_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, buffer)
    return buffer.getvalue()


CASES = {
    "a web page": case(
        write(FILE, b"<!DOCTYPE html><html><title>Log in</title></html>"), FormatError, "web page", "fetch"
    ),
    "a web page in capitals, after spaces": case(write(FILE, b"\n\n <HTML>\n" + bytes(99)), FormatError, "web page"),
    "a git-lfs pointer": case(
        write(FILE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), FormatError, "git lfs pull"
    ),
    "a zip archive": case(write(FILE, zipped()), FormatError, "zip archive"),
    "a file of torch.save": case(write(FILE, saved_by_torch()), FormatError, "zip archive"),
    "a pickle": case(write(FILE, pickle.dumps(Evil(Path("ran")))), FormatError, "a pickle"),
    "a GGUF file": case(write(FILE, b"GGUF\x03\0\0\0" + bytes(64)), FormatError, "GGUF"),
    "a gzip archive": case(write(FILE, gzip.compress(bytes(999))), FormatError, "gzip"),
    "an HDF5 file": case(write(FILE, b"\x89HDF\r\n\x1a\n" + bytes(64)), FormatError, "HDF5"),
    "JSON": case(write(FILE, {"weight": [1, 2, 3]}), FormatError, "JSON text"),
    "random bytes": case(write(FILE, bytes(range(7, 256)) * 9), FormatError, FILE),
    "a directory": case(instead(Path.mkdir), PathError, FILE, "a directory"),
    "a pipe": case(instead(os.mkfifo), PathError, FILE, "not a regular file"),
    "a socket": case(instead(listening), PathError, FILE, "not a regular file"),
    "a link to a device": case(instead(lambda path: path.symlink_to("/dev/zero")), PathError, FILE, "/dev/zero"),
    "a link to nothing": case(instead(lambda path: path.symlink_to("gone")), PathError, FILE, "missing"),
    "a link to itself": case(instead(lambda path: path.symlink_to(FILE)), PathError, FILE, "symbolic link"),
    "a link out of the directory": case(moved_out(), PathError, FILE, "a symbolic link out of it"),
    "a configuration that is a directory": case(instead(Path.mkdir, "config.json"), PathError, "config.json"),
    "a configuration that is a pipe": case(instead(os.mkfifo, "config.json"), PathError, "config.json"),
    "a configuration that links out": case(moved_out("config.json"), PathError, "config.json", "out of it"),
    "generation options that link out": case(moved_out("generation_config.json"), PathError, "generation_config.json"),
    "only pickled weights": case(only_pickles, UnsafeFormatError, "pytorch_model.bin", "can run code"),
    "no weights at all": case(lambda place: (place / FILE).unlink(), NotFoundError, "no weights", FILE),
    "no configuration": case(lambda place: (place / "config.json").unlink(), NotFoundError, "no file 'config.json'"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return put(tmp_path / "checkpoint", good())


@table(CASES)
def test_refused(directory: Path, row: Case) -> None:
    refused(directory, row, AutoModelForCausalLM.from_pretrained)


def test_files_given_by_name_are_refused_without_blocking(tmp_path: Path) -> None:
    """Where a file's own name is given, a pipe, a directory and a missing one have the same errors."""
    from loadstone import AutoConfig

    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(PathError):
        AutoConfig.from_pretrained(tmp_path / "pipe.json")
    with pytest.raises(NotFoundError):
        AutoConfig.from_pretrained(tmp_path / "none.json")
    with pytest.raises(PathError):
        AutoConfig.from_pretrained("/dev/null")


def test_a_pickle_beside_good_weights_is_never_opened(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(directory / "ran")))
    os.mkfifo(directory / "training_args.bin")  # opening it would block for ever
    with watched(directory) as seen:
        model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.load_report.fits
    assert seen == []
    assert not (directory / "ran").exists()


def test_links_inside_the_directory_are_followed(tmp_path: Path) -> None:
    directory = put(tmp_path / "checkpoint", good_sharded())
    for name in [path.name for path in directory.iterdir()]:
        (directory / "blobs").mkdir(exist_ok=True)
        (directory / name).rename(directory / "blobs" / name)
        (directory / name).symlink_to(Path("blobs") / name)
    assert AutoModelForCausalLM.from_pretrained(directory).load_report.fits


def test_weights_of_another_model_are_not_made_up(directory: Path) -> None:
    """Nothing in the files fits: what came out would be random from end to end."""
    from loadstone.errors import MissingWeightsError

    row = case(config(model_type="gpt2", n_embd=32, n_head=4), MissingWeightsError, "1 of 28 weights", "wpe")
    refused(directory, row, AutoModelForCausalLM.from_pretrained)
