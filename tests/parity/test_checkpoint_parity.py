"""Checkpoints cross between loadstone and transformers, both ways, bit for bit; reports and dtypes agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import peers
from parity.peers import PEER_CONFIGS, PEER_MODELS, Case, relative, transformers
from safetensors.torch import load_file, save_file

from loadstone import AutoConfig, AutoModelForCausalLM
from loadstone.errors import ConfigError, ShapeMismatchError

kinds = pytest.mark.parametrize("kind", tiny.KINDS)
tied = pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
PeerAuto = transformers.AutoModelForCausalLM


def same_state(ours: Any, theirs: Any) -> None:
    """Every tensor equal, bit for bit, in dtype too."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def same_info(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The sets of a loading report; shapes as plain tuples."""
    assert set(ours["missing_keys"]) == set(theirs["missing_keys"])
    assert set(ours["unexpected_keys"]) == set(theirs["unexpected_keys"])
    plain = {(name, tuple(a), tuple(b)) for name, a, b in theirs["mismatched_keys"]}
    assert {(name, tuple(a), tuple(b)) for name, a, b in ours["mismatched_keys"]} == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["50GB", "12KB"], ids=["single", "sharded"])
@tied
@kinds
def test_weights_cross_both_ways(kind: str, tie: bool, shard: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(kind, tiny.values(kind, tie_word_embeddings=tie), 7)
    mine, peer = case.pair(dtype=dtype)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    same_state(loaded, peer)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert loaded.config.dtype == dtype

    mine.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    back, peer_info = PeerAuto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    same_state(mine, back)
    assert not any(peer_info.values())
    assert back.config.tie_word_embeddings is tie
    assert type(back) is PEER_MODELS[kind]

    names = [sorted(file.name for file in (tmp_path / who).glob("*.safetensors*")) for who in ("ours", "theirs")]
    assert ("model.safetensors.index.json" in names[0]) is (shard == "12KB")
    stored = [{k for f in (tmp_path / who).glob("*.safetensors") for k in load_file(f)} for who in ("ours", "theirs")]
    assert stored[0] == stored[1]
    loaded.save_pretrained(tmp_path / "again", max_shard_size=shard)
    same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), peer)


@kinds
@tiny.examples(8)
@given(data=st.data())
def test_config_crosses_both_ways(kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every option survives a trip through the other library, and so do fields that neither knows."""
    case = data.draw(peers.cases(kind))
    folder = tmp_path_factory.mktemp("config")
    case.values["a_field_of_the_future"] = {"x": [1, None, "y"]}
    mine, theirs = case.configs()
    mine.save_pretrained(folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    crossed = PEER_CONFIGS[kind].from_pretrained(folder / "ours")
    received = AutoConfig.from_pretrained(folder / "theirs")
    assert json.loads((folder / "ours" / "config.json").read_text())["a_field_of_the_future"] == {"x": [1, None, "y"]}
    assert received.a_field_of_the_future == crossed.a_field_of_the_future == {"x": [1, None, "y"]}
    for name in case.values:
        if name in ("model_type", "rope_theta", "rope_scaling", "rope_parameters"):
            continue
        assert getattr(crossed, name) == getattr(received, name) == getattr(mine, name) == getattr(theirs, name)
    if kind != "gpt2":
        rope = {key: value for key, value in mine.rope_parameters.items() if key != "type"}
        assert {k: v for k, v in crossed.rope_parameters.items() if k != "type"} == rope
        assert {k: v for k, v in received.rope_parameters.items() if k != "type"} == rope
    assert AutoConfig.from_pretrained(folder / "ours").to_dict() == mine.to_dict()


def write(directory: Path, kind: str, tensors: dict[str, torch.Tensor], **overrides: Any) -> Path:
    """A checkpoint of exactly these tensors."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(tiny.values(kind, **overrides)))
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, directory / "model.safetensors")
    return directory


def load_both(directory: Path, **kwargs: Any) -> tuple[Any, Any]:
    """Both libraries' models, their reports compared."""
    mine, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **kwargs)
    peer, peer_info = PeerAuto.from_pretrained(directory, output_loading_info=True, **kwargs)
    same_info(info, peer_info)
    assert mine.load_report.loading_info() == info
    return mine, peer


def state(kind: str, **overrides: Any) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in tiny.model(kind, **overrides).state_dict().items()}


@pytest.mark.parametrize("held", ["embedding", "head", "both", "both, different", "neither"])
@kinds
def test_tied_weights(kind: str, held: str, tmp_path: Path) -> None:
    """Tied in the configuration: whichever of the two the file holds, no weight is lost."""
    tensors = state(kind, tie_word_embeddings=True)
    embedding = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    if held in ("head", "neither"):
        del tensors[embedding]
    if held in ("embedding", "neither"):
        del tensors["lm_head.weight"]
    if held == "both, different":
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    mine, peer = load_both(write(tmp_path / "c", kind, tensors, tie_word_embeddings=True))
    shared = mine.lm_head.weight is mine.get_input_embeddings().weight
    assert shared is (held != "both, different")
    assert shared is (peer.lm_head.weight is peer.get_input_embeddings().weight)
    if held == "neither":
        for model in (mine, peer):
            model.get_input_embeddings().weight.data.zero_()
    same_state(mine, peer)


@kinds
def test_base_model_checkpoints(kind: str, tmp_path: Path) -> None:
    """Keys with and without the prefix of the decoder, with the head there or missing."""
    prefix = tiny.MODELS[kind].base_model_prefix + "."
    full = state(kind, tie_word_embeddings=False)
    base = {name.removeprefix(prefix): t for name, t in full.items() if name != "lm_head.weight"}
    mine, _ = load_both(write(tmp_path / "base", kind, base, tie_word_embeddings=False))
    assert set(mine.load_report.missing) == {"lm_head.weight"}
    assert all(torch.equal(mine.state_dict()[prefix + name], t) for name, t in base.items())
    mine, peer = load_both(write(tmp_path / "tied", kind, base, tie_word_embeddings=True))
    same_state(mine, peer)
    headless = {name: t for name, t in full.items() if name != "lm_head.weight"}
    load_both(write(tmp_path / "headless", kind, headless, tie_word_embeddings=False))
    mixed = base | {"lm_head.weight": full["lm_head.weight"]}
    mine, peer = load_both(write(tmp_path / "mixed", kind, mixed, tie_word_embeddings=False))
    same_state(mine, peer)


@kinds
def test_missing_and_unexpected(kind: str, tmp_path: Path) -> None:
    tensors = state(kind, tie_word_embeddings=False)
    gone = [name for name in tensors if ".1." in name][:3]
    for name in gone:
        del tensors[name]
    tensors |= {"extra.weight": torch.ones(2), "model.layers.7.foo.weight": torch.ones(3)}
    mine, _ = load_both(write(tmp_path / "c", kind, tensors, tie_word_embeddings=False))
    assert set(mine.load_report.missing) == set(gone)
    assert set(mine.load_report.unexpected) == {"extra.weight", "model.layers.7.foo.weight"}
    assert all(torch.isfinite(p).all() for p in mine.parameters())


def test_mask_buffers_and_old_names_of_gpt2(tmp_path: Path) -> None:
    """The Hub's gpt2: no prefix, no head, and mask buffers that are no weights."""
    full = state("gpt2", tie_word_embeddings=True)
    tensors = {name.removeprefix("transformer."): t for name, t in full.items() if name != "lm_head.weight"}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    directory = write(tmp_path / "c", "gpt2", tensors)
    mine, peer = load_both(directory)
    same_state(mine, peer)
    assert mine.load_report.fits
    for layer in range(2):
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    mine = AutoModelForCausalLM.from_pretrained(write(directory, "gpt2", tensors))
    assert mine.load_report.fits  # the peer reports masked_bias as unexpected; it is known to be no weight
    same_state(mine, PeerAuto.from_pretrained(directory))


def test_rotary_buffers_of_old_llamas(tmp_path: Path) -> None:
    tensors = state("llama") | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
    mine, peer = load_both(write(tmp_path / "c", "llama", tensors))
    ids = peers.tokens(0, 1, 9)
    with torch.no_grad():
        assert relative(mine(ids).logits, peer(ids).logits) <= 1e-5
    assert mine.load_report.fits


@kinds
def test_mismatched_shapes(kind: str, tmp_path: Path) -> None:
    tensors = state(kind, tie_word_embeddings=False)
    norm = next(name for name in tensors if "norm" in name or "ln_1.weight" in name)
    tensors["lm_head.weight"] = torch.ones(70, 32)
    tensors[norm] = torch.ones(5)
    directory = write(tmp_path / "c", kind, tensors, tie_word_embeddings=False)
    with pytest.raises(ShapeMismatchError, match=r"lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(RuntimeError):
        PeerAuto.from_pretrained(directory)
    mine, _ = load_both(directory, ignore_mismatched_sizes=True)
    assert {name for name, *_ in mine.load_report.mismatched} == {"lm_head.weight", norm}
    assert mine.lm_head.weight.shape == (61, 32)
    assert torch.equal(mine.get_parameter(norm), torch.ones(32))


@kinds
def test_key_mapping(kind: str, tmp_path: Path) -> None:
    full = state(kind, tie_word_embeddings=False)
    renamed = {name.replace("lm_head", "output").replace(".mlp.", ".ffn."): t for name, t in full.items()}
    directory = write(tmp_path / "c", kind, renamed, tie_word_embeddings=False)
    mine, peer = load_both(directory, key_mapping={"^output": "lm_head", r"\.ffn\.": ".mlp."})
    same_state(mine, peer)
    assert mine.load_report.fits
    load_both(directory)  # without it both report the same names missing and unexpected


CONVERSIONS = [(a, b) for a in ("float32", "bfloat16", "float16") for b in ("float32", "bfloat16", "float16")]


@pytest.mark.parametrize(("stored", "wanted"), CONVERSIONS)
def test_dtype_conversions(stored: str, wanted: str, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "c", "llama", stored=getattr(torch, stored), attention_bias=True)
    mine, peer = load_both(tmp_path / "c", dtype=wanted)
    same_state(mine, peer)
    assert mine.dtype == getattr(torch, wanted)
    assert mine.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("written", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", ["absent", None, "auto", "bfloat16", torch.float16, "float32"])
def test_what_dtype_means(written: str | None, asked: Any, tmp_path: Path) -> None:
    """None and "auto" are config.json's dtype, else the weights' own; a name or a torch dtype is itself."""
    for spelling in ("dtype", "torch_dtype"):
        folder = tmp_path / spelling
        tiny.checkpoint(folder, "gpt2", stored=torch.bfloat16, **({spelling: written} if written else {}))
        extra = {} if asked == "absent" else {"dtype": asked}
        mine = AutoModelForCausalLM.from_pretrained(folder, **extra)
        # Given explicitly, None makes the peer forget config.json's dtype; here it is the same as not given.
        peer = PeerAuto.from_pretrained(folder, **({} if asked is None else extra))
        assert mine.dtype == peer.dtype == mine.config.dtype
        same_state(mine, peer)
        if asked != "absent":
            older = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=asked)
            assert older.dtype == mine.dtype
    for bad in ("int8", torch.int8, "os.system", 5, "flaot32"):
        with pytest.raises(ConfigError, match="dtype"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "dtype", dtype=bad)


@kinds
def test_generation_config_crosses(kind: str, tmp_path: Path) -> None:
    mine, peer = Case(kind, tiny.values(kind), 2).pair()
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 7, "max_new_tokens": 11,
                "repetition_penalty": 1.1, "eos_token_id": [3, 4], "pad_token_id": 4}  # fmt: skip
    for name, value in settings.items():
        setattr(peer.generation_config, name, value)
        setattr(mine.generation_config, name, value)
    peer.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "ours")
    received = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").generation_config
    crossed = PeerAuto.from_pretrained(tmp_path / "ours").generation_config
    for name, value in settings.items():
        assert getattr(received, name) == value == getattr(crossed, name)
