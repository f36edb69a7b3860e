"""QLoRA: train a LoRA adapter on a text, over a base held in 4-bit NF4.

    python examples/qlora.py --text poems.txt --out adapter
    python examples/qlora.py --model meta-llama/Llama-2-7b-hf --text corpus.txt --out adapter --steps 500

Without --model it takes the small model that loadstone carries. It prints the memory of the base as the checkpoint has
it and quantized, how little of it is trained, and the loss; saves the adapter in PEFT's format; loads it back, and
checks that the loss is the same. ``AutoModelForCausalLM.from_pretrained(out)`` then loads base and adapter together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loadstone
from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, LoraConfig
from loadstone.loading import resolve_source
from loadstone.models.tokenizer import load_tokenizer

DEMO = Path(loadstone.__file__).parent / "models" / "demo"


def blocks_of(text: str, tokenizer: Any, length: int) -> Tensor:
    """The text as blocks of tokens, (blocks, length); what is left over at its end is dropped."""
    ids = tokenizer.encode(text)
    count = len(ids) // length
    if not count:
        raise SystemExit(f"the text has {len(ids)} tokens: too few for a block of {length}; choose a smaller --block")
    return torch.tensor(ids[: count * length]).view(count, length)


def mebibytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**20:.2f} MiB"


def quantized_base(args: argparse.Namespace) -> Any:
    """The base, quantized while it is read: only codes are ever held."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=args.dtype,
    )
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, quantization_config=quantization)


def train(model: Any, blocks: Tensor, args: argparse.Namespace) -> list[float]:
    """Train what has gradients, which is the adapter; the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    model.train()
    losses = []
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        batch = blocks[torch.randint(len(blocks), (args.batch,), generator=generator)].to(model.device)
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            print(f"step {step + 1}  loss {losses[-1]:.4f}", flush=True)
    model.eval()
    return losses


@torch.no_grad()
def loss_of(model: Any, blocks: Tensor) -> float:
    """The mean loss over the first blocks."""
    batch = blocks[:8].to(model.device)
    return float(model(batch, labels=batch, use_cache=False).loss)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(DEMO), help="directory or Hub repository id")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--out", type=Path, required=True, help="directory for the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="blocks a step")
    parser.add_argument("--block", type=int, default=128, help="tokens a block")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32",
                        help="of what is not quantized, and of the products")  # fmt: skip
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more work")
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Quantize, train, save, load back."""
    args = parse(argv)
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).get_memory_footprint()
    model = quantized_base(args)
    packed = model.get_memory_footprint()
    print(f"memory of the model: {mebibytes(plain)} as {args.dtype}, {mebibytes(packed)} in 4 bits")
    blocks = blocks_of(args.text.read_text(encoding="utf-8"), load_tokenizer(resolve_source(args.model)), args.block)
    before = loss_of(model, blocks)

    torch.manual_seed(args.seed)
    model.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules="all-linear")
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    print(f"trained: {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)")
    train(model, blocks, args)
    after = loss_of(model, blocks)
    model.save_adapter(args.out)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"adapter: {mebibytes(size)} in {args.out}; the model with it: {mebibytes(model.get_memory_footprint())}")

    again = quantized_base(args)
    again.load_adapter(args.out)
    loaded = loss_of(again, blocks)
    print(f"loss {before:.4f} before, {after:.4f} after, {loaded:.4f} loaded back", flush=True)
    if abs(loaded - after) > 1e-3 * after:
        raise SystemExit("the adapter that was loaded back is not the one that was trained")


if __name__ == "__main__":
    main()
