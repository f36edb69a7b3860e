"""No file stays open behind an error, though the error's traceback keeps every frame it went through alive."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toy

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, Linear4bit, LoraConfig
from loadstone.errors import QuantizationError, ReadError
from loadstone.loading.reading import Reader
from loadstone.loading.source import resolve_source
from loadstone.models.transcode import quantize_checkpoint

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)


def opened(directory: Path) -> list[str]:
    """Files below a directory that this process has open."""
    found = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
    return [path for path in found if path.startswith(str(directory))]


def misalign(file: Path) -> None:
    """Move all tensors by a byte, so that none can be mapped and the file is opened to be read."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    file.write_bytes(struct.pack("<Q", length + 1) + raw[8 : 8 + length] + b" " + raw[8 + length :])


def fail(*_: Any) -> None:
    raise QuantizationError("injected")


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[Path]:
    """Let so many reads succeed, then the disk fail; the files that were read."""
    real, read = Reader.into, []

    def into(self: Reader, target: torch.Tensor, file: Path, begin: int) -> None:
        read.append(file)
        real(self, target, file, begin)
        if len(read) > number:
            raise ReadError("injected")

    monkeypatch.setattr(Reader, "into", into)
    return read


def test_codes_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.checkpoint(tmp_path / "plain", "llama")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=CONFIG).save_pretrained(tmp_path / "x")
    monkeypatch.setattr(Linear4bit, "check_parts", fail)
    with pytest.raises(QuantizationError, match="injected") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "x", disable_mmap=True)
    assert opened(tmp_path) == []
    del caught


@pytest.mark.parametrize("where", ["make_codes", "header_bytes", "_check_space"])
def test_a_checkpoint_that_is_not_quantized_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source = tiny.checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    toy.save(tmp_path / "source", source.state_dict() | {"lm_head.weight": source.lm_head.weight.clone()})  # both held
    misalign(tmp_path / "source" / "model.safetensors")
    monkeypatch.setattr(f"loadstone.loading.transcode.{where}", fail)
    with pytest.raises(QuantizationError, match="injected") as caught:
        quantize_checkpoint(type(source), resolve_source(tmp_path / "source"), tmp_path / "target", CONFIG)
    assert opened(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == ["source"]
    del caught


def test_an_adapter_that_cannot_be_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor has the model a part of it."""
    tiny.checkpoint(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=3, target_modules="all-linear"))
    model.save_adapter(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = plain.state_dict()
    read = fail_at(monkeypatch, 3)
    with pytest.raises(ReadError, match="injected") as caught:
        plain.load_adapter(tmp_path / "adapter")
    assert len(read) == 4
    assert opened(tmp_path) == []
    assert not plain.adapters
    assert plain.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad for parameter in plain.parameters())
    del caught
