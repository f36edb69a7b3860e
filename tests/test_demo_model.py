"""The embedded model: small, whole, and a model of its text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from loadstone import AutoModelForCausalLM
from loadstone.cli.place import DEMO
from loadstone.loading import resolve_source
from loadstone.models.tokenizer import ByteTokenizer, load_tokenizer

# Three verses of a chapter that was held out of the training (Proverbs 12).
HELD_OUT = """\
Whoso loveth instruction loveth knowledge: but he that hateth reproof is brutish.
A good man obtaineth favour of the LORD: but a man of wicked devices will he condemn.
A man shall not be established by wickedness: but the root of the righteous shall not be moved.
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO)


def loss_of(model: Any, text: str) -> float:
    ids = torch.tensor([ByteTokenizer().encode(text)])
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_files_are_small_and_complete(model: Any) -> None:
    names = {path.name for path in DEMO.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 5_000_000
    assert 800_000 < model.num_parameters() < 1_300_000
    assert model.load_report.fits
    assert isinstance(load_tokenizer(resolve_source(DEMO)), ByteTokenizer)


def test_model_card_says_where_it_comes_from() -> None:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    for part in ("bible-kjv-text", "examples/train_demo.py", "held-out", "nats a byte", "public domain"):
        assert part in card


def test_config_names_a_registered_type() -> None:
    values = json.loads((DEMO / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("llama", ["LlamaForCausalLM"])


def test_held_out_text_is_far_likelier_than_under_a_random_model(model: Any) -> None:
    torch.manual_seed(0)
    random = AutoModelForCausalLM.from_config(model.config).eval()
    assert loss_of(random, HELD_OUT) > 5.0
    assert loss_of(model, HELD_OUT) < 1.6


def test_order_of_words_matters_to_it(model: Any) -> None:
    words = HELD_OUT.split(" ")
    assert loss_of(model, HELD_OUT) < loss_of(model, " ".join(reversed(words))) - 0.2


def test_it_writes_english_letters(model: Any) -> None:
    tokenizer = ByteTokenizer()
    ids = torch.tensor([tokenizer.encode("And God said")]).repeat(4, 1)
    generator = torch.Generator().manual_seed(1)
    rows = model.generate(ids, max_new_tokens=120, do_sample=True, temperature=0.8, generator=generator)
    text = "".join(tokenizer.decode(row.tolist()) for row in rows)
    assert "\ufffd" not in text
    assert all(c.isalpha() or c in " \n.,;:!?'()-" for c in text)
    assert text.lower().count("the ") > 2
