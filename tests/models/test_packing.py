"""Sequences packed into one row: the same as each alone, however their ends are told."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone.errors import ArgumentError

SPELLINGS = ("position_ids", "cu_seq_lens", "seq_idx", "both", "all")


def packed(lengths: list[int], spelling: str) -> dict[str, Any]:
    """The keywords that tell the ends of sequences of these lengths."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    numbers = {"seq_idx": torch.cat([torch.full((n,), 5 - i) for i, n in enumerate(lengths)])[None].to(torch.int32)}
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {"position_ids": positions, "cu_seq_lens": flash, "seq_idx": numbers, "both": {**positions, **flash},
            "all": {**positions, **flash, **numbers}}[spelling]  # fmt: skip


@tiny.examples(30)
@given(data=st.data())
def test_packed_equals_alone(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(tiny.KINDS))
    attention = data.draw(st.sampled_from(("eager", "sdpa")))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    spelling = data.draw(st.sampled_from(SPELLINGS))
    if spelling == "position_ids" and len(lengths) == 1:
        lengths.append(3)
    model = tiny.model(kind, attn_implementation=attention)
    ids = torch.randint(0, 61, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    with torch.no_grad():
        together = model(ids, **packed(lengths, spelling)).logits
        alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_sequence_gets_no_gradient_from_another(kind: str, recomputed: bool) -> None:
    model = tiny.model(kind, attn_implementation="sdpa")
    if recomputed:
        model.gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attn_pdrop = 0.0
        model.train()
    embeds = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.full((1, 12), -100)
    labels[0, 6:9] = 3  # of the second sequence, 5 to 9
    model(inputs_embeds=embeds, labels=labels, **packed([5, 4, 3], "cu_seq_lens")).loss.backward()
    assert embeds.grad is not None
    reached = embeds.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [False] * 5 + [True] * 3 + [False] * 4


def test_padding_beside_ends() -> None:
    """Tokens that the mask hides stay hidden inside their sequence."""
    model = tiny.model("llama")
    ids = torch.arange(8)[None]
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        got = model(ids, attention_mask=mask, **packed([4, 4], "both")).logits
        torch.testing.assert_close(got[:, :3], model(ids[:, :3]).logits)
        torch.testing.assert_close(got[:, 4:], model(ids[:, 4:]).logits)


ENDS = torch.tensor([0, 3, 8])
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cu_seq_lens_q": torch.tensor([0, 3, 7])}, "0 to the 8 tokens"),
    ({"cu_seq_lens_q": torch.tensor([1, 8])}, "0 to the 8 tokens"),
    ({"cu_seq_lens_q": torch.tensor([0, 5, 3, 8])}, "0 to the 8 tokens"),
    ({"cu_seq_lens_q": torch.tensor([0.0, 8.0])}, "whole numbers"),
    ({"cu_seq_lens_q": ENDS[None]}, "whole numbers"),
    ({"cu_seq_lens_k": ENDS}, "without cu_seq_lens_q"),
    ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": torch.tensor([0, 4, 8])}, "differs"),
    ({"seq_idx": torch.zeros(8, dtype=torch.int32)}, "one number for each token"),
    ({"cu_seq_lens": ENDS}, "cu_seq_lens_q"),
]


@pytest.mark.parametrize(("keywords", "match"), REFUSED)
def test_refused(keywords: dict[str, Any], match: str) -> None:
    model = tiny.model("llama")
    with pytest.raises(ArgumentError, match=match):
        model(torch.arange(8)[None], **keywords)
    with pytest.raises(ArgumentError, match=match):
        model.model(torch.arange(8)[None], **keywords)


def test_refused_beside_what_contradicts_it() -> None:
    model = tiny.model("llama")
    ids = torch.arange(8)[None]
    with pytest.raises(ArgumentError, match="one row"):
        model(ids.expand(2, -1), cu_seq_lens_q=ENDS)
    with pytest.raises(ArgumentError, match="past"):
        model(ids, cu_seq_lens_q=ENDS, past_key_values=model(ids).past_key_values)
    with pytest.raises(ArgumentError, match="dense"):
        model(ids, cu_seq_lens_q=ENDS, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
