"""Fine-tune a causal language model on a text file.

    python examples/finetune.py --model models/demo --text poems.txt --out tuned --steps 300
    python examples/finetune.py --model models/demo --text poems.txt --out tuned --steps 300 --resume   # after Ctrl-C
    accelerate launch examples/finetune.py --model meta-llama/Llama-2-7b-hf --text corpus.txt --out tuned --bf16

The text is cut into blocks without padding; its last part is held out. Every choice of a step (its blocks, its
learning rate, its randomness) follows from the seed and the step's number or is in the checkpoint, so that a run that
was interrupted and resumed equals one that was not: bit for bit on the CPU, up to the GPU's own rounding there.
Ctrl-C (or SIGTERM) ends after the step at hand and saves. What is to be seen of it is in `watch.py`: a bar, tokens/s,
FLOP/s and their share of a stated peak, memory, losses; as lines, TensorBoard and a plot in --out.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from watch import Watch, operations_a_token, stated_peak, stoppable

from loadstone import AutoModelForCausalLM
from loadstone.loading import resolve_source
from loadstone.models.tokenizer import Tokenizer, load_tokenizer

STATE = "training_state.pt"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")


class Blocks:
    """A text as blocks of tokens, in an order that depends on the seed and the epoch alone."""

    def __init__(self, text: str, tokenizer: Tokenizer, block: int, held_out: float, seed: int) -> None:
        ids = tokenizer.encode(text)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        count = len(ids) // block
        held = max(1, round(count * held_out)) if held_out else 0
        if count - held < 1:
            raise SystemExit(f"the text has {len(ids)} tokens: too few for blocks of {block}; choose a smaller --block")
        blocks = torch.tensor(ids[: count * block]).view(count, block)
        self.train, self.held = blocks[: count - held], blocks[count - held :]
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def order(self, epoch: int) -> Tensor:
        """The order of the blocks in one epoch."""
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = torch.randperm(len(self.train), generator=generator)
        return self._orders[epoch]

    def batch(self, number: int, size: int) -> Tensor:
        """The ``number``-th batch of the run, (size, block): epochs follow each other without a seam."""
        places = (divmod(position, len(self.train)) for position in range(number * size, (number + 1) * size))
        return self.train[[int(self.order(epoch)[place]) for epoch, place in places]]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model: Any, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))


def train_step(
    model: Any, optimizer: Any, blocks: Blocks, step: int, args: argparse.Namespace, acc: Accelerator
) -> float:
    """One optimizer step over ``--accumulate`` batches on each process; the mean loss."""
    rate = learning_rate(step, args)
    for group in optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=acc.device)
    for micro in range(args.accumulate):
        with acc.accumulate(model):
            number = (step * args.accumulate + micro) * acc.num_processes + acc.process_index
            batch = blocks.batch(number, args.batch).to(acc.device)
            loss = model(batch, labels=batch, use_cache=False).loss
            acc.backward(loss)
            if acc.sync_gradients:
                acc.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() / args.accumulate
    return float(acc.reduce(total, reduction="mean"))


@torch.no_grad()
def held_out_loss(model: Any, blocks: Blocks, args: argparse.Namespace, acc: Accelerator) -> float | None:
    """Mean loss a token over the held-out blocks, each process taking its share; None if nothing is held out."""
    if not len(blocks.held):
        return None
    model.eval()
    sums = torch.zeros(2, device=acc.device)
    for batch in blocks.held[acc.process_index :: acc.num_processes].split(args.batch):
        batch = batch.to(acc.device)
        sums += torch.stack(
            [model(batch, labels=batch, use_cache=False).loss * len(batch), sums.new_tensor(len(batch))]
        )
    model.train()
    total, count = acc.reduce(sums, reduction="sum").tolist()
    return total / count


def save(model: Any, optimizer: Any, step: int, args: argparse.Namespace, acc: Accelerator) -> None:
    """A checkpoint that loads like any model and from which ``--resume`` continues.

    It is complete once its training state is there: that file is written last, in one step.
    """
    acc.wait_for_everyone()
    random = gather_object([torch.get_rng_state()])
    if not acc.is_main_process:
        return
    directory = args.out / f"step-{step:06d}"
    acc.unwrap_model(model).save_pretrained(directory)
    source = resolve_source(args.model)
    for name in TOKENIZER_FILES:
        if (path := source.find(name)) is not None:
            shutil.copyfile(path, directory / name)
    state = {"step": step, "optimizer": optimizer.state_dict(), "random": random}
    if torch.cuda.is_available():
        state["cuda_random"] = torch.cuda.get_rng_state()
    torch.save(state, directory / f".{STATE}")
    os.replace(directory / f".{STATE}", directory / STATE)
    for old in checkpoints(args.out)[: -args.keep]:
        shutil.rmtree(old)


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in out.glob(f"step-*/{STATE}") if re.fullmatch(r"step-\d+", path.parent.name))


def restore(directory: Path, optimizer: Any, acc: Accelerator) -> int:
    """Bring back the optimizer and the randomness; returns the number of steps done."""
    state = torch.load(directory / STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"][acc.process_index % len(state["random"])])
    if torch.cuda.is_available() and "cuda_random" in state:
        torch.cuda.set_rng_state(state["cuda_random"])
    return state["step"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="directory or Hub repository id")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints, log.jsonl and log.png")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="blocks a batch, on each process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--block", type=int, default=256, help="tokens a block")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the text that is not trained on")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 on the CPU too (on GPUs that have it "
                        "this is the default); weights and optimizer stay float32")  # fmt: skip
    parser.add_argument("--fp32", action="store_true", help="compute in float32 on GPUs too")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more work")
    parser.add_argument("--peak-tflops", type=float, help="of this machine, for the share of it that is used (mfu); "
                        "known for common GPUs")  # fmt: skip
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--eval-every", type=int, default=100, help="steps")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints to keep")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out, if any")
    parser.add_argument("--stop-after", type=int, help="end after so many steps of this call, as an interruption would")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train."""
    args = parse(argv)
    gpu = torch.cuda.is_available()
    half = args.bf16 or (gpu and torch.cuda.is_bf16_supported() and not args.fp32)
    acc = Accelerator(mixed_precision="bf16" if half else "no", gradient_accumulation_steps=args.accumulate)
    args.out.mkdir(parents=True, exist_ok=True)
    there = checkpoints(args.out)
    if there and not args.resume:
        raise SystemExit(f"{args.out} holds checkpoints of another run; pass --resume to continue it, or another --out")
    last = there[-1] if there else None
    model = AutoModelForCausalLM.from_pretrained(last or args.model, dtype=torch.float32)
    if acc.is_main_process:
        print(model.load_report, flush=True)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    tokenizer = load_tokenizer(resolve_source(args.model))
    blocks = Blocks(args.text.read_text(encoding="utf-8"), tokenizer, args.block, args.held_out, args.seed)
    torch.manual_seed(args.seed + acc.process_index)
    operations = operations_a_token(model, args.block)
    model, optimizer = acc.prepare(model.train(), optimizer_for(model, args))
    done = restore(last, optimizer, acc) if last else 0
    end = args.steps if args.stop_after is None else min(args.steps, done + args.stop_after)
    tokens = args.batch * args.block * args.accumulate * acc.num_processes
    peak = stated_peak(args.peak_tflops)
    peak = None if peak is None else peak * acc.num_processes
    watch = Watch(args.out, done, args.steps, tokens, operations, peak, acc.is_main_process)
    number, stopping = done, False
    with stoppable() as stop:
        for number in range(done + 1, end + 1):
            loss = train_step(model, optimizer, blocks, number - 1, args, acc)
            watch.stepped()
            if number % args.log_every == 0 or number == args.steps:
                watch.log(number, loss=loss, lr=learning_rate(number - 1, args), **watch.speed())
            with watch.pause():
                stopping = anywhere(stop.asked, acc)
                if number % args.eval_every == 0 or number == args.steps:
                    watch.log(number, held_out_loss=held_out_loss(model, blocks, args, acc))
                if number % args.save_every == 0 or number == args.steps or stopping:
                    save(model, optimizer, number, args, acc)
            if stopping:
                break
    watch.close()
    acc.end_training()
    if stopping and number < args.steps:
        raise SystemExit(f"stopped after step {number} of {args.steps}; --resume continues")


def anywhere(asked: bool, acc: Accelerator) -> bool:
    """Whether any process was asked to stop, so that all do after the same step."""
    if acc.num_processes == 1:
        return asked
    return bool(acc.reduce(torch.tensor(float(asked), device=acc.device), reduction="sum") > 0)


if __name__ == "__main__":
    main()
