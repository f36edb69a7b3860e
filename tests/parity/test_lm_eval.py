"""lm-evaluation-harness on our models: the figures it gives for the peer's own."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from parity.peers import Case, transformers

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm_eval)")
WORDS = [f"{chr(97 + i % 26)}{i // 26}" for i in range(55)]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    ids = {**{word: i for i, word in enumerate(WORDS)}, "<eos>": 58, "<pad>": 59, "<unk>": 60}
    made = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_likelihoods_and_continuations_are_the_peers(kind: str) -> None:
    from lm_eval.models.huggingface import HFLM

    context = " ".join(WORDS[3:9])
    found = []
    for model in Case(kind, tiny.values(kind), 2).pair("sdpa"):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=2, max_length=48, device="cpu")
        likely = wrapped.loglikelihood([request("loglikelihood", context, f" {word}") for word in WORDS[:5]])
        rolling = wrapped.loglikelihood_rolling([request("loglikelihood_rolling", " ".join(WORDS))])
        options = {"until": ["<eos>"], "max_gen_toks": 6, "do_sample": False}
        texts = wrapped.generate_until([request("generate_until", context, dict(options)) for _ in range(2)])
        found.append((likely, rolling, texts))
    ours, theirs = found
    for mine, peers in zip(ours[0], theirs[0], strict=True):
        assert mine[0] == pytest.approx(peers[0], rel=1e-4)
        assert mine[1] == peers[1]
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
    assert ours[2] == theirs[2]
    assert torch.is_grad_enabled()
