"""What ranks do in the other tests: generate, save for torch's own checkpoints, download, die."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel import steps

from loadstone import AutoModelForCausalLM, ParallelConfig, StaticCache


def _load(place: Path, strategy: str, *sizes: int, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, device_mesh=steps.mesh(strategy, sizes), **options)


# Generation

PROMPTS = torch.tensor([[5, 9, 2, 7], [1, 1, 3, 8]])


def generated(rank: int, places: dict[str, Path], dropping: Path) -> dict[str, Any]:
    """Texts of every architecture; drawn ones with another seed on each rank; prompts that end apart."""
    told: dict[str, Any] = {}
    for kind in ("llama", "mistral", "gpt2", "tied", "one key", "three keys"):
        model = _load(places[kind], "tp", 2)
        told[kind] = model.generate(PROMPTS, max_new_tokens=12)
        if kind != "gpt2":
            told[f"{kind} beams"] = model.generate(PROMPTS, max_new_tokens=6, num_beams=3)
            static = StaticCache(model.config, 32)
            told[f"{kind} static"] = model.generate(PROMPTS, max_new_tokens=12, past_key_values=static)
        torch.manual_seed(100 + rank)
        told[f"{kind} drawn"] = model.generate(PROMPTS, max_new_tokens=12, do_sample=True)
    model = _load(places["llama"], "fsdp", 2)
    mine = PROMPTS[rank : rank + 1, rank:]
    told["apart"] = model.generate(mine, max_new_tokens=3 + 6 * rank, num_beams=1 + rank)
    told["together"] = model.generate(PROMPTS, max_new_tokens=12)
    try:  # a mistake of one rank leaves the other alone with nothing to wait for
        told["alone"] = model.generate(PROMPTS, max_new_tokens=4 - 5 * rank)
    except Exception as error:
        told["alone"] = type(error).__name__
    return {**told, "dropout": _dropped_out(rank, dropping)}


def _dropped_out(rank: int, place: Path) -> dict[str, Any]:
    """Losses with dropout after ranks with seeds of their own have loaded together, and a gradient."""
    torch.manual_seed(rank)
    model = _load(place, "tp", 2).train()
    losses = []
    for step in range(3):
        batch = steps.tokens(step, 64)
        loss = model(batch, labels=batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
    gradients = {name: grad.to_local() for name, grad in ((n, p.grad) for n, p in model.named_parameters())}
    return {"losses": losses, "norm": gradients["transformer.ln_f.weight"]}


def compiled(place: Path) -> dict[str, tuple[float, float, float]]:
    """Loss, compiled loss and the largest difference of a gradient."""
    told = {}
    for strategy in ("fsdp", "tp"):
        model = _load(place, strategy, 2).train()
        found = []
        for run in (model, torch.compile(model, backend="aot_eager")):
            loss = run(PROMPTS, labels=PROMPTS).loss
            loss.backward()
            found.append((float(loss.detach()), steps.whole_weights(model, gradients=True)))
            model.zero_grad()
        (first, expected), (second, gradients) = found
        far = max(float((expected[name] - gradients[name]).abs().max()) for name in expected)
        told[strategy] = first, second, far
    return told


# Initialisation, precision


def mixed(rank: int, place: Path, headless: Path, pickled: Path) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = _load(place, "fsdp", 2, parallel=ParallelConfig(mixed_precision=policy, reshard_after_forward=False))
    told = {"dtype": model.dtype, "compiled": compiled(place), **steps.train(model, 3, rank, 2)}
    held = AutoModelForCausalLM.from_pretrained(place).state_dict()
    torch.manual_seed(rank)
    for strategy in ("fsdp", "tp"):
        told[f"pickled {strategy}"] = steps.whole_weights(_load(pickled, strategy, 2, use_safetensors=False))
        told[f"held {strategy}"] = steps.whole_weights(_load(place, strategy, 2, state_dict=held))
        model = _load(headless, strategy, 2)
        told[strategy] = steps.whole(model.lm_head.weight)
        told[f"missing {strategy}"] = model.load_report.missing
    return told


# torch's own checkpoints


def distributed_checkpoints(rank: int, places: dict[str, Path], to: Path, count: int, save: bool) -> dict[str, Any]:
    return {kind: _distributed_checkpoint(rank, place, to / kind, count, save) for kind, place in places.items()}


def _distributed_checkpoint(rank: int, place: Path, to: Path, count: int, save: bool) -> dict[str, torch.Tensor]:
    """Train two steps and save, or load what was saved, and train one more; the weights then."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = _load(place, "fsdp", count).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=steps.RATE, eps=1e-3)

    def step(number: int) -> None:
        batch = steps.tokens(number, 64).chunk(count)[rank]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if save:
        step(0)
        step(1)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(to))
        step(2)
        return steps.whole_weights(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(to))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    step(2)
    return steps.whole_weights(model)


# A rank that is killed


def killed(rank: int, place: Path, to: Path) -> float:
    """Save after each step; rank 1 dies in the third."""
    model = _load(place, "fsdp", 2).train()
    started = time.monotonic()
    for number in range(5):
        batch = steps.tokens(number, 64).chunk(2)[rank]
        if rank == 1 and number == 2:
            os._exit(9)
        started = time.monotonic()
        model(batch, labels=batch).loss.backward()
        model.save_pretrained(to)
    return time.monotonic() - started


def killed_while_saving(rank: int, place: Path, to: Path) -> None:
    """Rank 1 dies when the first weight of the second save is gathered."""
    from loadstone.loading import parallel_save

    model = _load(place, "fsdp", 2)
    model.save_pretrained(to)
    if rank == 1:
        parallel_save._gathered = lambda *_: os._exit(9)  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(to)


def killed_before_loading(rank: int, place: Path) -> None:
    mesh = steps.mesh("fsdp", (2,))
    dist.barrier()
    if rank == 1:
        os._exit(9)
    AutoModelForCausalLM.from_pretrained(place, device_mesh=mesh)


# The Hub


def downloaded(rank: int, url: str, cache: Path, revision: str | None, name: str = "org/model") -> Any:
    from huggingface_hub import constants, hf_api

    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    hf_api.api.endpoint = url
    constants.HF_HUB_DISABLE_XET = True
    constants.HF_HUB_OFFLINE = False  # other tests of this session may have asked for it
    options = {} if revision is None else {"revision": revision}
    mesh = steps.mesh("fsdp", (2,))
    model = AutoModelForCausalLM.from_pretrained(name, device_mesh=mesh, cache_dir=cache, **options)
    return model.config._commit_hash, steps.whole_weights(model)
