"""Which implementation of its operations a model runs; methods of `CausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import kernels
from ..kernels import Kernels

if TYPE_CHECKING:
    from .causal_lm import CausalLM


def set_attn_implementation(model: CausalLM, name: str) -> None:
    """Switch attention ("eager", "sdpa", "flash_attention_2", or a registered name) from the next forward on.

    Raises AttentionError if the name is unknown or cannot run on this machine.
    """
    model.config._attn_implementation = kernels.check_attention(name)


def set_kernels(model: CausalLM, selection: Kernels | str | Mapping[str, str] = "auto", **choices: str) -> None:
    """Choose the implementation of the operations, from the next forward on.

    selection: "auto" (Triton on a GPU that runs it, torch elsewhere), "torch", "triton", a registered name, or
        {operation: name}. choices: the same by keyword, as in ``set_kernels("auto", rms_norm="torch")``.
    Attention is chosen by `set_attn_implementation`. Raises KernelError for unknown names, or if Triton is asked
    for and no device of this machine runs it.
    """
    chosen = Kernels.of(selection)
    if choices:
        chosen = Kernels(chosen.default, {**chosen.choices, **choices})
    chosen.require()
    for module in model.modules():
        if isinstance(getattr(module, "kernels", None), Kernels):
            module.kernels = chosen  # type: ignore[assignment]


def kernel_report(model: CausalLM) -> dict[str, str]:
    """{operation: implementation} of what runs on the model's device, attention included."""
    chosen = {name: model.kernels.chosen(name, model.device) for name in kernels.operations()}
    return {"attention": model.config._attn_implementation, **chosen}
