"""What trainers switch on and off in a model before they train it; methods of `CausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .recompute import recomputation

if TYPE_CHECKING:
    from .causal_lm import CausalLM


def gradient_checkpointing_enable(
    model: CausalLM,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """Recompute layers' activations in the backward pass instead of holding them; dropout is drawn as before.

    gradient_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``; ``use_reentrant`` is False by default.
    every_n_layers: of so many layers the first is recomputed, the others hold theirs; 1: all are. offload: what
    recomputed layers start from waits in the host's memory, pinned, instead of on the accelerator.
    No cache is filled while training so. Raises ArgumentError for an unknown keyword.
    """
    chosen = recomputation(gradient_checkpointing_kwargs, every_n_layers, offload)
    model.base_model.checkpointing = chosen  # type: ignore[assignment]
    if chosen.arguments["use_reentrant"]:  # which passes gradients only to what asks for them at its door
        model.enable_input_require_grads()


def activation_checkpointing_enable(
    model: CausalLM,
    activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """`gradient_checkpointing_enable` under its newer name."""
    model.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)


def gradient_checkpointing_disable(model: CausalLM) -> None:
    """Hold activations again."""
    model.base_model.checkpointing = None  # type: ignore[assignment]


def is_gradient_checkpointing(model: CausalLM) -> bool:
    """Whether activations are recomputed in training."""
    return getattr(model.base_model, "checkpointing", None) is not None


def enable_input_require_grads(model: CausalLM) -> None:
    """Let gradients flow to the embeddings' output although the embedding is frozen (adapters need it)."""
    model.disable_input_require_grads()
    embedding = model.get_input_embeddings()
    model._input_grads_hook = embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))


def disable_input_require_grads(model: CausalLM) -> None:
    """Undo `enable_input_require_grads`, if it was called."""
    if model._input_grads_hook is not None:
        model._input_grads_hook.remove()
        model._input_grads_hook = None
