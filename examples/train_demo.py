"""Train the demo model that loadstone ships: a small byte-level Llama of the King James Bible.

    sudo apt-get install bible-kjv                       # Debian, Ubuntu; the text is in the public domain
    bible -f gen1:1-rev22:21 < /dev/null > kjv.txt       # one verse a line, "Ge1:1 In the beginning ..."
    python examples/train_demo.py --text kjv.txt --out models/demo

Any other text works too; lines are taken as they are, less a reference such as "Ge1:1" at their start.
The same text, options, torch and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from loadstone import LlamaConfig, LlamaForCausalLM
from loadstone.models.tokenizer import ByteTokenizer

REFERENCE = re.compile(r"^([0-9]?[A-Za-z]+[0-9]+):[0-9]+ ")
CARD = """\
---
language: en
license: apache-2.0
library_name: loadstone
pipeline_tag: text-generation
---

# loadstone demo: a small Llama of the King James Bible

A byte-level Llama with {parameters:,} parameters that continues text in the manner of the King James Bible. It is
there so that `loadstone demo`, the examples and the tests have a real model at hand. It knows nothing; do not ask it
for facts or for verses.

| | |
|---|---|
| Shape | {layers} layers, hidden {hidden}, {heads} heads over {kv_heads} key heads, MLP {mlp}, tied embeddings |
| Vocabulary | {vocab}: the 256 bytes, `<bos>`, `<eos>` |
| Context | {context} bytes in training |
| Weights | {dtype}, safetensors |
| Text | King James Bible of 1611 (text out of copyright), Debian package `bible-kjv-text` |
| Split | {train_bytes:,} bytes to train, {held_bytes:,} held out (every {every}th chapter) |
| Training | {steps} steps of {batch} x {context} bytes ({epochs:.1f} epochs), AdamW, one CPU core |
| Loss on the held-out chapters | {held_loss:.4f} nats a byte ({bits:.3f} bits) |

## How it was made

```
bible -f gen1:1-rev22:21 < /dev/null > kjv.txt
{command}
```

## A sample

Temperature 0.7, seed 0, prompt "And it came to pass":

```
{sample}
```

## Licence

The text is in the public domain (in the United Kingdom its printing is subject to a royal patent). The weights come
under the licence of loadstone, Apache-2.0.
"""


def chapters(text: str) -> list[str]:
    """The chapters of a text whose lines start with references such as "Ge1:1"; the whole text if none does."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        match = REFERENCE.match(line)
        name = match[1] if match else (found[-1][0] if found else "")
        if not found or found[-1][0] != name:
            found.append((name, []))
        found[-1][1].append(line[match.end() :] if match else line)
    return ["\n".join(lines) + "\n" for _, lines in found]


def as_tokens(documents: list[str], tokenizer: ByteTokenizer) -> torch.Tensor:
    """All documents one after another, each between <bos> and <eos>: (tokens,), int64."""
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in documents]
    return torch.tensor([token for document in ids for token in document])


def batches(tokens: torch.Tensor, batch: int, context: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches (batch, context) of blocks: each epoch cuts the text at another offset and shuffles."""
    while True:
        offset = int(torch.randint(context, (), generator=generator))
        count = (len(tokens) - offset) // context
        blocks = tokens[offset : offset + count * context].view(count, context)
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            yield blocks[order[start : start + batch]]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, context: int) -> float:
    """Mean loss in nats a byte over blocks of the text."""
    model.eval()
    blocks = tokens[: len(tokens) // context * context].view(-1, context)
    total = sum(float(model(block, labels=block, use_cache=False).loss) * len(block) for block in blocks.split(32))
    model.train()
    return total / len(blocks)


def rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate: linear warm-up, then a cosine to a twentieth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def build(args: argparse.Namespace, tokenizer: ByteTokenizer) -> LlamaForCausalLM:
    """The model, initialised from the seed."""
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held: torch.Tensor, args: argparse.Namespace) -> None:
    """Run the steps, printing the loss and saving as it goes."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if args.compile else model
    source = batches(tokens, args.batch, args.context, torch.Generator().manual_seed(args.seed))
    model.train()
    start = saved = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        block = next(source)
        loss = forward(block, labels=block, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        now = time.monotonic()
        if step % args.log_every == 0 or step == args.steps - 1:
            speed = (step + 1) * block.numel() / (now - start)
            print(
                f"step {step:5d}  loss {loss.item():.4f}  lr {rate(step, args):.2e}  {speed:,.0f} bytes/s", flush=True
            )
        if now - saved > args.save_seconds:
            model.save_pretrained(args.out)
            saved = now
        if args.eval_every and (step + 1) % args.eval_every == 0:
            print(
                f"step {step:5d}  held-out loss {held_out_loss(model, held[: 40 * 1024], args.context):.4f}", flush=True
            )


def describe(model: LlamaForCausalLM, args: argparse.Namespace, sizes: tuple[int, int], held: float) -> str:
    """The model card."""
    tokenizer = ByteTokenizer()
    prompt = torch.tensor([tokenizer.encode("And it came to pass")])
    model.eval()
    sampled = model.generate(
        prompt, max_new_tokens=230, do_sample=True, temperature=0.7, generator=torch.Generator().manual_seed(0)
    )
    config = model.config
    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in ("steps", "batch", "lr", "seed"))
    options += " --compile" if args.compile else ""
    return CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        context=args.context,
        dtype=str(model.dtype).removeprefix("torch."),
        train_bytes=sizes[0],
        held_bytes=sizes[1],
        every=args.hold_out_every,
        steps=args.steps,
        batch=args.batch,
        epochs=args.steps * args.batch * args.context / sizes[0],
        held_loss=held,
        bits=held / math.log(2),
        command=f"OMP_NUM_THREADS=1 python examples/train_demo.py --text kjv.txt --out models/demo {options}",
        sample=tokenizer.decode(sampled[0].tolist()),
    )


def main(argv: list[str] | None = None) -> None:
    """Read the text, train, save, write the card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, one verse or paragraph a line")
    parser.add_argument("--out", type=Path, required=True, help="directory to save to")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--context", type=int, default=256, help="bytes a block")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--mlp", type=int, default=432)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold-out-every", type=int, default=40, help="every n-th chapter is held out")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--save-seconds", type=float, default=60)
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward (other rounding)")
    args = parser.parse_args(argv)

    tokenizer = ByteTokenizer()
    documents = chapters(args.text.read_text(encoding="utf-8"))
    held = as_tokens(documents[args.hold_out_every - 1 :: args.hold_out_every], tokenizer)
    kept = [text for i, text in enumerate(documents) if i % args.hold_out_every != args.hold_out_every - 1]
    tokens = as_tokens(kept, tokenizer)
    model = build(args, tokenizer)
    print(
        f"{len(documents)} chapters, {len(tokens):,} bytes to train, {len(held):,} held out; "
        f"{model.num_parameters():,} parameters",
        flush=True,
    )
    train(model, tokens, held, args)
    loss = held_out_loss(model, held, args.context)
    print(f"held-out loss {loss:.4f} nats a byte", flush=True)
    model.save_pretrained(args.out)
    (args.out / "tokenizer_config.json").write_text(json.dumps(tokenizer.to_dict(), indent=2) + "\n", encoding="utf-8")
    card = describe(model, args, (len(tokens), len(held)), loss)
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
