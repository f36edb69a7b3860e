"""Stages of a pipeline: a model of which this rank has the embeddings, some of the layers, or the head.

A stage is the ordinary model with the ordinary names; modules of other ranks are replaced by ones without weights that
pass hidden states on. Its forward takes what the stage before gives and gives what the next one takes.
Source: Huang et al. 2019, arXiv:1811.06965 (GPipe); Narayanan et al. 2021, arXiv:2104.04473 (1F1B, tied embeddings).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import ArgumentError, ParallelError, nearest
from .decoder import Decoder

if TYPE_CHECKING:
    from ..loading.parallel_mesh import Layout
    from .causal_lm import CausalLM

_INPUTS = ("attention_mask", "position_ids")


class PassedOn(nn.Module):
    """A layer that another rank has: hidden states go on as they came."""

    def forward(self, hidden_states: Tensor, *_: Any) -> tuple[Tensor, None]:
        """hidden_states: (batch, seq, hidden_size) → the same."""
        return hidden_states, None


class Elsewhere(nn.Module):
    """A module that another rank has, and that must not be called on this one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raises ParallelError."""
        raise ParallelError(
            f"{self.name} belongs to another stage of the pipeline; an architecture whose later stages need it must "
            "say in `beside` what its layers get"
        )


def layers_of(count: int, layout: Layout) -> list[range]:
    """The layers of each stage: as the caller says, or as even as can be, the last and the first with the fewest, for
    they have the head and the embeddings. Raises ParallelError if that cannot be."""
    stages, sizes = layout.stages, layout.config.layers_per_stage
    if sizes is None:
        if count < stages:
            raise ParallelError(f"pp={stages} stages need a layer each, and the model has {count}; use fewer")
        sizes = [count // stages] * stages
        for place in [*range(1, stages - 1), 0][: count % stages]:
            sizes[place] += 1
    elif (
        not isinstance(sizes, Sequence)
        or len(sizes) != stages
        or any(not isinstance(size, int) or size < 1 for size in sizes)
        or sum(sizes) != count
    ):
        raise ParallelError(
            f"layers_per_stage={sizes!r} must be {stages} numbers of at least 1 that add up to {count} layers"
        )
    ends = [sum(sizes[: stage + 1]) for stage in range(stages)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def take_stage(model: CausalLM, layout: Layout) -> str | None:
    """Leave of a model on meta what this rank's stage has.

    Returns the name of the weight that the first and the last stage both hold, as the head is tied to the embedding.
    Raises ParallelError for models that cannot be cut, or not so.
    """
    decoder = model.base_model
    if not isinstance(decoder, Decoder):
        raise ParallelError(f"{type(decoder).__name__} is no Decoder, so a pipeline cannot tell its layers")
    layers: Any = getattr(decoder, decoder.layers_name)
    mine, first, last = (
        layers_of(len(layers), layout)[layout.stage],
        layout.stage == 0,
        layout.stage == layout.stages - 1,
    )
    shared, before = _shared(model, decoder), _before(model, decoder)
    absent: list[str] = []

    def drop(owner: nn.Module, name: str, instead: nn.Module) -> None:
        setattr(owner, name, instead)
        absent.append(name if owner is not layers else f"{decoder.layers_name}.{name}")

    for number in range(len(layers)):
        if number not in mine:
            drop(layers, str(number), PassedOn())
    if not first:
        for name in before:
            if not (last and shared == f"{model.base_model_prefix}.{name}.weight"):
                drop(decoder, name, Elsewhere(name))
        decoder.embed = partial(_embed_nothing, decoder)  # type: ignore[method-assign]
    if not last:
        drop(decoder, decoder.norm_name, nn.Identity())
        if not (first and shared):  # both ends have both names of a tied weight: files may hold it under either
            drop(model, "lm_head", Elsewhere("lm_head"))
            model.active_ties = dict  # type: ignore[method-assign]
    if absent:
        others = "|".join(map(re.escape, absent))
        known = type(model)._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = [*known, rf"(^|\.)({others})\."]  # type: ignore[misc]
    return shared if layout.stages > 1 else None


def _before(model: CausalLM, decoder: Decoder) -> list[str]:
    """Names of the decoder's modules in front of its layers: the embeddings. ParallelError for weights elsewhere."""
    known = (decoder.layers_name, decoder.norm_name)
    loose = [*decoder._parameters, *model._parameters]
    loose += [
        name for name, child in model.named_children() if child not in (decoder, model.lm_head) and _weights(child)
    ]
    if loose:
        raise ParallelError(f"{type(model).__name__} holds {loose[0]!r} outside of its modules: which stage is it of?")
    return [name for name, child in decoder.named_children() if name not in known and _weights(child)]


def _weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _shared(model: CausalLM, decoder: Decoder) -> str | None:
    ties = model.active_ties()
    source = f"{model.base_model_prefix}.{decoder.embedding_name}.weight"
    if ties and ties != {"lm_head.weight": source}:
        raise ParallelError(f"a pipeline can share the head's weight with the embedding alone, not {ties}")
    return source if ties else None


def _embed_nothing(
    decoder: Decoder, hidden_states: Tensor, position_ids: Tensor, length: Any
) -> tuple[Tensor, tuple[Any, ...]]:
    return hidden_states, decoder.beside(hidden_states, position_ids, length)


def become_stage(model: CausalLM) -> None:
    """Give a loaded model the forward of a stage, and refuse what one stage cannot do."""
    model.forward = partial(_forward, model)  # type: ignore[assignment, method-assign]
    model.generate = _no_generation  # type: ignore[method-assign]


def _forward(model: CausalLM, states: Tensor, **inputs: Any) -> Tensor:
    """What the next stage takes; of the last stage the logits, or the hidden states of which `loss_of` takes the loss.

    states: (batch, seq) token ids in the first stage, (batch, seq, hidden_size) in the others; inputs: attention_mask
    and position_ids, as for any model, alike on all stages.
    """
    for name in inputs:
        if name not in _INPUTS:
            raise ArgumentError(
                f"a stage of a pipeline takes {' and '.join(_INPUTS)}, not {name!r}{nearest(name, _INPUTS)}; labels "
                "are the target of the schedule, whose loss_fn is the stage's loss"
            )
    first, last = model.layout.stage == 0, model.layout.stage == model.layout.stages - 1
    inputs["input_ids" if first else "inputs_embeds"] = states
    hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden) if last and not (model.training and model.stage_skips_logits) else hidden


def _no_generation(*_: Any, **__: Any) -> Any:
    raise ParallelError("a pipeline's stages cannot generate: save_pretrained(), and load the model in another way")
