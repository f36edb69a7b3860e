"""`loadstone quantize`: what it writes is what loading, quantizing and saving would write; what it refuses."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import refused, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig
from loadstone.cli import main
from loadstone.quant.four_bit import quantize_4bit
from loadstone.quant.weight_only import WeightOnlyConfig

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in process: (status, standard output, standard error)."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        status = main(["quantize", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def bits4(kind: str = "nf4", **options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, **options)


def same_tensors(one: Path, other: Path) -> None:
    mine, wanted = tensors_of(one), tensors_of(other)
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert mine[name].dtype == tensor.dtype, name
        assert mine[name].shape == tensor.shape, name
        assert torch.equal(mine[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def by_hand(source: Path, directory: Path, config: Any, shard: str = "50GB", **options: Any) -> None:
    """Load, quantize, save."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **options)
    model.save_pretrained(directory, max_shard_size=shard)


CASES: list[tuple[list[str], Any]] = [
    (["--nf4"], bits4()),
    (["--fp4", "--compute-dtype", "bfloat16"], bits4("fp4", bnb_4bit_compute_dtype="bfloat16")),
    (["--nf4", "--double-quant"], bits4(bnb_4bit_use_double_quant=True)),
    (["--nf4", "--storage", "bfloat16"], bits4(bnb_4bit_quant_storage="bfloat16")),
    (["--nf4", "--skip", "lm_head", "0", "down_proj"], bits4(llm_int8_skip_modules=["lm_head", "0", "down_proj"])),
    (["--int8"], BitsAndBytesConfig(load_in_8bit=True)),
    (["--weight-only-int8"], WeightOnlyConfig(8)),
    (["--weight-only-int4", "--group-size", "32"], WeightOnlyConfig(4, 32)),
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("options", "config"), CASES, ids=[" ".join(options) for options, _ in CASES])
def test_equals_loading_and_saving(tmp_path: Path, run: Any, kind: str, options: list[str], config: Any) -> None:
    sizes = {"n_embd": 64} if kind == "gpt2" else SIZES
    tiny.checkpoint(tmp_path / "src", kind, stored=torch.bfloat16, dtype="bfloat16", **sizes)
    status, _, error = run(tmp_path / "src", tmp_path / "mine", *options)
    assert (status, error) == (0, "")
    by_hand(tmp_path / "src", tmp_path / "wanted", config)
    same_tensors(tmp_path / "mine", tmp_path / "wanted")
    names = {file.name for file in (tmp_path / "wanted").iterdir()}
    assert {file.name for file in (tmp_path / "mine").iterdir()} == names
    for name in names - ({"model.safetensors"} if "--double-quant" in options else set()):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes(), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", strict=True)
    assert again.is_quantized
    assert again.dtype == torch.bfloat16


@tiny.examples(10)
@given(
    shard=st.integers(2_000, 60_000),
    method=st.sampled_from(("--nf4", "--int8", "--weight-only-int8")),
    double=st.booleans(),
    dtype=st.sampled_from((None, "bfloat16", "float32")),
    tied=st.sampled_from(("untied", "once", "twice", "other")),
)
def test_shards_dtypes_and_ties(
    tmp_path_factory: pytest.TempPathFactory, shard: int, method: str, double: bool, dtype: str | None, tied: str
) -> None:
    place = tmp_path_factory.mktemp("q")
    tiny.checkpoint(place / "src", "llama", **SIZES, tie_word_embeddings=tied != "untied")
    tensors = load_file(place / "src" / "model.safetensors")
    if tied in ("twice", "other"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if tied == "other":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, place / "src" / "model.safetensors")
    double = double and method == "--nf4"
    config: Any = bits4(bnb_4bit_use_double_quant=double) if method == "--nf4" else WeightOnlyConfig(8)
    config = BitsAndBytesConfig(load_in_8bit=True) if method == "--int8" else config
    options = [*(["--double-quant"] if double else []), *(["--dtype", dtype] if dtype else [])]
    status = main(
        ["quantize", str(place / "src"), str(place / "mine"), method, *options, "--max-shard-size", f"{shard}"]
    )
    assert status == 0
    by_hand(place / "src", place / "wanted", config, f"{shard}", **({"dtype": dtype} if dtype else {}))
    same_tensors(place / "mine", place / "wanted")
    if not double:
        for file in (place / "wanted").iterdir():
            assert (place / "mine" / file.name).read_bytes() == file.read_bytes(), file.name
    AutoModelForCausalLM.from_pretrained(place / "mine", strict=True)


def test_a_sharded_source_and_blocks_of_another_size(tmp_path: Path, run: Any) -> None:
    model = tiny.model("llama", **SIZES)
    model.save_pretrained(tmp_path / "src", max_shard_size="30KB")
    assert len(list((tmp_path / "src").glob("*.safetensors"))) > 2
    assert run(tmp_path / "src", tmp_path / "dst", "--nf4", "--blocksize", 256)[0] == 0
    made = tensors_of(tmp_path / "dst")
    name = "model.layers.1.mlp.down_proj"
    packed, state = quantize_4bit(model.get_submodule(name).weight.detach(), blocksize=256)
    assert torch.equal(made[f"{name}.weight"], packed)
    assert torch.equal(made[f"{name}.weight.absmax"], state.absmax)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", strict=True)
    assert loaded.get_submodule(name).blocksize == 256


def test_what_is_beside_the_weights_and_what_is_printed(tmp_path: Path, run: Any) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES)
    (tmp_path / "src" / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    (tmp_path / "src" / "tokenizer.model").write_bytes(b"\x00\xff\xfe")
    (tmp_path / "src" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "src" / "notes.txt").write_text("not of a checkpoint")
    status, out, _ = run(tmp_path / "src", tmp_path / "dst", "--int8", "--json")
    facts = json.loads(out)
    assert status == 0
    files = {file.name: file for file in (tmp_path / "dst").iterdir()}
    assert set(files) == set(facts["files"])
    assert files["tokenizer.model"].read_bytes() == b"\x00\xff\xfe"
    assert "notes.txt" not in files
    assert json.loads(files["generation_config.json"].read_text())["temperature"] == 0.25
    config = json.loads(files["config.json"].read_text())
    assert config["quantization_config"] == facts["quantization_config"]
    assert facts["not_quantized"] == ["lm_head"]
    assert len(facts["quantized"]) == 14
    assert facts["bytes_after"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "dst").values())
    assert facts["bytes_before"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "src").values())
    status, out, _ = run(tmp_path / "src", tmp_path / "dst", "--int8")
    assert status == 0
    assert "14 layers" in out


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path: Path, run: Any) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES)
    tiny.model("llama", seed=3, **SIZES).save_pretrained(tmp_path / "dst", max_shard_size="30KB")
    (tmp_path / "dst" / "README.md").write_text("stays")
    assert run(tmp_path / "src", tmp_path / "dst", "--nf4")[0] == 0
    assert sorted(file.name for file in (tmp_path / "dst").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


def test_a_source_that_is_quantized(tmp_path: Path, run: Any) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES)
    run(tmp_path / "src", tmp_path / "once", "--nf4")
    refused(run, "quantized already", tmp_path / "once", tmp_path / "twice", "--nf4")
    assert not (tmp_path / "twice").exists()


def test_targets_that_are_refused(tmp_path: Path, run: Any) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES)
    before = (tmp_path / "src" / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "src")
    for same in (tmp_path / "src", tmp_path / "link", tmp_path / "src" / ".." / "src"):
        refused(run, "the source itself", tmp_path / "src", same, "--nf4")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    refused(run, "no checkpoint", tmp_path / "src", tmp_path / "papers", "--nf4")
    (tmp_path / "file").write_text("")
    refused(run, "is a file", tmp_path / "src", tmp_path / "file", "--nf4")
    assert (tmp_path / "src" / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_known_beforehand(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    refused(run, "nothing was written", tmp_path / "src", tmp_path / "new" / "dst", "--nf4")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["--nf4", "--int8", "--weight-only-int4"])
def test_weights_without_codes_leave_no_result(tmp_path: Path, run: Any, method: str) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES | {"hidden_size": 128})
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    refused(run, "model.layers.1.mlp.up_proj.weight", tmp_path / "src", tmp_path / "dst", method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, run: Any) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES)
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    refused(run, "model.norm.weight", tmp_path / "src", tmp_path / "dst", "--nf4")


def test_unexpected_tensors_are_named(tmp_path: Path, run: Any) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES)
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.zeros(3)}, tmp_path / "src" / "model.safetensors")
    status, out, _ = run(tmp_path / "src", tmp_path / "dst", "--nf4")
    assert status == 0
    assert "extra.weight" in out


@pytest.mark.parametrize(
    "options",
    [
        ["--int8", "--double-quant"],
        ["--int8", "--blocksize", "128"],
        ["--weight-only-int8", "--compute-dtype", "bfloat16"],
        ["--weight-only-int8", "--group-size", "32"],
        ["--nf4", "--group-size", "32"],
        ["--weight-only-int4", "--group-size", "48"],
        ["--nf4", "--compute-dtype", "float31"],
        ["--nf4", "--storage", "int3"],
        ["--nf4", "--max-shard-size", "some"],
        ["--nf4", "--skip", "a(b"],
    ],
    ids=" ".join,
)
def test_options_that_are_refused(tmp_path: Path, run: Any, options: list[str]) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES)
    status, _, error = run(tmp_path / "src", tmp_path / "dst", *options)
    assert status == 2
    assert error.startswith("loadstone: error:")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("options", [[], ["--nf4", "--int8"], ["--nf4", "--blocksize", "100"]], ids=str)
def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", str(tmp_path), str(tmp_path / "dst"), *options])
    assert "usage" in capsys.readouterr().err


def test_a_source_that_changes_meanwhile(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", **SIZES)
    file = tmp_path / "src" / "model.safetensors"
    import loadstone.loading.transcode as transcoding

    real = transcoding.make_codes

    def touching(*arguments: Any) -> Any:
        file.touch()
        return real(*arguments)

    monkeypatch.setattr(transcoding, "make_codes", touching)
    refused(run, "changed while being read", tmp_path / "src", tmp_path / "dst", "--nf4")
    assert not (tmp_path / "dst").exists()
