"""Local directories: what is a path, what stays inside, and what the messages say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.errors import ArgumentError, HubError, MissingWeightsError, NotFoundError, PathError, RepoIdError
from loadstone.loading.source import check_filename, resolve_source


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "llama-small"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"w")
    (directory / "sub" / "config.json").write_text("[]")
    return directory


def test_finds_files_of_a_directory(model: Path) -> None:
    for given_as in (model, str(model), f"{model}/"):
        source = resolve_source(given_as)
        assert source.name == str(given_as)
        assert source.commit is None
        assert source.find("config.json") == model / "config.json"
        assert source.find("absent") is None
        assert source.find("sub/config.json") == model / "sub" / "config.json"
        assert source.listing() == ["config.json", "model.safetensors", "sub"]
    assert resolve_source(source) is source


def test_directory_wins_over_a_repository_of_that_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    source = resolve_source("llama-small")
    monkeypatch.chdir("/")
    assert source.require("config.json").read_text() == "{}"  # and stays the same place


def test_home_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve_source("~/llama-small").find("config.json") is not None
    with pytest.raises(NotFoundError, match=r"no such directory: '~/llama-smal'.*did you mean 'llama-small'"):
        resolve_source("~/llama-smal")


def test_subfolder(model: Path) -> None:
    assert resolve_source(model, subfolder="sub").require("config.json").read_text() == "[]"
    assert resolve_source(model, subfolder="sub/").find("model.safetensors") is None
    with pytest.raises(NotFoundError, match=r"no subfolder 'subb'; did you mean 'sub'"):
        resolve_source(model, subfolder="subb")
    for bad in ("..", "../llama-small", "/etc", "a/../..", "sub\\x"):
        with pytest.raises(PathError, match="subfolder="):
            resolve_source(model, subfolder=bad)


@pytest.mark.parametrize(
    "name",
    ["./llama-smal", "../nope", "/no/such/place", "a/b/c", "nope/", "x/model.safetensors", "C:\\models\\x", "~no/x"],
)
def test_paths_never_reach_the_hub(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    with pytest.raises(NotFoundError, match="no such directory") as caught:
        resolve_source(name)
    assert repr(name) in str(caught.value)


def test_path_objects_are_never_repositories(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such directory"):
        resolve_source(Path("org/name"))


def test_nearest_directory_is_named(model: Path) -> None:
    with pytest.raises(NotFoundError, match="did you mean 'llama-small'"):
        resolve_source(str(model) + "l")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_files_are_refused_with_advice(model: Path, file: str) -> None:
    with pytest.raises(PathError, match="is a file; pass the directory that holds the checkpoint") as caught:
        resolve_source(model / file)
    assert repr(str(model)) in str(caught.value)


def test_require_says_what_is_there(model: Path) -> None:
    with pytest.raises(
        NotFoundError, match=r"no file 'confg\.json'; did you mean 'config\.json'\? \(it holds"
    ) as caught:
        resolve_source(model).require("confg.json")
    assert isinstance(caught.value, (FileNotFoundError, HubError))


def test_fetch_names_all_missing_shards(model: Path) -> None:
    source = resolve_source(model)
    assert source.fetch(["model.safetensors", "config.json"]) == [model / "model.safetensors", model / "config.json"]
    with pytest.raises(MissingWeightsError, match=r"lacks 2 weight file\(s\): 'a', 'b'"):
        source.fetch(["a", "config.json", "b"])


def test_wrong_types() -> None:
    for wrong in (None, 3, b"x", ["a"]):
        with pytest.raises((ArgumentError, RepoIdError)):
            resolve_source(wrong)  # type: ignore[arg-type]
    for empty in ("", "  ", "a\0b"):
        with pytest.raises(RepoIdError):
            resolve_source(empty)


def test_links_must_stay_inside(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"o")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f").write_bytes(b"e")
    (model / "out.safetensors").symlink_to(outside)
    (model / "gone.safetensors").symlink_to(tmp_path / "gone")
    (model / "loop.safetensors").symlink_to(model / "loop.safetensors")
    (model / "in.safetensors").symlink_to("model.safetensors")
    (model / "dir").symlink_to(tmp_path / "elsewhere")
    source = resolve_source(model)
    assert source.find("in.safetensors") == model / "in.safetensors"
    for name in ("out.safetensors", "gone.safetensors", "loop.safetensors", "dir/f"):
        with pytest.raises(PathError, match="symbolic link"):
            source.find(name)
    with pytest.raises(PathError, match="symbolic link out"):
        resolve_source(model, subfolder="dir")


def test_the_directory_itself_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    assert resolve_source(tmp_path / "link").require("config.json").read_text() == "{}"


def test_links_of_a_hub_cache_lead_to_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "secret").write_text("s")
    (repo / "blobs" / "abc").write_text("blob")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/abc")
    (snapshot / "bad.json").symlink_to("../../secret")
    assert resolve_source(snapshot).require("config.json").read_text() == "blob"
    assert resolve_source(snapshot).require("sub/config.json").read_text() == "blob"
    assert resolve_source(snapshot, subfolder="sub").require("config.json").read_text() == "blob"
    with pytest.raises(PathError, match="symbolic link out"):
        resolve_source(snapshot).find("bad.json")


def test_only_regular_files(model: Path) -> None:
    os.mkfifo(model / "pipe.safetensors")
    source = resolve_source(model)
    with pytest.raises(PathError, match="not a regular file"):
        source.find("pipe.safetensors")
    with pytest.raises(PathError, match="is a directory"):
        source.find("sub")


@given(
    st.lists(st.sampled_from(["a", "b.json", "..", ".", "", "c:", "\\", "\0", "..a", "a.."]), max_size=5).map("/".join)
)
def test_accepted_names_are_inside_and_plain(name: str) -> None:
    try:
        check_filename(name)
    except PathError:
        return
    root = Path("/root/of/checkpoint")
    assert os.path.normpath(root / name) == str(root / name)
    assert (root / name).is_relative_to(root)
    assert root / name != root


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "C:\\x", "c:x", "\\\\host\\share", "", "a\0", "a//b", "a/./b", None, 3]
)
def test_refused_names(model: Path, name: object) -> None:
    with pytest.raises(PathError):
        resolve_source(model).find(name)  # type: ignore[arg-type]


def test_local_directories_do_not_import_huggingface_hub(model: Path) -> None:
    code = (
        "import sys; from loadstone.loading.source import resolve_source as r; "
        f"r({str(model)!r}).require('config.json'); print('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
