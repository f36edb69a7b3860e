"""Tensor-parallel plans: what an architecture declares of its modules, and what that means for their weights.

A plan maps patterns of module names (``*`` stands for one part of a name) to styles:

``colwise``: a linear layer whose output features are shared out; what follows works on its own share.
``colwise_key_heads``: as ``colwise``, for keys and values: where the ranks' shares are not whole heads, or not those
that their queries attend to, the outputs of the ranks concerned are brought together (see `parallel_heads`).
``rowwise``: a linear layer whose input features are shared out; the ranks' results are summed.
``colwise_gather_output``: as ``colwise``, the whole output brought together again; for the head.
``embedding_rowwise``: an embedding whose rows are shared out; the ranks' results are summed.
``shared_input``: a module whose first input goes to several colwise layers: its gradient is summed once for all.

Modules that no pattern names are kept whole on every rank. A layer that holds several matrices side by side says how
many: ``Style("colwise", parts=3)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..errors import ParallelError, nearest
from ..loading.parallel_slices import Cut
from ..quant.packed import holds_in_out

if TYPE_CHECKING:
    from .causal_lm import CausalLM

STYLES = ("colwise", "colwise_key_heads", "rowwise", "colwise_gather_output", "embedding_rowwise", "shared_input")


class Style(NamedTuple):
    """One entry of a plan."""

    name: str
    parts: int = 1


def styles_of(model: CausalLM, changes: Mapping[str, Any] | None) -> dict[str, Style]:
    """{module name: style} of a model: its class's ``_tp_plan`` with the caller's changes.

    Raises ParallelError if the class declares none, for styles that are unknown or do not fit their module, and for
    patterns that name nothing.
    """
    if not model._tp_plan and not changes:
        raise ParallelError(
            f"{type(model).__name__} declares no tensor-parallel plan (_tp_plan); declare one, pass "
            "parallel=ParallelConfig(tp_plan=...), or use 'fsdp', which needs none"
        )
    modules = dict(model.named_modules())
    found: dict[str, Style] = {}
    for pattern, value in {**model._tp_plan, **(changes or {})}.items():
        style = _style(pattern, value)
        names = [name for name in modules if _fits(name, pattern)]
        if not names:
            raise ParallelError(f"tensor-parallel plan: {pattern!r} names no module{nearest(pattern, modules)}")
        for name in names:
            found.pop(name, None)
            if style is not None:
                _check(name, modules[name], style)
                found[name] = style
    return found


def cuts_of(model: CausalLM, styles: Mapping[str, Style]) -> dict[str, Cut]:
    """{weight name: how it is cut}; weights that are not named are whole."""
    cuts: dict[str, Cut] = {}
    for name, style in styles.items():
        module = model.get_submodule(name)
        flipped = not isinstance(module, nn.Linear) and holds_in_out(module)
        if style.name == "embedding_rowwise":
            cuts[f"{name}.weight"] = Cut(0)
        elif style.name == "rowwise":
            cuts[f"{name}.weight"] = Cut(0 if flipped else 1)
        elif style.name != "shared_input":
            cuts[f"{name}.weight"] = Cut(1 if flipped else 0, style.parts)
            if style.parts == 1 and getattr(module, "bias", None) is not None:
                cuts[f"{name}.bias"] = Cut(0)  # the biases of several parts are small, and stay whole
    return cuts


def _style(pattern: str, value: Any) -> Style | None:
    if value is None:
        return None
    style = Style(value) if isinstance(value, str) else value
    if not isinstance(pattern, str) or not isinstance(style, Style) or style.name not in STYLES:
        name = style.name if isinstance(style, Style) else style
        hint = nearest(name, STYLES) if isinstance(name, str) else ""
        raise ParallelError(f"tensor-parallel plan: {pattern!r} has the style {name!r}{hint}; known: {STYLES}")
    if style.parts < 1 or (style.parts > 1 and style.name != "colwise"):
        raise ParallelError(f"tensor-parallel plan: {pattern!r}: parts={style.parts} needs the style 'colwise'")
    return style


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _check(name: str, module: nn.Module, style: Style) -> None:
    if style.name == "shared_input":
        fits = not module._parameters
    elif style.name == "embedding_rowwise":
        fits = isinstance(module, nn.Embedding) and module.max_norm is None
    else:
        fits = isinstance(module, nn.Linear) or holds_in_out(module)
    if not fits:
        raise ParallelError(f"tensor-parallel plan: {name} is a {type(module).__name__}, which cannot be {style.name}")
