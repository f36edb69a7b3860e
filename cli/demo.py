"""``loadstone demo``: the embedded model loaded, heard, fine-tuned, heard again, saved and reloaded."""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..loading.source import resolve_source
from ..models.tokenizer import Tokenizer, load_tokenizer
from ..registry import AutoModelForCausalLM
from .output import Output, count, print_json, sparkline
from .place import DEMO
from .rhymes import PROMPTS, RHYMES

_NEW_TOKENS = 160
_RATE = 2e-3


def run(arguments: argparse.Namespace) -> None:
    """Run the demo and print, or with ``--json`` collect, what happened.

    On one thread: the model is too small to gain from more, and sums come out the same on every machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _run(arguments)
    finally:
        torch.set_num_threads(threads)


def _run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    output = None if arguments.json else Output()
    fingerprint = _fingerprint()
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    tokenizer = load_tokenizer(resolve_source(DEMO))
    facts: dict[str, Any] = {"parameters": model.num_parameters(), "load": model.load_report.to_dict()}
    if output:
        output.heading("1. Load: AutoModelForCausalLM.from_pretrained(...)")
        output.line(str(model.load_report))
        output.line(f"{count(model.num_parameters())} parameters, a byte-level Llama of the King James Bible")

    _head(output, "2. Generate: model.generate(...)")
    facts["before"] = _hear(model, tokenizer, arguments.seed, output)
    _head(output, f"3. Fine-tune on {len(RHYMES)} nursery rhymes: {arguments.steps} steps of AdamW")
    facts["losses"] = losses = _fine_tune(model, _batch(tokenizer), arguments.steps, output)
    if output:
        output.line(f"loss {sparkline(losses)}")
        output.line(f"from {losses[0]:.3f} to {losses[-1]:.3f} nats a byte")
    _head(output, "4. Generate again, with the same prompts and the same seed")
    facts["after"] = _hear(model, tokenizer, arguments.seed, output)

    with ExitStack() as stack:
        directory = Path(arguments.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="loadstone-demo-")))
        _head(output, "5. Save and reload: model.save_pretrained(...)")
        model.save_pretrained(directory)
        (directory / "tokenizer_config.json").write_bytes((DEMO / "tokenizer_config.json").read_bytes())
        facts["files"] = sorted(path.name for path in directory.iterdir())
        facts["reloaded_bit_for_bit"] = _same(model, AutoModelForCausalLM.from_pretrained(directory))
    facts["kept"] = str(directory) if arguments.keep else None
    facts["embedded_model_untouched"] = _fingerprint() == fingerprint
    facts["seconds"] = time.perf_counter() - started
    if output is None:
        print_json(facts)
        return
    output.line(f"wrote {', '.join(facts['files'])}" + (f" to {directory}" if arguments.keep else ""))
    output.line(f"reloaded weights equal bit for bit: {_yes(facts['reloaded_bit_for_bit'])}")
    output.line(f"the embedded model's file, which was trained on as a mapping, is unchanged: "
                f"{_yes(facts['embedded_model_untouched'])}")  # fmt: skip
    output.heading(f"Done in {facts['seconds']:.0f} s")


def _head(output: Output | None, text: str) -> None:
    if output is not None:
        output.heading(text)


def _yes(fact: bool) -> str:
    return "yes" if fact else "NO"


def _hear(model: Any, tokenizer: Tokenizer, seed: int, output: Output | None) -> list[str]:
    """Sample a continuation of each prompt, all from the same seed."""
    texts = []
    for prompt in PROMPTS:
        generator = torch.Generator(model.device).manual_seed(seed)
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
        rows = model.generate(
            ids, max_new_tokens=_NEW_TOKENS, do_sample=True, temperature=0.6, top_k=0, generator=generator
        )
        texts.append(tokenizer.decode(rows[0].tolist()).rstrip())
        if output is not None:
            output.write("> ", "green")
            output.line(texts[-1])
    return texts


def _batch(tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """All rhymes as one batch padded on the right: (input_ids, attention_mask, labels), each (rhymes, longest)."""
    assert tokenizer.eos_token_id is not None
    rows = [torch.tensor([*tokenizer.encode(text), tokenizer.eos_token_id]) for text in RHYMES]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids, mask, ids.masked_fill(mask == 0, -100)


def _fine_tune(model: Any, batch: tuple[Tensor, Tensor, Tensor], steps: int, output: Output | None) -> list[float]:
    """Train on the same batch for some steps; the losses before each step and after the last."""
    ids, mask, labels = batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        losses.append(loss.item())
        if output is not None:
            output.progress(f"step {step}/{steps}  loss {losses[-1]:.3f}", last=step == steps)
        if step < steps:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    return losses


def _same(one: Any, other: Any) -> bool:
    """Whether two models hold the same bits under the same names."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8))
        for name in left
    )


def _fingerprint() -> str:
    return hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()
