"""Weights that come onto a model after it was spread over a device mesh: adapters, above all PEFT's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ParallelError


def shard_new_weights(model: nn.Module) -> list[str]:
    """Share out over a model's device mesh the weights that others put on it since it was loaded; their names.

    model: from ``from_pretrained(..., device_mesh=)`` with FSDP alone, or what another library has wrapped one in
    (PEFT's ``get_peft_model``). Every rank calls it, before an optimizer is made; all get the first rank's values.
    ``add_adapter`` does it by itself. Raises ParallelError for a model without a mesh or cut for tensor parallelism,
    and for weights that FSDP cannot share out: of modules without a forward, or copied from shared ones.
    """
    from ..loading.parallel_added import by_layer, share_added
    from ..loading.parallel_agree import together
    from ..loading.parallel_mesh import Layout
    from ..loading.parallel_shard import let_go
    from .parallel import refuse_adapters

    layouts = (getattr(module, "layout", None) for module in model.modules())
    layout = next((one for one in layouts if isinstance(one, Layout)), None)
    if layout is None:
        raise ParallelError("the model is not spread over a device mesh; load it with from_pretrained(device_mesh=...)")
    with together(layout) as agreement:
        refuse_adapters(layout)
        new = _new(model, layout)
        assert agreement is not None
        agreement.same(new_weights=[(name, [tuple(p.shape) for p in module.parameters()]) for name, module in new])
        let_go(model)
        found = dict(new)
        for place, names in by_layer(model, list(found)):
            some = [found[name] for name in names]
            for parameter in (parameter for module in some for parameter in module.parameters()):
                _alike(parameter.data, layout)
            share_added(None if place is None else model.get_submodule(place), some, layout)
    return [f"{name}.{weight}" for name, module in new for weight, _ in module.named_parameters()]


def _new(model: nn.Module, layout: Any) -> list[tuple[str, nn.Module]]:
    """The modules with weights of their own that no one shares out yet."""
    new = []
    for name, module in model.named_modules():
        held = [parameter for parameter in module._parameters.values() if parameter is not None]
        if not held or module in layout.spread:
            continue
        runs = type(module).forward is not nn.Module.forward and not isinstance(module, nn.ParameterDict)
        if not runs or module._modules or any(hasattr(parameter, "full_tensor") for parameter in held):
            raise ParallelError(
                f"{name} ({type(module).__name__}) holds weights that FSDP cannot share out after loading; LoRA on "
                "linear layers can be (no modules_to_save, embeddings or DoRA)"
            )
        new.append((name, module))
    return new


def _alike(values: torch.Tensor, layout: Any) -> None:
    """The first rank's values on all."""
    for dim in range(layout.mesh.ndim):
        dist.broadcast(values, group=layout.mesh.get_group(dim), group_src=0)
