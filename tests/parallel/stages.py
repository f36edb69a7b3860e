"""What the ranks of a pipeline do: load a stage, run torch's schedules, tell losses, gradients and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
import torch.distributed as dist
from examples.script import load
from parallel import steps
from safetensors.torch import load_file, save_file

from loadstone import AutoModelForCausalLM, ParallelConfig

NAMES = {"pp": ("pp",), "pp+fsdp": ("pp", "fsdp"), "pp+tp": ("pp", "tp"), "pp+hsdp": ("pp", "dp_replicate", "dp_shard")}
LAYERS = {"llama": "num_hidden_layers", "mistral": "num_hidden_layers", "gpt2": "n_layer"}


class Case(NamedTuple):
    """One model trained in stages."""

    kind: str
    place: Path
    sizes: tuple[int, ...]
    strategy: str = "pp"
    schedule: str = "1F1B"
    steps: int = steps.STEPS
    layers: tuple[int, ...] | None = None
    skip_logits: bool = True
    checkpointing: bool = False
    save_to: Path | None = None

    def __str__(self) -> str:
        return "-".join([self.place.name, self.strategy, *map(str, self.sizes), self.schedule, str(self.skip_logits)])


def checkpoints(directory: Path) -> dict[str, Path]:
    """Four layers of each architecture, Llamas whose head is tied, under either name, and a class from outside."""
    for kind in tiny.KINDS:
        tiny.checkpoint(directory / kind, kind, **steps.OVERRIDES[kind], **{LAYERS[kind]: 4})
    tiny.checkpoint(directory / "tied", "llama", **steps.SIZES, num_hidden_layers=4, tie_word_embeddings=True)
    tiny.checkpoint(directory / "headed", "llama", **steps.SIZES, num_hidden_layers=4, tie_word_embeddings=True)
    file = directory / "headed" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    sizes = tiny.values("llama", **steps.SIZES, num_hidden_layers=4)
    config = load("custom_architecture").Qwen2Config.from_dict({**sizes, "model_type": "qwen2"})
    outside = AutoModelForCausalLM.from_config(config)
    tiny.randomize(outside)
    outside.save_pretrained(directory / "qwen2")
    return {name: directory / name for name in (*tiny.KINDS, "tied", "headed", "qwen2")}


def mesh(strategy: str, sizes: tuple[int, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=NAMES[strategy])


def schedule_of(name: str, stage: Any, microbatches: int, **options: Any) -> Any:
    from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

    kind = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}[name]
    return kind(stage, n_microbatches=microbatches, loss_fn=stage.loss, **options)


def step(schedule: Any, stage: Any, batch: torch.Tensor, **inputs: Any) -> list[float]:
    """One step's losses of each microbatch, in the last stage."""
    losses: list[torch.Tensor] = []
    given = (batch,) if stage.is_first else ()
    more = {"target": batch, "losses": losses} if stage.is_last else {}
    schedule.step(*given, **more, **inputs)
    return [float(loss.detach()) for loss in losses]


def trained(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [one(case) for case in cases]


def one(case: Case) -> dict[str, Any]:
    if case.kind == "qwen2":
        load("custom_architecture")
    spread = mesh(case.strategy, case.sizes)
    parallel = ParallelConfig(layers_per_stage=case.layers)
    model = AutoModelForCausalLM.from_pretrained(case.place, device_mesh=spread, parallel=parallel)
    told: dict[str, Any] = {
        "before": steps.whole_weights(model),
        "read": model.load_report.bytes_total,
        "fits": model.load_report.fits,
    }
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    shares, share = 1, 0
    for dim, name in enumerate(NAMES[case.strategy]):
        if name not in ("pp", "tp"):
            shares, share = shares * case.sizes[dim], share * case.sizes[dim] + spread.get_local_rank(dim)
    stage = model.pipeline_stage(skip_logits=case.skip_logits)
    schedule = schedule_of(case.schedule, stage, steps.BATCH // shares)
    optimizer = torch.optim.AdamW(model.parameters(), lr=steps.RATE, eps=1e-3)
    losses, norms, gradients = [], [], {}
    for number in range(case.steps):
        batch = steps.tokens(number, 64).chunk(shares)[share]
        found = step(schedule, stage, batch)
        losses.append(sum(found) / len(found) if found else None)
        norms.append(float(stage.clip_grad_norm_(1e9)))
        gradients = gradients or steps.whole_weights(model, gradients=True)
        optimizer.step()
        optimizer.zero_grad()
    told |= {"losses": losses, "norms": norms, "gradients": gradients, "weights": steps.whole_weights(model)}
    if case.save_to is not None:
        model.save_pretrained(case.save_to, max_shard_size="20KB")
    return told


def others(rank: int, places: dict[str, Path], to: Path) -> dict[str, Any]:
    """Gradients over two steps of a schedule, masks, evaluation, torch's checkpoints, and what is refused."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.pipelining import ScheduleGPipe

    spread = mesh("pp", (2,))
    told: dict[str, Any] = {}
    model = AutoModelForCausalLM.from_pretrained(places["tied"], device_mesh=spread).train()
    stage = model.pipeline_stage()
    count = 2 * steps.BATCH * (steps.LENGTH - 1)

    def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return stage.loss(output, labels, num_items_in_batch=count)

    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss, scale_grads=False)
    for number in range(2):
        step(schedule, stage, steps.tokens(number, 64))
    told["accumulated"] = steps.whole_weights(model, gradients=True)
    model = AutoModelForCausalLM.from_pretrained(places["gpt2"], device_mesh=spread).train()
    stage = model.pipeline_stage()
    mask, positions = padding()
    step(schedule_of("1F1B", stage, 2), stage, steps.tokens(0, 64), attention_mask=mask, position_ids=positions)
    told["masked"] = steps.whole_weights(model, gradients=True)
    model.eval()
    forward = ScheduleGPipe(model.pipeline_stage(), n_microbatches=2)
    with torch.no_grad():
        told["logits"] = forward.step(*((steps.tokens(0, 64),) if rank == 0 else ()))
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=steps.RATE)
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(to))
    told["refused"] = refused(rank, places, spread)
    dist.barrier()
    return told


def padding() -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of rows with 0 to 3 padded tokens on the left, and positions that leave them out."""
    lengths = torch.arange(steps.BATCH)[:, None]
    mask = (torch.arange(steps.LENGTH) >= lengths).long()
    return mask, (torch.arange(steps.LENGTH) - lengths).clamp(min=0)


def refused(rank: int, places: dict[str, Path], spread: Any) -> dict[str, str]:
    def attempt_at(kind: str = "llama", **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(places[kind], device_mesh=spread, **options)

    from torch.distributed.device_mesh import init_device_mesh

    model = attempt_at()
    last = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "pp"))
    attempts = {
        "generate": lambda: model.generate(torch.ones(1, 2, dtype=torch.long)),
        "labels": lambda: model(torch.ones(1, 2, dtype=torch.long), labels=None),
        "layers": lambda: attempt_at(parallel=ParallelConfig(layers_per_stage=[1, 2])),
        "order": lambda: AutoModelForCausalLM.from_pretrained(places["llama"], device_mesh=last),
        "without pp": lambda: AutoModelForCausalLM.from_pretrained(places["llama"]).pipeline_stage(),
        "too few": lambda: attempt_at(num_hidden_layers=1, ignore_mismatched_sizes=True),
        "apart": lambda: attempt_at(parallel=ParallelConfig(layers_per_stage=[1 + rank, 3 - rank])),
        "other mesh": lambda: AutoModelForCausalLM.from_pretrained(
            places["llama"], device_mesh=steps.mesh("fsdp", (2,)), parallel=ParallelConfig(layers_per_stage=[2, 2])
        ),
    }
    if rank == 0:
        attempts["head"] = lambda: model.lm_head(torch.ones(1))
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "it was done"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
