"""What ranks do with quantized models and adapters: train the adapters, save, load, fail."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parallel import steps

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, LoraConfig, WeightOnlyConfig, shard_new_weights
from loadstone.loading.parallel_added import Door

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
LORA = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
FEW = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "lm_head"])


class Case(NamedTuple):
    """An adapter trained on one base on one mesh. ``method``: None for a base in full precision."""

    place: Path
    method: str | None
    strategy: str = "fsdp"
    sizes: tuple[int, ...] = (2,)
    steps: int = 10
    checkpointing: bool = False
    used_before: bool = False  # the model has run when the adapter comes
    few: bool = False  # an adapter of some layers only, and of the head, which is in none of those gathered at once
    save_to: Path | None = None

    def __str__(self) -> str:
        flags = [name for name in ("checkpointing", "used_before", "few") if getattr(self, name)]
        return "-".join([self.place.name, str(self.method), self.strategy, *map(str, self.sizes), *flags])


def doors(model: Any) -> int:
    """How often the matrices of adapters are gathered in a forward, those in no layer apart."""
    return sum(isinstance(module, Door) for module in model.modules())


def load(place: Path, method: str | None, **options: Any) -> Any:
    if method is not None:
        options["quantization_config"] = BitsAndBytesConfig(**METHODS[method])
    return AutoModelForCausalLM.from_pretrained(place, **options)


def trainable(model: Any, gradients: bool = False) -> dict[str, torch.Tensor]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: steps.whole(p.grad if gradients else p) for name, p in named}


def train(model: Any, count: int, shares: int, rank: int | None) -> dict[str, Any]:
    """Steps of one rank, or of one process that takes all ranks' texts one after the other: the columns that int8
    products leave to 16 bits are those of the texts at hand."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=steps.RATE, eps=1e-3)
    losses, gradients = [], {}
    for step in range(count):
        batches = steps.tokens(step, model.config.vocab_size).chunk(shares)
        mine = batches if rank is None else [batches[rank]]
        found = []
        for batch in mine:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            (loss / len(mine)).backward()
            found.append(float(loss.detach()))
        losses.append(sum(found) / len(found))
        gradients = gradients or trainable(model, gradients=True)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients, "weights": trainable(model)}


def adapted(case: Case, mesh: Any = None, rank: int = 0) -> dict[str, Any]:
    """Load, add an adapter, train it; alone without a mesh."""
    model = load(case.place, case.method, **({} if mesh is None else {"device_mesh": mesh}))
    told = {"read": model.load_report.bytes_total, "packed": model.load_report.bytes_packed}
    if mesh is not None:
        told["held"] = steps.held(model)
    if case.used_before:
        with torch.no_grad():
            told["logits"] = model(steps.tokens(0, 64)).logits
    torch.manual_seed(5 + rank)  # the first rank's draws count
    model.add_adapter(FEW if case.few else LORA)
    told["doors"] = [doors(model)]
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    shares = 1
    for size in case.sizes:
        shares *= size
    told.update(train(model, case.steps, shares, None if mesh is None else rank))
    if case.save_to is not None:
        model.save_pretrained(case.save_to / "adapter")
        model.add_adapter(LORA, "second")
        told["doors"].append(doors(model))
        told["second"] = trainable(model)
        model.set_adapter("default")
        told["again"] = trainable(model)
        model.delete_adapter("second")
        told["doors"].append(doors(model))
        told["alike"] = model(steps.tokens(0, 64)).logits.detach()
        model.unload()
        told["doors"].append(doors(model))
        model.save_pretrained(case.save_to / "base", max_shard_size="20KB")
    return told


def trained(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [adapted(case, steps.mesh(case.strategy, case.sizes), rank) for case in cases]


def resumed(rank: int, places: dict[str, Path]) -> dict[str, Any]:
    """Adapters and packed checkpoints, saved by four ranks, loaded by two; PEFT's adapters; generation."""
    mesh, told = steps.mesh("fsdp", (2,)), {}
    for kind, place in places.items():
        model = AutoModelForCausalLM.from_pretrained(place / "base", device_mesh=mesh)
        told[kind, "read"] = model.load_report.bytes_total
        model.save_pretrained(place / "base by two", max_shard_size="20KB")
        model.load_adapter(place / "adapter", is_trainable=True)
        told[kind, "adapter"] = trainable(model)
        told[kind, "logits"] = model(steps.tokens(0, 64)).logits.detach()
        told[kind, "generated"] = model.generate(torch.tensor([[5, 9, 2]]), max_new_tokens=5)
    return told


def with_peft(rank: int, place: Path, to: Path) -> dict[str, Any]:
    import peft

    model = load(place, "nf4", device_mesh=steps.mesh("fsdp", (2,)))
    torch.manual_seed(5 + rank)
    wrapped = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), _peft_config())
    told: dict[str, Any] = {}
    try:
        train(wrapped, 1, 2, rank)
    except Exception as error:
        told["alone"] = type(error).__name__, str(error)
    told["new"] = shard_new_weights(wrapped)
    told["begun"] = trainable(wrapped)
    told.update(train(wrapped, 10, 2, rank))
    if rank == 0:
        wrapped.save_pretrained(to / "by peft", state_dict=told["weights"])
    return {**told, "nothing new": shard_new_weights(wrapped)}


def peft_alone(place: Path, begun: dict[str, torch.Tensor]) -> dict[str, Any]:
    import peft

    model = load(place, "nf4")
    wrapped = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), _peft_config())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name in begun:
                parameter.copy_(begun[name])
    return train(wrapped, 10, 2, None)


def _peft_config() -> Any:
    import peft

    return peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")


def refused(rank: int, place: Path, odd: Path, adapter: Path) -> dict[str, tuple[str, str]]:
    """What cannot be, by name; one after the other in one group."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from loadstone import ParallelConfig

    fsdp, tp = steps.mesh("fsdp", (2,)), steps.mesh("tp", (2,))
    policy = ParallelConfig(mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    weight_only = {"quantization_config": WeightOnlyConfig(bits=8)}
    model = load(place, "double", device_mesh=fsdp)
    lost = adapter
    if rank == 1:
        lost = Path(f"{adapter}-of-1")
        shutil.copytree(adapter, lost)
        (lost / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    calls = {
        "tp": lambda: load(place, "nf4", device_mesh=tp),
        "mixed precision": lambda: load(place, "nf4", device_mesh=fsdp, parallel=policy),
        "another method": lambda: load(place, None, device_mesh=fsdp, **weight_only),
        "an adapter under tp": lambda: load(place, None, device_mesh=tp).add_adapter(LORA),
        "an adapter's directory under tp": lambda: load(adapter, None, device_mesh=tp),
        "NaN in one share": lambda: load(odd, "double", device_mesh=fsdp),
        "a damaged adapter": lambda: model.load_adapter(lost),
        "another configuration": lambda: model.add_adapter(LORA if rank == 0 else LoraConfig(target_modules=["nope"])),
        "dequantize": lambda: model.dequantize(),
        "codes": lambda: model.model.layers[0].mlp.up_proj.dequantize(),
        "merge": lambda: (model.add_adapter(LORA), model.merge_adapter()),
        "no mesh": lambda: shard_new_weights(torch.nn.Linear(2, 2)),
        "saving to a file": lambda: model.save_pretrained(place / "config.json"),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = ("", "it was done")
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    found["afterwards"] = ("", str(float(model(steps.tokens(0, 64)).logits.sum())))
    return found
