"""What the ranks of a test do: load on a mesh, train some steps, tell whole losses, gradients and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loadstone import AutoModelForCausalLM

MESHES: dict[str, tuple[str, ...]] = {"fsdp": ("fsdp",), "tp": ("tp",), "fsdp+tp": ("fsdp", "tp")}
BATCH, LENGTH, RATE = 4, 12, 1e-2


def mesh(strategy: str, *sizes: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=MESHES[strategy])


def tokens(step: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, vocabulary, (BATCH, LENGTH), generator=generator)


def whole(tensor: Any) -> torch.Tensor:
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    folded = {} if model.layout is None else model.layout.folded
    return {
        name: whole(parameter).reshape(folded.get(name, parameter.shape)) for name, parameter in model.named_parameters()
    }


def train(model: Any, steps: int, share: int = 0, shares: int = 1, checkpointing: bool = False) -> dict[str, Any]:
    """Losses and norms of gradients of some steps, the last gradients, and the weights afterwards."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=1e-3)  # no noise where gradients are 0
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        batch = tokens(step, model.config.vocab_size).chunk(shares)[share]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))))
        gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": whole_weights(model)}


def trained(rank: int, place: Path, strategy: str, sizes: tuple[int, ...], steps: int, options: Any) -> Any:
    """Load and train on a mesh; a rank's losses are those of its share of the batch."""
    spread = mesh(strategy, *sizes)
    checkpointing = options.pop("checkpointing", False)
    model = AutoModelForCausalLM.from_pretrained(place, device_mesh=spread, **options)
    shares = sizes[0] if "fsdp" in strategy else 1
    share = spread.get_local_rank(0) if "fsdp" in strategy else 0
    before = whole_weights(model)
    return {"before": before, **train(model, steps, share, shares, checkpointing)}
