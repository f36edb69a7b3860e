"""What a forward pass returns: fields by name, by key or by place, as users know them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

_SPELLINGS = {"cache": "past_key_values"}  # transformers calls the field so since 5.24


class ModelOutput(OrderedDict):
    """A dataclass that is also a mapping of those fields that are not None.

    ``out.logits``, ``out["logits"]`` and ``out[1]`` (the place among the fields that are set) are the same thing, and
    so are ``past_key_values`` and its newer name ``cache``.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(cls, eq=False, repr=False)
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        first = getattr(self, fields[0].name)
        if isinstance(first, dict) and all(getattr(self, f.name) is None for f in fields[1:]):
            # wrappers that rebuild containers (accelerate, DDP) call type(output)(dict)
            for field in fields:
                object.__setattr__(self, field.name, first.get(field.name))
        for field in fields:
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(_SPELLINGS.get(key, key))
        return self.to_tuple()[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_SPELLINGS.get(key, key) if isinstance(key, str) else key)

    @property
    def cache(self) -> Any:
        """``past_key_values`` under its newer name."""
        return self.past_key_values  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        name = _SPELLINGS.get(name, name)
        super().__setattr__(name, value)
        if name in {f.name for f in dataclasses.fields(self)}:  # type: ignore[arg-type]
            if value is not None:
                super().__setitem__(name, value)
            elif name in self:
                super().__delitem__(name)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, f.name) for f in dataclasses.fields(self))  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in the order of their declaration, whenever they were set."""
        return tuple(self[f.name] for f in dataclasses.fields(self) if f.name in self)  # type: ignore[arg-type]


class BaseModelOutputWithPast(ModelOutput):
    """last_hidden_state: (batch, seq, hidden_size). hidden_states: one (batch, seq, hidden_size) for the embeddings
    and for each layer, the last one normed. attentions: one (batch, heads, seq, key_length) for each layer."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class CausalLMOutputWithPast(ModelOutput):
    """loss: scalar, fp32. logits: (batch, kept, vocab_size), None where the loss was taken without them (training, see
    ``skip_logits`` of `CausalLM.forward`). past_key_values: the cache, if one is in use.
    hidden_states, attentions: as in `BaseModelOutputWithPast`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted.

    hidden_states: (batch, seq, hidden_size). logits_to_keep: the last n (0: all); or 1-D positions, the same for all
        rows; or (batch, kept) integer positions of each row; or a (batch, seq) bool mask, whose positions come out
        flat, (kept, hidden_size).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states if logits_to_keep == 0 else hidden_states[:, -logits_to_keep:, :]
    logits_to_keep = logits_to_keep.to(hidden_states.device)
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep, :]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
