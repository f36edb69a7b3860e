"""What the ranks of a test do: load on a mesh, train some steps, tell whole losses, gradients and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
from examples.script import load

from loadstone import AutoModelForCausalLM

NAMES: dict[str, tuple[str, ...]] = {
    "fsdp": ("fsdp",),
    "tp": ("tp",),
    "fsdp+tp": ("fsdp", "tp"),
    "hsdp": ("dp_replicate", "dp_shard"),
    "hsdp+tp": ("replicate", "dp", "tp"),
}
BATCH, LENGTH, RATE, STEPS = 4, 12, 1e-2, 10
SIZES: dict[str, Any] = {"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
HEADS: dict[str, dict[str, Any]] = {  # key heads that four ranks do not divide
    "two keys": {"num_key_value_heads": 2, "attention_bias": True},
    "one key": {"num_key_value_heads": 1},
    "three keys": {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8},
    "six keys": {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4},
}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": {**SIZES, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 64, **NO_DROPOUT},
}


class Case(NamedTuple):
    """One model trained on one mesh."""

    kind: str
    place: Path
    strategy: str
    sizes: tuple[int, ...]
    steps: int = STEPS
    options: dict[str, Any] = {}
    checkpointing: bool = False
    save_to: Path | None = None

    def __str__(self) -> str:
        extra = ["checkpointing"] if self.checkpointing else []
        return "-".join([self.place.name, self.strategy, *map(str, self.sizes), *self.options, *extra])


def mesh(strategy: str, sizes: tuple[int, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=NAMES[strategy])


def tokens(step: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, vocabulary, (BATCH, LENGTH), generator=generator)


def whole(tensor: Any) -> torch.Tensor:
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def whole_weights(model: Any, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Parameters, or their gradients, in the shapes of checkpoints."""
    folded = {} if model.layout is None else model.layout.folded
    return {
        name: whole(parameter.grad if gradients else parameter).reshape(folded.get(name, parameter.shape))
        for name, parameter in model.named_parameters()
    }


def train(model: Any, steps: int, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Losses and norms of gradients of some steps, the first gradients, and the weights afterwards."""
    model.train()
    # where gradients are zero but for rounding, a small eps would make whole steps of the rounding
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=1e-3)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        batch = tokens(step, model.config.vocab_size).chunk(shares)[share]
        outputs = model(batch, labels=batch, use_cache=False)
        assert outputs.logits is None  # taken without them, on any mesh
        loss = outputs.loss
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))))
        gradients = gradients or whole_weights(model, gradients=True)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": whole_weights(model)}


def held(model: Any) -> int:
    """Bytes of this rank's parts of the weights."""
    return sum(parameter.to_local().nbytes for parameter in model.parameters())


def trained(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    """Load and train each case; a rank's losses are those of its share of the batch."""
    return [one(case) for case in cases]


def one(case: Case) -> dict[str, Any]:
    if case.kind == "qwen2":
        load("custom_architecture")
    spread = mesh(case.strategy, case.sizes)
    model = AutoModelForCausalLM.from_pretrained(case.place, device_mesh=spread, **case.options)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    data = NAMES[case.strategy][:-1] if "tp" in case.strategy else NAMES[case.strategy]
    shares, share = 1, 0
    for dim, size in enumerate(case.sizes[: len(data)]):
        shares, share = shares * size, share * size + spread.get_local_rank(dim)
    told = {
        "before": whole_weights(model),
        "held": held(model),
        "read": model.load_report.bytes_total,
        "dtype": model.dtype,
        **train(model, case.steps, share, shares),
    }
    if case.save_to is not None:
        model.save_pretrained(case.save_to, max_shard_size="20KB")
    return told


def alone(place: Path, steps: int = STEPS, **options: Any) -> dict[str, Any]:
    """The same with one process."""
    if place.name == "qwen2":
        load("custom_architecture")
    model = AutoModelForCausalLM.from_pretrained(place, **options)
    return {"before": whole_weights(model), **train(model, steps)}


def checkpoints(directory: Path) -> dict[str, Path]:
    """A checkpoint of each architecture, of a Llama whose head is tied, of one with biases, of a class from outside."""
    for kind in tiny.KINDS:
        tiny.checkpoint(directory / kind, kind, **OVERRIDES[kind])
    tiny.checkpoint(directory / "tied", "llama", **SIZES, tie_word_embeddings=True)
    for name, sizes in HEADS.items():
        tiny.checkpoint(directory / name, "llama", **{**SIZES, **sizes})
    tiny.checkpoint(directory / "biased", "llama", **SIZES, attention_bias=True, mlp_bias=True)
    config = load("custom_architecture").Qwen2Config.from_dict({**tiny.values("llama", **SIZES), "model_type": "qwen2"})
    outside = AutoModelForCausalLM.from_config(config)
    tiny.randomize(outside)
    outside.save_pretrained(directory / "qwen2")
    return {name: directory / name for name in (*tiny.KINDS, *HEADS, "tied", "biased", "qwen2")}
