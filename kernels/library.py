"""Operations of torch, ``torch.ops.loadstone.*``, with what autograd, compilers and fake tensors need to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library, infer_schema, register_autograd, register_fake

_LIBRARY = Library("loadstone", "FRAGMENT")


def define(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    mutates: Sequence[str] = (),
) -> Any:
    """Register ``function`` as ``torch.ops.loadstone.<name>`` and return it.

    function: typed tensors in, new tensors out (or None), on any device; the schema comes from its annotations. fake:
        the same signature, shapes and dtypes without data. backward, setup_context: as in
        ``torch.library.register_autograd``. mutates: names of arguments it writes to.
    """
    _LIBRARY.define(name + infer_schema(function, mutates_args=tuple(mutates)))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    qualified = f"loadstone::{name}"
    register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.loadstone, name).default
