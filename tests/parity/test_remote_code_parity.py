"""Own code of repositories, as transformers runs it: the grammar of references, and classes written for it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import loadstone
from loadstone.errors import RemoteCodeError
from loadstone.registry.auto_map import parse_reference

transformers = pytest.importorskip("transformers")

CONFIGURATION = """
from transformers import LlamaConfig

class GuestConfig(LlamaConfig):
    model_type = "guest-llama"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_guest import GuestConfig

class GuestForCausalLM(LlamaForCausalLM):
    config_class = GuestConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output
"""
# Written out, as older repositories do it: masks and rope of its own, weights named by itself.
ALONE = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from .configuration_guest import GuestConfig

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))

class GuestForCausalLM(PreTrainedModel):
    config_class = GuestConfig
    base_model_prefix = "body"
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.body = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids=None, **kwargs):
        x = self.embed(input_ids)
        for block in self.body:
            x = block(x)
        return CausalLMOutputWithPast(logits=self.lm_head(x))
"""
AUTO_MAP = {"AutoConfig": "configuration_guest.GuestConfig", "AutoModelForCausalLM": "modeling_guest.GuestForCausalLM"}
IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture(autouse=True, scope="module")
def modules_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code it runs; into a folder of the tests'."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def repository(place: Path, modeling: str, **config: Any) -> Path:
    place.mkdir()
    # transformers keeps a class that it ran for later configurations of the same content
    (place / "configuration_guest.py").write_text(f"{CONFIGURATION}\n# of {place}\n")
    (place / "modeling_guest.py").write_text(modeling)
    values = {**tiny.values("llama", **config), "model_type": "guest-llama", "auto_map": AUTO_MAP}
    (place / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    config_made = loadstone.AutoConfig.from_pretrained(place, trust_remote_code=True)
    made = loadstone.AutoModelForCausalLM.from_config(config_made, trust_remote_code=True)
    tiny.randomize(made)
    made.save_pretrained(place)
    (place / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5, "do_sample": False}))
    return place


@pytest.mark.parametrize("modeling", [MODELING, ALONE])
@pytest.mark.parametrize(
    ("config", "options"),
    [({}, {}), ({"tie_word_embeddings": True}, {}), ({}, {"dtype": "bfloat16"}), ({}, {"device_map": "cpu"})],
)
def test_a_class_written_for_transformers(tmp_path: Path, modeling: str, config: Any, options: Any) -> None:
    """The same class, weights, dtypes, ties and logits as transformers gives."""
    place = repository(tmp_path / "guest", modeling, **config)
    ours = loadstone.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **options)
    assert type(ours).__name__ == type(theirs).__name__ == "GuestForCausalLM"
    assert not ours.training
    assert ours.load_report.fits
    assert {name: (p.dtype, p.shape) for name, p in ours.named_parameters()} == {
        name: (p.dtype, p.shape) for name, p in theirs.named_parameters()}  # fmt: skip
    assert {name: b.dtype for name, b in ours.named_buffers()} == {name: b.dtype for name, b in theirs.named_buffers()}
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    if hasattr(ours, "generate"):
        assert ours.generation_config.max_new_tokens == 5
        assert torch.equal(ours.generate(IDS), theirs.generate(IDS))


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "n_layer": 2, "n_head": 4, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["qwen2", "phi", "falcon", "bloom", "opt", "gemma2", "stablelm", "mamba", "rwkv", "mpt"]
)
def test_architectures_of_every_kind(tmp_path: Path, kind: str) -> None:
    """Rope, alibi, learned positions, fused projections, states: parameters, buffers and logits are the peer's."""
    config_class = transformers.CONFIG_MAPPING[kind]
    model_class = transformers.AutoModelForCausalLM._model_mapping[config_class]
    known = {*config_class().to_dict(), *config_class.attribute_map}
    torch.manual_seed(0)
    model_class(config_class(**{name: value for name, value in SIZES.items() if name in known})).save_pretrained(
        tmp_path
    )
    (tmp_path / "modeling.py").write_text(
        f"from transformers import {config_class.__name__} as C, {model_class.__name__} as M\n"
        f"class GuestConfig(C):\n    model_type = 'guest-{kind}'\n"
        "class Guest(M):\n    config_class = GuestConfig\n"
    )
    values = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling.GuestConfig", "AutoModelForCausalLM": "modeling.Guest"}
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": f"guest-{kind}", "auto_map": auto_map}))
    for dtype in (None, "bfloat16"):
        ours, theirs = (
            library.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=dtype)
            for library in (loadstone, transformers)
        )
        assert ours.load_report.fits
        assert {name: p.dtype for name, p in ours.named_parameters()} == {
            name: p.dtype for name, p in theirs.named_parameters()
        }
        buffers = dict(theirs.named_buffers())
        for name, buffer in ours.named_buffers():
            assert buffer.dtype == buffers[name].dtype
            assert torch.equal(buffer, buffers[name]), name
        with torch.no_grad():
            assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_a_guest_is_saved_with_its_code_for_both(tmp_path: Path) -> None:
    place = repository(tmp_path / "guest", MODELING)
    ours = loadstone.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    ours.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == AUTO_MAP
    for library in (loadstone, transformers):
        again = library.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
        assert torch.equal(again(IDS).logits, ours(IDS).logits)


def test_buffers_that_a_peer_leaves_undefined(tmp_path: Path) -> None:
    """Built for real, they have the values that the code computes, whatever the library of the code does."""
    scaled = MODELING.replace(
        "    def forward",
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.register_buffer('three', torch.tensor(3.0), persistent=False)\n\n    def forward",
    )
    place = repository(
        tmp_path / "guest", "import torch\n" + scaled.replace("output.logits * 3", "output.logits * self.three")
    )
    plain = repository(tmp_path / "plain", MODELING)
    models = [loadstone.AutoModelForCausalLM.from_pretrained(one, trust_remote_code=True) for one in (place, plain)]
    assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)


FILES = ("modeling_x", "sub/modeling_y", "with-hyphen", "_z")


@pytest.fixture(scope="module")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("grammar")
    for name in FILES:
        (place / f"{name}.py").parent.mkdir(exist_ok=True)
        (place / f"{name}.py").write_text("class Cls: pass\nclass _Own: pass\n")
    return place


PIECES = st.sampled_from(
    [*FILES, "Cls", "_Own", ".", "..", "/", "--", "sub", "\\", ";", " ", "\0", "x", "__init__", "~"]
)


@given(st.lists(PIECES, min_size=1, max_size=5).map("".join))
@tiny.examples(300)
def test_references_that_transformers_takes(grammar: Path, reference: str) -> None:
    """What we take, transformers takes, and finds the same class; what it takes beyond that is not one file below."""
    ours: Any = None
    with contextlib.suppress(RemoteCodeError):
        ours = parse_reference(reference)
    if "--" in reference:  # another repository: no network here
        return
    try:
        theirs = transformers.dynamic_module_utils.get_class_from_dynamic_module(reference, str(grammar))
    except Exception:
        theirs = None
    exists = ours is not None and (grammar / ours.file).is_file() and ours.name in ("Cls", "_Own")
    if exists:
        assert theirs is not None
        assert theirs.__name__ == ours.name
    if theirs is not None and not exists:
        file = reference.partition(".")[0]
        assert "//" in file or file.startswith("/") or "\\" in file or ".." in file, reference
