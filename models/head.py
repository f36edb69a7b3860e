"""Whether a language-modelling head is a plain matrix, so that its product can be fused with the loss."""

from __future__ import annotations

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_fused(head: nn.Module) -> str | None:
    """Why calling ``head`` may be something else than a product with ``head.weight``, None if it is that.

    Adapters and quantised heads replace the forward or the weight, device maps and sharding hang hooks on the module.
    """
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
