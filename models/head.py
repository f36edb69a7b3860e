"""Whether a language-modelling head is a plain matrix, so that its product can be fused with the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import kernels as operations
from ..errors import ArgumentError

if TYPE_CHECKING:
    from .causal_lm import CausalLM

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_fused(head: nn.Module) -> str | None:
    """Why calling ``head`` may be something else than a product with ``head.weight``, None if it is that.

    Adapters and quantised heads replace the forward or the weight, device maps hang hooks on the module. A head that is
    shared out over ranks has a ``fused_loss`` of its own.
    """
    if callable(getattr(head, "fused_loss", None)):
        return None
    name = type(head).__name__
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"lm_head is a {name} with a forward of its own"
    if any(getattr(head, hooks) for hooks in _HOOKS):
        return "lm_head has hooks"
    if head.bias is not None:
        return "lm_head has a bias"
    # a parametrised weight is a plain tensor, made anew here as the head's forward would
    weight = head.weight
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        return f"the weight of lm_head is a {type(weight).__name__} of {weight.dtype}"
    return None


def skips_logits(model: CausalLM, asked: bool | None, has_labels: bool) -> bool:
    """Whether a forward takes its loss without logits: as its caller asked, or None: in training where it can.

    Raises ArgumentError if they are to be skipped and cannot be.
    """
    if asked is None:
        return model.training and has_labels and why_not_fused(model.lm_head) is None
    reason = why_not_fused(model.lm_head) if has_labels else "without labels the logits are all there is to return"
    if asked and reason is not None:
        raise ArgumentError(f"skip_logits=True cannot be: {reason}; leave skip_logits out, or pass False")
    return asked


def fused_loss(head: Any, hidden_states: Tensor, labels: Tensor | None, *, kernels: Any, **options: Any) -> Tensor:
    """The loss of a head for which `why_not_fused` has no reason, without its logits; see `linear_cross_entropy`."""
    own = getattr(head, "fused_loss", None)
    if own is not None:
        return own(hidden_states, labels, **options)
    return operations.linear_cross_entropy(hidden_states, head.weight, labels, kernels=kernels, **options)
