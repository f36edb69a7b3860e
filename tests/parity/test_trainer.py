"""transformers' Trainer and accelerate's loop on our models: the losses of the peer's own model, files that load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity.peers import Case, transformers
from torch.utils.data import Dataset

from loadstone import AutoModelForCausalLM

accelerate = pytest.importorskip("accelerate")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
kinds = pytest.mark.parametrize("kind", tiny.KINDS)


class Rows(Dataset[Any]):
    """Rows that count upwards, of several lengths, some labels ignored: what makes counting labels matter."""

    def __init__(self, count: int = 24, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 13, (count,), generator=draw).tolist()
        starts = torch.randint(0, 60, (count,), generator=draw).tolist()
        self.rows = [(torch.arange(n) + start) % 60 + 1 for n, start in zip(lengths, starts, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.rows[index]
        labels = ids.clone()
        labels[: index % 3] = -100
        return {"input_ids": ids, "labels": labels}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Right-padded, with a mask."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True)
    mask = pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask,
            "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)}  # fmt: skip


def pair(kind: str, **overrides: Any) -> tuple[Any, Any]:
    values = tiny.values(kind, **(NO_DROPOUT if kind == "gpt2" else {}), **overrides)
    return Case(kind, values, 3).pair("sdpa")


def trainer(model: Any, out: Path, data: Any = None, **options: Any) -> Any:
    """A Trainer of six steps that logs each."""
    given: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 5, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, **options,
    }  # fmt: skip
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**given),
        train_dataset=Rows() if data is None else data,
        eval_dataset=Rows(8, seed=1),
        data_collator=collate,
    )


def losses(run: Any) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def scale(kind: str, run: Any) -> None:
    """transformers counts a GPT-2's labels without shifting them (it knows the loss by the class's name), which makes
    its losses too small by the share of first labels; ours are told it the right way."""
    if kind == "gpt2":
        run._loss_shifts_labels = True


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    "every second": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize(
    ("kind", "option"),
    [(kind, option) for option in OPTIONS for kind in tiny.KINDS if "gradient_checkpointing" not in OPTIONS[option]]
    + [("llama", "checkpointing"), ("gpt2", "every second"), ("mistral", "reentrant")],
)
def test_losses_are_the_peers(kind: str, option: str, tmp_path: Path) -> None:
    curves = []
    for name, model in zip(("ours", "theirs"), pair(kind), strict=True):
        run = trainer(model, tmp_path / name, **OPTIONS[option])
        assert run.model_accepts_loss_kwargs
        scale(kind, run)
        run.train()
        curves.append(losses(run))
        if option in ("checkpointing", "every second"):
            assert model.is_activation_checkpointing
    assert len(set(curves[0])) == 6
    assert curves[0] == pytest.approx(curves[1], rel=2e-4)


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    """With rows of several lengths only `num_items_in_batch`, counted over all of them, makes them so."""
    curves = []
    for size, steps in ((6, 1), (2, 3), (1, 6)):
        run = trainer(pair("llama")[0], tmp_path, gradient_accumulation_steps=steps, per_device_train_batch_size=size)
        run.train()
        curves.append(losses(run))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


@kinds
def test_bfloat16(kind: str, tmp_path: Path) -> None:
    """Autocast, and weights in bf16: near the peer's, which rounds elsewhere."""
    for name, options, dtype in (("autocast", {"bf16": True}, None), ("weights", {}, torch.bfloat16)):
        curves = []
        for side, model in zip(("ours", "theirs"), pair(kind), strict=True):
            run = trainer(model.to(dtype) if dtype else model, tmp_path / name / side, **options)
            scale(kind, run)
            run.train()
            curves.append(losses(run))
            assert model.dtype == (dtype or torch.float32)
        assert curves[0] == pytest.approx(curves[1], rel=0.03)


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_is_unbroken_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tiny.model("gpt2", tie_word_embeddings=tied), tmp_path / "whole", **options)  # with dropout
    whole.train()
    again = trainer(tiny.model("gpt2", seed=8, tie_word_embeddings=tied), tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again)[-3:] == losses(whole)[-3:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert (again.model.lm_head.weight is again.model.transformer.wte.weight) == tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "checkpoint-6")
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in loaded.state_dict().items())


@kinds
def test_best_model_evaluation_and_saving(kind: str, tmp_path: Path) -> None:
    mine, peer = pair(kind)
    metrics = []
    for side, model in (("ours", mine), ("theirs", peer)):
        # a rate that makes the held-out loss rise again, so that the best is not the last
        run = trainer(
            model, tmp_path / side, max_steps=8, learning_rate=0.5, eval_strategy="steps", eval_steps=2,
            save_strategy="steps", save_steps=2, load_best_model_at_end=True, per_device_eval_batch_size=4,
        )  # fmt: skip
        scale(kind, run)
        run.train()
        rows = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
        assert len(rows) == 4
        best = run.evaluate()["eval_loss"]
        assert best == pytest.approx(min(rows), rel=1e-5)
        metrics.append(rows[:1])
        run.save_model(str(tmp_path / side / "best"))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-2)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "best")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "best")
    for name, value in mine.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert torch.equal(theirs.state_dict()[name], value)


@kinds
def test_predictions_are_the_peers(kind: str, tmp_path: Path) -> None:
    """Logits are there although training takes the loss without them, and nothing else comes along."""
    mine, peer = pair(kind)
    batch = collate([Rows()[index] for index in range(4)])
    found = []
    for model in (mine, peer):
        run = trainer(model, tmp_path)
        scale(kind, run)
        model.train()  # the state a training leaves it in; the Trainer's loops call eval() first
        model.eval()
        loss, logits, labels = run.prediction_step(model, dict(batch), prediction_loss_only=False)
        only = run.prediction_step(model, dict(batch), prediction_loss_only=True)
        assert only[1] is only[2] is None
        assert torch.equal(labels, batch["labels"])
        found.append((loss, logits, only[0]))
        whole = run.predict(Rows(8, seed=1))
        assert whole.predictions.shape[2] == 61
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_packed_by_the_flattening_collator(tmp_path: Path) -> None:
    """The collator's ends of sequences: the loss of the padded batch."""
    rows = [Rows()[index] for index in range(3)]
    mine, peer = pair("llama")
    mine.train()
    want = mine(**collate(rows)).loss
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True, "return_position_ids": False}):
        batch = transformers.DataCollatorWithFlattening(**options)(rows)
        assert batch["input_ids"].shape[0] == 1
        torch.testing.assert_close(mine(**batch).loss, want)
        if "position_ids" in batch:
            torch.testing.assert_close(mine(**batch).loss, peer(**batch, use_cache=False).loss)


def test_counted_work_and_tags(tmp_path: Path) -> None:
    mine, peer = pair("llama")
    done = []
    for model in (mine, peer):
        run = trainer(model, tmp_path, max_steps=1, include_num_input_tokens_seen=True)
        run.train()
        done.append((run.state.total_flos, run.state.num_input_tokens_seen))
        model.add_model_tags(["one", "two"])
        model.add_model_tags("one")
        assert model.model_tags == ["one", "two"]
    assert done[0] == done[1]
    assert done[0][0] > 0


# accelerate


@pytest.fixture
def accelerator() -> Any:
    """A fresh one: its state lives as long as the process."""

    def make(**options: Any) -> Any:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def loop(acc: Any, model: Any, steps: int, place: Path | None = None, start: int = 0) -> list[float]:
    """The loop of accelerate's manual, saving after three steps if told where."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, collate_fn=collate)
    model, optimizer, loader = acc.prepare(model, optimizer, loader)
    model.train()
    seen = []
    for number, batch in enumerate(loader):
        if number < start or number >= steps:
            continue
        if start and number == start:  # here, as beginning to iterate drew a number from torch's generator
            acc.load_state(str(place))
        with acc.accumulate(model):
            loss = model(**batch).loss
            acc.backward(loss)
            if acc.sync_gradients:
                acc.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seen.append(loss.item())
        if place is not None and number == 2 and not start:
            acc.save_state(str(place))
    return seen


@kinds
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_loop(kind: str, precision: str, accelerator: Any) -> None:
    curves = [
        loop(accelerator(mixed_precision=precision, gradient_accumulation_steps=2), model, 6) for model in pair(kind)
    ]
    assert len(curves[0]) == 6
    assert curves[0] == pytest.approx(curves[1], rel=1e-4 if precision == "no" else 0.03)


@pytest.mark.parametrize("tied", [False, True])
def test_accelerate_saves_resumes_and_unwraps(tied: bool, accelerator: Any, tmp_path: Path) -> None:
    model = tiny.model("gpt2", tie_word_embeddings=tied)
    whole = loop(accelerator(), model, 6, tmp_path / "state")
    acc = accelerator()
    again = tiny.model("gpt2", seed=4, tie_word_embeddings=tied)
    assert loop(acc, again, 6, tmp_path / "state", start=3) == whole[3:]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    plain = acc.unwrap_model(acc.prepare(again))
    assert type(plain) is tiny.MODELS["gpt2"]
    plain.save_pretrained(tmp_path / "m", is_main_process=acc.is_main_process, save_function=acc.save)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in loaded.state_dict().items())


@pytest.mark.parametrize("wrapper", ["plain", "accelerate", "compile", "deepcopy", "half", "peft"])
def test_tied_weights_stay_one_under_every_wrapper(wrapper: str, accelerator: Any) -> None:
    """One parameter, one gradient, one step of the optimizer."""
    model = tiny.model("gpt2").train()
    if wrapper == "half":
        model.to(torch.bfloat16)
    wrapped = model
    if wrapper == "accelerate":
        wrapped = accelerator().prepare(model)
    elif wrapper == "compile":
        wrapped = torch.compile(model, backend="eager")
    elif wrapper == "deepcopy":
        wrapped = model = copy.deepcopy(model)
    elif wrapper == "peft":
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"))
        model.transformer.wte.requires_grad_(True)
    ids = torch.arange(9)[None]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    before = model.lm_head.weight.detach().clone()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    optimizer.step()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len([p for p in wrapped.parameters() if p is model.lm_head.weight]) == 1
    torch.testing.assert_close(model.lm_head.weight.detach(), before - 0.1 * gradient, rtol=0.02, atol=1e-3)
    assert not torch.equal(model.lm_head.weight, before)


# Our own adapters under the Trainer


def test_our_adapters_train_and_save(tmp_path: Path) -> None:
    from loadstone import LoraConfig

    model = tiny.model("llama")
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=6, gradient_checkpointing=True)
    run.train()
    for name, value in frozen.items():
        held = name.replace(".weight", ".base_layer.weight")
        parameters = dict(model.named_parameters())
        assert torch.equal(parameters.get(held, parameters.get(name)), value)
    again = tiny.model("llama")
    again.load_adapter(tmp_path / "checkpoint-6", is_trainable=True)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
        assert not torch.allclose(again(ids).logits, tiny.model("llama")(ids).logits, atol=1e-3)


def test_adapters_over_four_bits(tmp_path: Path) -> None:
    """QLoRA under the Trainer: PEFT's adapters and ours learn the same over codes that stay; PEFT's resume."""
    from loadstone import BitsAndBytesConfig, LoraConfig

    peft = pytest.importorskip("peft")
    tiny.model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    steps = {"save_strategy": "steps", "save_steps": 3, "gradient_checkpointing": True}

    def adapted(wrapper: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4, device_map="cpu")
        if wrapper == "ours":
            model.add_adapter(LoraConfig(**lora))
        else:
            model = peft.get_peft_model(model, peft.LoraConfig(**lora, task_type="CAUSAL_LM"))
        draw = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
        return model

    curves = {}
    for wrapper in ("ours", "peft"):
        model = adapted(wrapper)
        codes = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        run = trainer(model, tmp_path / wrapper, **steps)
        run.train()
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in codes.items())
        assert (tmp_path / wrapper / "checkpoint-6" / "adapter_model.safetensors").exists()
        curves[wrapper] = losses(run)
    assert len(set(curves["ours"])) == 6
    assert curves["ours"] == pytest.approx(curves["peft"], rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4, device_map="cpu")
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer(plain, tmp_path / "plain")
    again = trainer(adapted("peft"), tmp_path / "again", **steps)
    again.train(resume_from_checkpoint=str(tmp_path / "peft" / "checkpoint-3"))
    assert losses(again)[-3:] == curves["peft"][-3:]


def test_compiled(tmp_path: Path) -> None:
    """`torch_compile=True` sees through the class that `isinstance` sees, and gives the same losses."""
    curves = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        run = trainer(pair("llama")[0], tmp_path, max_steps=3, **options)
        run.train()
        curves.append(losses(run))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    torch._dynamo.reset()


def test_packed_rows_compile_whole() -> None:
    torch._dynamo.reset()
    model = pair("llama")[0].train()
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)([Rows()[i] for i in range(3)])
    want = model(**batch, use_cache=False).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch, use_cache=False).loss, want)
    torch._dynamo.reset()


def test_noise_metrics_and_the_card(tmp_path: Path) -> None:
    """NEFTune's hook on the embedding, metrics over logits, and the model card."""
    curves = []
    for side, model in zip(("ours", "theirs"), pair("llama"), strict=True):
        run = trainer(model, tmp_path / side, max_steps=3, neftune_noise_alpha=5.0)
        run.compute_metrics = lambda found: {"right": float((found.predictions == found.label_ids).mean())}
        run.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
        run.train()
        curves.append([*losses(run), run.evaluate()["eval_right"]])
        run.create_model_card(model_name="tiny")
        assert "tiny" in (tmp_path / side / "README.md").read_text()
        assert not model.get_input_embeddings()._forward_hooks
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_seeds_reproduce(tmp_path: Path) -> None:
    """With dropout: the same seed gives the same losses, another gives others."""
    curves = []
    for seed in (5, 5, 6):
        run = trainer(tiny.model("gpt2"), tmp_path, max_steps=3, seed=seed, data_seed=1)
        run.train()
        curves.append(losses(run))
    assert curves[0] == curves[1] != curves[2]
