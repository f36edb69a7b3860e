"""The parts of a model by the names that users know, and what is tied; methods of `CausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .causal_lm import CausalLM


def active_ties(model: CausalLM) -> dict[str, str]:
    """{tied parameter: its source}, of those the configuration puts in force."""
    return dict(model._tied_weights_keys) if model.config.tie_word_embeddings else {}


def tie_weights(model: CausalLM) -> None:
    """Make each tied parameter the same object as its source."""
    for target, source in model.active_ties().items():
        owner, _, name = target.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter(source))


def get_decoder(model: CausalLM) -> nn.Module:
    """The decoder without its head."""
    return model.base_model


def set_decoder(model: CausalLM, decoder: nn.Module) -> None:
    """Replace the decoder, and tie the head to it if they are tied."""
    setattr(model, model.base_model_prefix, decoder)
    model.tie_weights()


def get_input_embeddings(model: CausalLM) -> nn.Module:
    """The token embedding."""
    return model.base_model.get_input_embeddings()  # type: ignore[operator]


def set_input_embeddings(model: CausalLM, module: nn.Module) -> None:
    """Replace the token embedding, and tie the head to it if they are tied."""
    model.base_model.set_input_embeddings(module)  # type: ignore[operator]
    model.tie_weights()


def get_output_embeddings(model: CausalLM) -> nn.Module:
    """The language-modelling head."""
    return model.lm_head


def set_output_embeddings(model: CausalLM, module: nn.Module) -> None:
    """Replace the language-modelling head."""
    model.lm_head = module
