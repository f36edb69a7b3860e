"""`loadstone convert`: what it writes is what loading and saving would write, from every format; what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import peak_memory
import pytest
import tiny
import torch
from commands import refused, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loadstone import AutoModelForCausalLM, convert_checkpoint
from loadstone.cli import main
from loadstone.errors import ArgumentError, MissingWeightsError, PathError, UnsafeFormatError

SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in process: (status, standard output, standard error)."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        status = main(["convert", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def pickled(directory: Path, kind: str, shards: int = 1, zipped: bool = True, **sizes: Any) -> Any:
    """A checkpoint of pytorch_model.bin or its shards; the model."""
    model = tiny.checkpoint(directory, kind, **sizes)
    (directory / "model.safetensors").unlink()
    state, options = model.state_dict(), {"_use_new_zipfile_serialization": zipped}
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", **options)
        return model
    names, weight_map = list(state), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name] for name in names[number::shards]}, directory / file, **options)
        weight_map |= dict.fromkeys(names[number::shards], file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def same_files(one: Path, other: Path) -> None:
    names = {file.name for file in other.iterdir()}
    assert {file.name for file in one.iterdir()} == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("form", ["zip", "older", "shards", "safetensors"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_equals_loading_and_saving(tmp_path: Path, run: Any, kind: str, form: str, dtype: str | None) -> None:
    source, mine, wanted = tmp_path / "src", tmp_path / "mine", tmp_path / "wanted"
    if form == "safetensors":
        tiny.checkpoint(source, kind, tie_word_embeddings=True)
    else:
        pickled(source, kind, 3 if form == "shards" else 1, form != "older", tie_word_embeddings=True)
    options = ["--dtype", dtype] if dtype else []
    status, _, error = run(source, mine, *options, "--max-shard-size", "40KB")
    assert (status, error) == (0, "")
    asked = None if form == "safetensors" else False
    loaded = AutoModelForCausalLM.from_pretrained(source, use_safetensors=asked, dtype=dtype)
    loaded.save_pretrained(wanted, max_shard_size="40KB")
    same_files(mine, wanted)
    assert len(list(mine.glob("*.safetensors"))) > (1 if dtype is None else 0)
    AutoModelForCausalLM.from_pretrained(mine, strict=True)


@pytest.mark.parametrize("type_of", ["F32", "F16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_gguf(tmp_path: Path, run: Any, type_of: str, dtype: str | None) -> None:
    pytest.importorskip("gguf")
    import gguf_files

    model = tiny.model("llama", **gguf_files.SIZES)
    file = gguf_files.save(model, tmp_path / "src" / "x.gguf", type_of)
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    options = ["--dtype", dtype] if dtype else []
    assert run(file, tmp_path / "mine", *options)[0] == 0
    assert run(tmp_path / "src", tmp_path / "too", "--gguf-file", "x.gguf", *options)[0] == 0
    same_files(tmp_path / "too", tmp_path / "mine")
    assert (tmp_path / "mine" / "tokenizer.json").read_text() == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "src", gguf_file="x.gguf", dtype=dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", strict=True)
    assert again.dtype == loaded.dtype
    state = again.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
    written = tensors_of(tmp_path / "mine")
    norm = written["model.norm.weight"]
    assert norm.dtype == (torch.float16 if dtype else torch.float32)  # without --dtype norms stay what they are


@tiny.examples(15)
@given(
    dtypes=st.lists(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), min_size=3, max_size=3),
    shard=st.integers(3_000, 90_000),
    tied=st.sampled_from(("untied", "once", "twice", "head only", "other")),
    bin_=st.booleans(),
)
def test_every_tensor_keeps_its_dtype(
    tmp_path_factory: pytest.TempPathFactory, dtypes: list[torch.dtype], shard: int, tied: str, bin_: bool
) -> None:
    place = tmp_path_factory.mktemp("c")
    model = tiny.checkpoint(place / "src", "llama", tie_word_embeddings=tied != "untied", **SIZES)
    state = {name: tensor.to(dtypes[number % 3]) for number, (name, tensor) in enumerate(model.state_dict().items())}
    embedding = state["model.embed_tokens.weight"]
    if tied == "once":
        del state["lm_head.weight"]
    elif tied == "head only":
        state["lm_head.weight"] = embedding
        del state["model.embed_tokens.weight"]
    elif tied == "twice":
        state["lm_head.weight"] = embedding.clone()
    elif tied == "other":
        state["lm_head.weight"] = embedding * 3
    if bin_:
        (place / "src" / "model.safetensors").unlink()
        torch.save(state, place / "src" / "pytorch_model.bin")
    else:
        save_file(state, place / "src" / "model.safetensors")
    made = convert_checkpoint(place / "src", place / "dst", max_shard_size=shard)
    written = tensors_of(place / "dst")
    if tied in ("twice", "head only"):
        state["model.embed_tokens.weight"] = state.pop("lm_head.weight")
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    assert sum(made.written.by_dtype.values()) == made.written.bytes_after == sum(t.nbytes for t in written.values())
    before = AutoModelForCausalLM.from_pretrained(place / "src", use_safetensors=False if bin_ else None)
    after = AutoModelForCausalLM.from_pretrained(place / "dst", strict=True, dtype=before.dtype)
    assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in before.state_dict().items())


def test_quantized_checkpoints_stay_quantized(tmp_path: Path, run: Any) -> None:
    tiny.checkpoint(tmp_path / "plain", "llama", **SIZES)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config={"load_in_4bit": True})
    quantized.save_pretrained(tmp_path / "src")
    codes = load_file(tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "model.safetensors").unlink()
    torch.save(codes, tmp_path / "src" / "pytorch_model.bin")
    assert run(tmp_path / "src", tmp_path / "dst")[0] == 0
    written = tensors_of(tmp_path / "dst")
    assert written.keys() == codes.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in codes.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dst", strict=True).is_quantized


def test_what_is_beside_the_weights_and_what_is_printed(tmp_path: Path, run: Any) -> None:
    model = pickled(tmp_path / "src", "llama", 2)
    torch.save({**model.state_dict(), "extra": torch.ones(2)}, tmp_path / "src" / "pytorch_model.fp16.bin")
    (tmp_path / "src" / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    (tmp_path / "src" / "tokenizer.model").write_bytes(b"\x00\xff\xfe")
    (tmp_path / "src" / "notes.txt").write_text("not of a checkpoint")
    tiny.model("llama", seed=3, **SIZES).save_pretrained(tmp_path / "dst", max_shard_size="30KB")
    (tmp_path / "dst" / "README.md").write_text("stays")
    status, out, _ = run(tmp_path / "src", tmp_path / "dst", "--json")
    assert status == 0
    facts = json.loads(out)
    names = {file.name for file in (tmp_path / "dst").iterdir()}
    assert names == {"README.md", *facts["files"]}
    assert set(facts["files"]) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    assert facts["source_files"] == ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert facts["bytes_by_dtype"] == {"float32": facts["bytes_after"]}
    assert facts["left_out"] == []
    assert json.loads((tmp_path / "dst" / "generation_config.json").read_text())["temperature"] == 0.25
    status, out, _ = run(tmp_path / "src", tmp_path / "dst", "--variant", "fp16")
    assert status == 0
    assert "extra" in out
    save_file(model.state_dict(), tmp_path / "src" / "model.safetensors")
    for options, read in (([], "model.safetensors"), (["--pickled"], "pytorch_model-00001-of-00002.bin")):
        assert read in json.loads(run(tmp_path / "src", tmp_path / "dst", "--json", *options)[1])["source_files"]


def test_progress_counts_up_to_the_whole(tmp_path: Path) -> None:
    pickled(tmp_path / "src", "llama")
    seen: list[tuple[int, int]] = []
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", dtype="bfloat16", watch=lambda *pair: seen.append(pair))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


def test_targets_that_are_refused(tmp_path: Path, run: Any) -> None:
    pickled(tmp_path / "src", "llama")
    (tmp_path / "link").symlink_to(tmp_path / "src")
    for same in (tmp_path / "src", tmp_path / "link"):
        refused(run, "the source itself", tmp_path / "src", same)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    refused(run, "no checkpoint", tmp_path / "src", tmp_path / "papers")
    assert sorted(file.name for file in (tmp_path / "src").iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_hostile_source_leaves_no_result(tmp_path: Path, run: Any) -> None:
    pickled(tmp_path / "src", "llama")
    mark = tmp_path / "was-here"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {mark}",)

    torch.save({"w": Evil()}, tmp_path / "src" / "pytorch_model.bin")
    refused(run, "os" if os.name != "posix" else "posix", tmp_path / "src", tmp_path / "dst")
    with pytest.raises(UnsafeFormatError):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    (tmp_path / "src" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    refused(run, "system", tmp_path / "src", tmp_path / "dst")
    assert not mark.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, run: Any) -> None:
    state = pickled(tmp_path / "src", "llama").state_dict()
    del state["model.norm.weight"]
    torch.save(state, tmp_path / "src" / "pytorch_model.bin")
    refused(run, "model.norm.weight", tmp_path / "src", tmp_path / "dst")
    with pytest.raises(MissingWeightsError):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", dtype="float16")
    assert not (tmp_path / "dst").exists()


def test_a_full_disk_is_known_beforehand(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(tmp_path / "src", "llama")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    refused(run, "nothing was written", tmp_path / "src", tmp_path / "new" / "dst")
    assert not (tmp_path / "new").exists()


def test_arguments(tmp_path: Path, run: Any) -> None:
    pickled(tmp_path / "src", "llama")
    for options in (["--dtype", "float31"], ["--max-shard-size", "some"], ["--gguf-file", "x.gguf"],
                    ["--variant", "../x"], ["--subfolder", "none"]):  # fmt: skip
        status, _, error = run(tmp_path / "src", tmp_path / "dst", *options)
        assert status == 2, options
        assert error.startswith("loadstone: error:")
    refused(run, "pass one of them", tmp_path / "src", tmp_path / "dst", "--gguf-file", "x.gguf", "--variant", "fp16")
    refused(run, "no such", tmp_path / "none", tmp_path / "dst")
    with pytest.raises(ArgumentError, match="revision"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", revison="main")
    with pytest.raises(PathError):
        convert_checkpoint(tmp_path / "src" / "pytorch_model.bin", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_source_that_changes_meanwhile(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(tmp_path / "src", "llama")
    import loadstone.loading.transcode as transcoding

    real = transcoding.header_bytes

    def touching(*arguments: Any) -> Any:
        (tmp_path / "src" / "pytorch_model.bin").touch()
        return real(*arguments)

    monkeypatch.setattr(transcoding, "header_bytes", touching)
    refused(run, "ch", tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.skipif(not peak_memory.AVAILABLE, reason="needs /proc")
@pytest.mark.parametrize("form", ["zip", "older", "gguf"])
def test_memory(tmp_path: Path, form: str) -> None:
    """A cast of a 150 MB model takes less than its largest tensor and 40 MB."""
    sizes = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "vocab_size": 6144,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
    }
    for name, one in (("big", sizes), ("small", {"hidden_size": 64, "intermediate_size": 64})):
        place = tmp_path / name
        if form == "gguf":
            pytest.importorskip("gguf")
            import gguf_files

            gguf_files.save(tiny.model("llama", **one), place / "x.gguf", "Q8_0")
        else:
            pickled(place, "llama", zipped=form == "zip", **one)
    more = ", gguf_file='x.gguf'" if form == "gguf" else ""
    call = f"convert_checkpoint({str(tmp_path)!r} + '/{{0}}', {str(tmp_path)!r} + '/{{0}}-out', dtype='bfloat16'{more})"
    setup = "from loadstone import convert_checkpoint\n" + call.format("small")
    assert peak_memory.peak_of(call.format("big"), setup) < 19e6 + 40e6


def test_inspecting_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`loadstone inspect` of pickles and GGUF files: what is in them, in the form that it has there."""
    model = pickled(tmp_path / "bin", "llama", 2)
    assert main(["inspect", str(tmp_path / "bin")]) == 2
    assert "use_safetensors=False" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "bin"), "--pickled", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["checkpoint"]["bytes"] == sum(p.nbytes for p in model.parameters())
    assert len(facts["checkpoint"]["bytes_by_file"]) == 2
    pytest.importorskip("gguf")
    import gguf_files

    file = gguf_files.save(tiny.model("llama", **gguf_files.SIZES), tmp_path / "x" / "m.gguf", "Q4_K")
    assert main(["inspect", str(tmp_path / "x"), "--gguf-file", "m.gguf", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    sizes = facts["checkpoint"]["bytes_by_dtype"]
    assert sizes.keys() == {"Q4_K", "float32"}
    assert sum(sizes.values()) == facts["checkpoint"]["bytes"] == facts["checkpoint"]["bytes_by_file"]["m.gguf"]
    assert main(["inspect", str(file)]) == 0
    assert "Q4_K" in capsys.readouterr().out
    assert main(["inspect", str(file), "--variant", "fp16"]) == 2
