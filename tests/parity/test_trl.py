"""TRL's SFTTrainer on our models: the losses of the peer's own model, padded and packed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity.peers import Case, transformers

from loadstone import AutoModelForCausalLM

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
datasets = pytest.importorskip("datasets", reason="TRL's datasets is not installed")
WORDS = [f"{chr(97 + i % 26)}{i // 26}" for i in range(55)]


def tokenizer() -> Any:
    """A word is a token; the model's vocabulary has 61."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    ids = {**{word: i for i, word in enumerate(WORDS)}, "<eos>": 58, "<pad>": 59, "<unk>": 60}
    made = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def data(name: str, columns: dict[str, list[str]]) -> Any:
    """A data set whose fingerprint is given, as the one that would be computed pickles the table."""
    import pyarrow

    return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(columns)), fingerprint=name)


def words(first: int, count: int) -> str:
    return " ".join(WORDS[(first + j) % 55] for j in range(count))


def texts() -> Any:
    """Lines of words in order, of several lengths."""
    return data("rows-of-words", {"text": [words(i * 3, 5 + i % 7) for i in range(32)]})


OPTIONS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "max_length": 32},
    "padding free": {"padding_free": True, "max_length": None},
    "smoothed": {"gradient_checkpointing": False, "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_losses_are_the_peers(option: str, tmp_path: Path) -> None:
    curves = []
    for side, model in zip(("ours", "theirs"), Case("llama", tiny.values("llama"), 3).pair("sdpa"), strict=True):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / side), max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to=[],
            use_cpu=True, bf16=False, save_strategy="steps", save_steps=4, learning_rate=1e-2, disable_tqdm=True,
            **OPTIONS[option],
        )  # fmt: skip
        rows = texts()
        run = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows.select(range(8)),
            processing_class=tokenizer(),
        )  # fmt: skip
        run.train()
        curves.append([row["loss"] for row in run.state.log_history if "loss" in row] + [run.evaluate()["eval_loss"]])
    assert len(set(curves[0])) == 5
    assert curves[0] == pytest.approx(curves[1], rel=2e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-4")
    saved_by_peer = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs" / "checkpoint-4")
    assert saved.state_dict().keys() == saved_by_peer.state_dict().keys()
    with torch.no_grad():
        ids = torch.arange(9)[None]
        torch.testing.assert_close(saved(ids).logits, saved_by_peer(ids).logits, rtol=2e-2, atol=2e-2)


def test_qlora(tmp_path: Path) -> None:
    """`peft_config=` on a model of 4 bits: the codes stay, the adapter learns and loads."""
    peft = pytest.importorskip("peft")
    from loadstone import BitsAndBytesConfig

    tiny.model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4, device_map="cpu")
    codes = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, save_strategy="steps", save_steps=4, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    run = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=texts(), processing_class=tokenizer(), peft_config=lora
    )
    run.train()
    assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, codes)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4, device_map="cpu")
    with torch.no_grad():
        before = again(torch.arange(9)[None]).logits
        again.load_adapter(tmp_path / "out" / "checkpoint-4")
        assert not torch.allclose(again(torch.arange(9)[None]).logits, before, atol=1e-3)


def arguments(kind: Any, place: Path, **options: Any) -> Any:
    return kind(
        output_dir=str(place), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", learning_rate=1e-2, disable_tqdm=True, **options,
    )  # fmt: skip


def test_preferences(tmp_path: Path) -> None:
    """DPO, with the reference given: by name TRL would load it with transformers."""
    rows = {
        "prompt": [words(i, 4) for i in range(16)],
        "chosen": [f" {words(i + 4, 4)}" for i in range(16)],
        "rejected": [f" {words(i + 9, 3)}" for i in range(16)],
    }
    curves = []
    for side, model in zip(("ours", "theirs"), Case("llama", tiny.values("llama"), 3).pair("sdpa"), strict=True):
        run = trl.DPOTrainer(
            model=model, ref_model=copy.deepcopy(model), args=arguments(trl.DPOConfig, tmp_path / side),
            train_dataset=data("pairs", rows), processing_class=tokenizer(),
        )  # fmt: skip
        run.train()
        curves.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert len(set(curves[0])) == 2
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_rewards(tmp_path: Path) -> None:
    """GRPO, which generates by transformers' GenerationConfig: our `generate` draws what theirs draws."""
    seen: dict[str, list[str]] = {}
    for side, model in zip(("ours", "theirs"), Case("llama", tiny.values("llama"), 3).pair("sdpa"), strict=True):
        texts = seen.setdefault(side, [])

        def reward(completions: list[str], texts: list[str] = texts, **_: Any) -> list[float]:
            texts.extend(completions)
            return [float(len(set(text))) for text in completions]

        options = {"num_generations": 4, "max_completion_length": 6, "beta": 0.0}
        run = trl.GRPOTrainer(
            model=model, args=arguments(trl.GRPOConfig, tmp_path / side, **options), reward_funcs=reward,
            train_dataset=data("prompts", {"prompt": [words(i, 4) for i in range(16)]}), processing_class=tokenizer(),
        )  # fmt: skip
        run.train()
    assert len(set(seen["ours"])) > 2
    assert seen["ours"] == seen["theirs"]
