"""Bytes as tokens, tokenizer.json, and text streamed out of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from loadstone.errors import ArgumentError, ConfigError, NotFoundError
from loadstone.loading import resolve_source
from loadstone.models.tokenizer import ByteTokenizer, FastTokenizer, TextStream, load_tokenizer

BYTES = ByteTokenizer()


@given(st.text())
@tiny.examples(100)
def test_bytes_round_trip(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids[0] == BYTES.bos_token_id
    assert BYTES.decode(ids) == text
    assert BYTES.decode(ids, skip_special_tokens=False) == "<bos>" + text
    assert BYTES.encode(text, add_special_tokens=False) == list(text.encode())


@given(st.text(), st.text(max_size=8))
@tiny.examples(100)
def test_stream_of_bytes_is_the_text(text: str, prompt: str) -> None:
    stream = TextStream(BYTES, BYTES.encode(prompt))
    pieces = [stream.put(token) for token in BYTES.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + stream.end() == text


@given(st.lists(st.integers(0, 257), max_size=60))
@tiny.examples(100)
def test_stream_of_any_bytes_ends_and_is_valid_text(ids: list[int]) -> None:
    stream = TextStream(BYTES)
    text = "".join(stream.put(token) for token in ids) + stream.end()
    text.encode()
    assert sum(c.isascii() for c in text) == sum(token < 128 for token in ids)


def test_what_is_not_text_or_token_is_refused() -> None:
    with pytest.raises(ArgumentError, match="Unicode"):
        BYTES.encode("\ud800")
    with pytest.raises(ArgumentError, match="258"):
        BYTES.decode([258])
    with pytest.raises(ConfigError):
        ByteTokenizer(["<bos>", "<bos>"])


def test_byte_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    wanted = ByteTokenizer(["<s>", "</s>", "<pad>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(wanted.to_dict()))
    found = load_tokenizer(resolve_source(tmp_path))
    assert isinstance(found, ByteTokenizer)
    assert (found.vocab_size, found.special_tokens) == (259, wanted.special_tokens)


def test_tokenizer_json(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed (extra: text)")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cat and the hat"], trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    found = load_tokenizer(resolve_source(tmp_path))
    assert isinstance(found, FastTokenizer)
    assert (found.bos_token_id, found.eos_token_id) == (0, 1)
    text = "the hat, 日本語 🙂 and the cat"
    ids = found.encode(text)
    stream = TextStream(found)
    assert "".join([*(stream.put(token) for token in ids), stream.end()]) == found.decode(ids) == text


def test_no_tokenizer_is_an_error_that_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(resolve_source(tmp_path))
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        load_tokenizer(resolve_source(tmp_path))
