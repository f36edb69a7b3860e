"""Train a causal language model on several processes: FSDP, tensor parallelism, or both.

    torchrun --nproc-per-node 8 examples/train_fsdp.py --model org/name --text corpus.txt --out out --bf16
    torchrun --nproc-per-node 8 examples/train_fsdp.py --model org/name --text corpus.txt --out out --bf16 --resume
    torchrun --nproc-per-node 8 examples/train_fsdp.py --model org/name --text corpus.txt --out out --tp 2

Every rank loads its own parts of the model and of the optimizer. Checkpoints are torch's distributed ones: they are
complete once they have their name, and a run can be resumed on another number of processes. At the end the model is
saved as any model is. A batch follows from the seed and the step's number alone, so a resumed run sees what an unbroken
one would have.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from loadstone import AutoModelForCausalLM, ParallelConfig
from loadstone.loading import resolve_source
from loadstone.models.tokenizer import load_tokenizer

PATIENCE = timedelta(minutes=10)  # after which ranks give up on one that does not answer


def mesh_for(args: argparse.Namespace) -> DeviceMesh:
    """A mesh of all ranks: those that share each layer's work within, those that share weights around them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    if dist.get_world_size() % args.tp:
        raise SystemExit(f"--tp {args.tp} does not divide {dist.get_world_size()} processes")
    shape = (dist.get_world_size() // args.tp, args.tp)
    return init_device_mesh(device, shape, mesh_dim_names=("fsdp", "tp"))


def load(args: argparse.Namespace, mesh: DeviceMesh) -> Any:
    """The model on the mesh, with weights in fp32, which are gathered in bf16 with ``--bf16``."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else None
    if args.tp == 1:
        mesh = mesh["fsdp"]
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, device_mesh=mesh, parallel=ParallelConfig(mixed_precision=policy)
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def blocks_of(args: argparse.Namespace) -> Tensor:
    """The text as rows of tokens."""
    ids = load_tokenizer(resolve_source(args.model)).encode(args.text.read_text(encoding="utf-8"))
    count = len(ids) // args.block
    if count < 1:
        raise SystemExit(f"the text has {len(ids)} tokens: too few for a block of {args.block}")
    return torch.tensor(ids[: count * args.block]).view(count, args.block)


def batch(blocks: Tensor, step: int, share: int, shares: int, args: argparse.Namespace) -> Tensor:
    """One rank's part of a step's batch, which has ``--batch`` blocks however many ranks there are."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    rows = torch.randint(len(blocks), (args.batch,), generator=generator)
    return blocks[rows.chunk(shares)[share]]


def save(model: Any, optimizer: Any, step: int, args: argparse.Namespace) -> None:
    """A checkpoint of all ranks, under its name only when it is whole; older ones go."""
    name, target = args.out / f".step-{step:06d}", args.out / f"step-{step:06d}"
    if dist.get_rank() == 0:
        shutil.rmtree(name, ignore_errors=True)
    weights, state = get_state_dict(model, optimizer)
    dist.barrier()
    dcp.save({"model": weights, "optimizer": state, "step": step}, checkpoint_id=str(name))
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(name, target)
        for old in checkpoints(args.out)[: -args.keep]:
            shutil.rmtree(old)
    dist.barrier()


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in out.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def restore(directory: Path, model: Any, optimizer: Any) -> int:
    """Bring back weights and optimizer, saved by any number of ranks; returns the number of steps done."""
    weights, state = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(held, checkpoint_id=str(directory))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return int(held["step"])


def whole(tensor: Any) -> Tensor:
    """All of a tensor that is spread over the ranks, every one of which has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="directory or Hub repository id")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints, log.jsonl and the model")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer's work")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="blocks a step, of all ranks together")
    parser.add_argument("--block", type=int, default=512, help="tokens a block")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights and gradients stay float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--stop-after", type=int, help="end the process after so many steps, as a crash would")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    mesh = mesh_for(args)
    share, shares = mesh.get_local_rank("fsdp"), mesh["fsdp"].size()
    if args.batch % shares:
        raise SystemExit(f"--batch {args.batch} does not divide over {shares} ranks")
    args.out.mkdir(parents=True, exist_ok=True)
    model, blocks = load(args, mesh), blocks_of(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    found = checkpoints(args.out) if args.resume else []
    done = restore(found[-1], model, optimizer) if found else 0
    torch.manual_seed(args.seed * 1_000_003 + done * shares + share)  # for dropout: alike on ranks that share layers
    for step in range(done, args.steps):
        ids = batch(blocks, step, share, shares, args).to(model.device)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / shares
        dist.all_reduce(mean, group=mesh.get_group("fsdp"))
        if dist.get_rank() == 0:
            row = {"step": step + 1, "loss": float(mean), "norm": float(norm)}
            with (args.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"step {row['step']}  loss {row['loss']:.4f}  norm {row['norm']:.3f}", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(model, optimizer, step + 1, args)
        if args.stop_after == step + 1:
            break
    else:
        model.save_pretrained(args.out / "model")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
