"""What `isinstance` says of our models, and of one layer, to code written for transformers'.

Its Trainer, PEFT and TRL treat a model in one of two ways: a transformers ``PreTrainedModel`` is saved with
``save_pretrained``, read back, and its head left alone by "all-linear"; of anything else the bare state dict is
written, which fails for tied weights. Our models have the methods that are asked for, so once transformers is in the
process they answer that check with yes. ``type(model)`` is ours always, and nothing of transformers is imported or run.
PEFT knows a layer that stores its weight as GPT-2's do by transformers' class alone.

`isinstance` reads nothing but ``type(model)`` and ``model.__class__``, and believes the latter only if it is a class
that has the one asked for among its bases. Such a class is the `_Facade`; for everything else it stands for ours.
"""

from __future__ import annotations

import copyreg
import sys
import types
from typing import Any

_PLACE = "_class_seen_by_peers"
_own_class: Any = object.__dict__["__class__"]


class _Facade(type):
    """The class of a class that has the peer's among its bases and is ours in all else.

    Called, it makes a model of ours; its attributes are those of ours; a class derived from it (as FSDP derives one)
    is derived from ours; it equals ours, and pickles as ours. So nothing of the peer's is ever run or inherited.
    """

    def __new__(kind, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        real = tuple(_own(base) for base in bases)
        if real == bases and all(one is other for one, other in zip(real, bases, strict=True)):
            return super().__new__(kind, name, bases, namespace, **options)
        namespace = {"__module__": sys._getframe(1).f_globals.get("__name__"), **namespace}
        return types.prepare_class(name, real)[0](name, real, namespace, **options)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return _own(cls)(*arguments, **options)

    def __getattribute__(cls, name: str) -> Any:
        dunder = name.startswith("__") and name.endswith("__")  # what Python itself asks about a class
        return type.__getattribute__(cls, name) if dunder else getattr(_own(cls), name)

    def __setattr__(cls, name: str, value: Any) -> None:
        setattr(_own(cls), name, value)

    def __delattr__(cls, name: str) -> None:
        delattr(_own(cls), name)

    def __dir__(cls) -> list[str]:
        return dir(_own(cls))

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _own(cls))

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(_own(other), _own(cls))

    def __eq__(cls, other: object) -> bool:
        return _own(cls) is _own(other)

    def __hash__(cls) -> int:
        return hash(_own(cls))


class _NoHooks:
    """Keeps ``__init_subclass__``, ours or the peer's, which inspects annotations, from running for a facade."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def seen_class(model: Any) -> type:
    """The class as `isinstance` asks for it: the model's own, and beside it the peer's base class if that is loaded."""
    return beside(type(model), getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None))


def seen_layer(layer: Any) -> type:
    """The same of a layer that stores its weight (in, out): once PEFT is imported, transformers' Conv1D."""
    peers = sys.modules.get("transformers.pytorch_utils") if "peft" in sys.modules else None
    return beside(type(layer), getattr(peers, "Conv1D", None))


def beside(own: type, peer: type | None) -> type:
    """A class that `isinstance` takes for either and that is ``own`` in all else; ``own`` itself without a peer."""
    if peer is None or issubclass(own, peer):
        return own
    seen = own.__dict__.get(_PLACE)
    if seen is None or peer not in seen.__mro__:
        seen = _facade(own, peer)
        setattr(own, _PLACE, seen)
    return seen


def _facade(own: type, peer: type) -> type:
    kinds = tuple(dict.fromkeys((_Facade, *(type(base) for base in (own, peer) if type(base) is not type))))
    kind: Any = _Facade if len(kinds) == 1 else types.new_class("_Facade", kinds)
    copyreg.pickle(kind, _reduced)
    namespace = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, _OWN: own}
    return kind(own.__name__, (_NoHooks, own, peer), namespace)


_OWN = "_class_of_ours"


def _own(kind: Any) -> Any:
    """The class that a facade stands for; any other class itself."""
    return type.__getattribute__(kind, "__dict__")[_OWN] if isinstance(kind, _Facade) else kind


def _reduced(kind: type) -> tuple[Any, ...]:
    return _own, (_own(kind),)


def set_class(model: Any, value: type) -> None:
    """Change the class for good, as FSDP does with the modules it shards."""
    _own_class.__set__(model, _own(value))


def reduce_by_type(instance: Any) -> tuple[Any, ...]:
    """What pickle and copy need of a module whose ``__class__`` is not its type, which they would compare."""
    return blank, (type(instance),), instance.__dict__


def blank(kind: Any) -> Any:
    """An instance without state."""
    return kind.__new__(kind)
