"""Weights of other formats from Hub repositories, which need not hold a config.json or safetensors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from loadstone import AutoConfig, AutoModelForCausalLM, convert_checkpoint
from loadstone.errors import NotFoundError, OfflineError, UnsafeFormatError


def test_a_repository_of_gguf_files(hub: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import gguf_files

    model = tiny.model("llama", **gguf_files.SIZES)
    raw = gguf_files.save(model, tmp_path / "x.gguf", "Q8_0").read_bytes()
    repo = hub.repo("org/name-GGUF", {"name.Q8_0.gguf": raw, "README.md": b"#"})
    here = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf")
    there = AutoModelForCausalLM.from_pretrained("org/name-GGUF", gguf_file="name.Q8_0.gguf")
    assert all(torch.equal(there.state_dict()[name], tensor) for name, tensor in here.state_dict().items())
    with pytest.raises(NotFoundError, match=r"name\.Q8_0\.gguf"):
        AutoModelForCausalLM.from_pretrained("org/name-GGUF", gguf_file="name.Q4_0.gguf")
    hub.take()
    commit = repo.refs["main"]
    again = AutoConfig.from_pretrained("org/name-GGUF", gguf_file="name.Q8_0.gguf", revision=commit)
    assert again.vocab_size == 61
    pinned = {"gguf_file": "name.Q8_0.gguf", "revision": commit, "local_files_only": True}
    AutoModelForCausalLM.from_pretrained("org/name-GGUF", **pinned)
    assert hub.take() == []
    with pytest.raises((OfflineError, NotFoundError)):
        AutoModelForCausalLM.from_pretrained("org/other", gguf_file="name.Q8_0.gguf", local_files_only=True)


def test_a_repository_of_pickles(hub: Any, tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path, "gpt2")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    config = (tmp_path / "config.json").read_bytes()
    hub.repo("org/old", {"config.json": config, "pytorch_model.bin": buffer.getvalue()})
    with pytest.raises(UnsafeFormatError, match="use_safetensors=False"):
        AutoModelForCausalLM.from_pretrained("org/old")
    loaded = AutoModelForCausalLM.from_pretrained("org/old", use_safetensors=False, strict=True)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_converting_from_the_hub(hub: Any, tmp_path: Path) -> None:
    """Shards that are still to be downloaded, and pickles."""
    model = tiny.checkpoint(tmp_path / "one", "llama")
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    config = (tmp_path / "one" / "config.json").read_bytes()
    hub.repo("org/many", {file.name: file.read_bytes() for file in (tmp_path / "many").iterdir()})
    hub.repo("org/old", {"config.json": config, "pytorch_model.bin": buffer.getvalue(), "vocab.json": b"{}"})
    for name in ("org/many", "org/old"):
        made = convert_checkpoint(name, tmp_path / name, dtype="bfloat16")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, strict=True)
        assert loaded.dtype == torch.bfloat16
        assert all(torch.equal(loaded.state_dict()[n], t.bfloat16()) for n, t in model.state_dict().items())
        shards = list((tmp_path / "many").glob("*.safetensors"))
        assert len(made.source_files) == (1 if name == "org/old" else len(shards))
    assert (tmp_path / "org" / "old" / "vocab.json").read_bytes() == b"{}"
