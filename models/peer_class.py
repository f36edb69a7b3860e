"""What `isinstance` says of our models to code written for transformers'.

Its Trainer, PEFT and TRL treat a model in one of two ways: a transformers ``PreTrainedModel`` is saved with
``save_pretrained``, read back, and its head left alone by "all-linear"; of anything else the bare state dict is
written, which fails for tied weights. Our models have the methods that are asked for, so once transformers is in the
process they answer that check with yes. ``type(model)`` is ours always, and nothing of transformers is imported or run.
"""

from __future__ import annotations

import sys
import types
from typing import Any

_PLACE = "_class_seen_by_peers"
_own_class: Any = object.__dict__["__class__"]


class _NoHooks:
    """Keeps the peer's ``__init_subclass__``, which inspects annotations, from running for a class of ours."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def seen_class(model: Any) -> type:
    """The class as `isinstance` asks for it: the model's own, and beside it the peer's base class if that is loaded."""
    own = type(model)
    peer = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if peer is None or issubclass(own, peer):
        return own
    seen = own.__dict__.get(_PLACE)
    if seen is None or not issubclass(seen, peer):
        seen = types.new_class(own.__name__, (own, _NoHooks, peer))
        seen.__module__, seen.__qualname__, seen.__doc__ = own.__module__, own.__qualname__, own.__doc__
        setattr(own, _PLACE, seen)
    return seen


def set_class(model: Any, value: type) -> None:
    """Change the class for good, as FSDP does with the modules it shards."""
    _own_class.__set__(model, value)


def reduce_by_type(instance: Any) -> tuple[Any, ...]:
    """What pickle and copy need of a module whose ``__class__`` is not its type, which they would compare."""
    return blank, (type(instance),), instance.__dict__


def blank(kind: Any) -> Any:
    """An instance without state."""
    return kind.__new__(kind)
