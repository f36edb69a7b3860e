"""Adapters on a model: which layers get them, which one is active, merged or taken out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import ArgumentError, ConfigError, ParallelError, nearest
from ...loading.parallel_added import by_layer, close_doors, share_added
from ...loading.parallel_agree import together
from ...loading.parallel_shard import drawn_alike, let_go
from ..parallel import refuse_adapters
from .config import ALL_LINEAR, LoraConfig
from .layer import LoraLinear, is_adaptable
from .patterns import linear_pattern

if TYPE_CHECKING:
    from ...loading.parallel_agree import Agreement
    from ..causal_lm import CausalLM

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def add_adapter(model: CausalLM, config: Any, adapter_name: str = "default") -> list[str]:
    """See `AdapterMethods.add_adapter`; the names of the layers adapted."""
    with together(model.layout) as agreement:
        config = LoraConfig.of(config)
        targets = find_targets(model, config)
        attach(model, config, adapter_name, targets, agreement)
        set_adapter(model, adapter_name)
    return targets


def attach(
    model: CausalLM, config: LoraConfig, name: str, targets: list[str], agreement: Agreement | None = None
) -> None:
    """Put adapter ``name`` beside each of the named layers; all other parameters are frozen.

    agreement: of the ranks of a model on a device mesh, that do it together; the matrices are sharded as they come.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(f"an adapter's name is up to 64 letters, digits, '_' and '-', not {name!r}")
    if name in model.adapters:
        raise ArgumentError(f"the model has an adapter {name!r} already; delete_adapter({name!r}), or use another name")
    _refuse_merged(model, "add an adapter")
    refuse_foreign(model)
    if model.layout is not None:
        refuse_adapters(model.layout)
        let_go(model)
    with drawn_alike(agreement, model.layout):
        if model.layout is None:
            _put(model, config, name, targets)
        else:
            for place, some in by_layer(model, targets):
                matrices = _put(model, config, name, some)
                outer = None if place is None else model.get_submodule(place)
                share_added(outer, matrices, model.layout, lambda: model.active_adapter == name)
    model.adapters = {**model.adapters, name: config}
    for parameter in model.parameters():
        parameter.requires_grad = False


def _put(model: CausalLM, config: LoraConfig, name: str, targets: list[str]) -> list[nn.Module]:
    """New matrices beside the named layers."""
    matrices: list[nn.Module] = []
    for target in targets:
        owner, _, attribute = target.rpartition(".")
        parent = model.get_submodule(owner)
        layer = getattr(parent, attribute)
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear(layer)
            setattr(parent, attribute, layer)
        layer.add(name, config)
        matrices += [layer.lora_A[name], layer.lora_B[name]]
    return matrices


def find_targets(model: CausalLM, config: LoraConfig) -> list[str]:
    """Names of the layers that ``config.target_modules`` means, in the model's order.

    Raises ConfigError if there is none, if a name of the list fits none, or if one fits a module that is not linear;
    ArgumentError for a head that is tied to the embedding.
    """
    wanted = config.target_modules
    modules = dict(outer_modules(model))
    linear = [name for name, module in modules.items() if is_adaptable(module)]
    if wanted is None:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(f"LoraConfig needs target_modules: 'all-linear', or some of {', '.join(ends)}")
    head = model.get_output_embeddings()
    if wanted == ALL_LINEAR:
        found = [name for name in linear if modules[name] is not head]
    elif isinstance(wanted, str):
        pattern = linear_pattern(wanted, "target_modules")
        found = [name for name in linear if pattern.fullmatch(name)]
    else:
        found = _by_ends(wanted, modules, linear)
    if not found:
        raise ConfigError(f"target_modules={wanted!r} fits no linear layer of {type(model).__name__}")
    check_head(model, found)
    return found


def check_head(model: CausalLM, targets: list[str]) -> None:
    """ArgumentError if a target is a head whose weight is the embedding's too: merging would change both."""
    tied = {weight.rpartition(".")[0] for weight in model.active_ties()}
    if both := sorted(tied.intersection(targets)):
        raise ArgumentError(f"{both[0]} is tied to the embedding and cannot be adapted by itself; leave it out")


def _by_ends(wanted: list[str], modules: dict[str, nn.Module], linear: list[str]) -> list[str]:
    known = set(linear)
    found = set()
    for entry in wanted:
        fits = {name for name in modules if name == entry or name.endswith(f".{entry}")}
        if not fits:
            ends = {name.rpartition(".")[2] for name in linear}
            raise ConfigError(f"target_modules: no module is called {entry!r}{nearest(entry, ends)}")
        if other := sorted(fits - known):
            kind = type(modules[other[0]]).__name__
            raise ConfigError(
                f"target_modules: {entry!r} fits {other[0]}, a {kind}; only linear layers take adapters here"
            )
        found |= fits
    return [name for name in linear if name in found]


def outer_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Named modules, without what is inside adapted layers."""
    for name, child in model.named_children():
        yield f"{prefix}{name}", child
        if not isinstance(child, LoraLinear):
            yield from outer_modules(child, f"{prefix}{name}.")


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in outer_modules(model) if isinstance(module, LoraLinear)}


def set_adapter(model: CausalLM, name: str | None, trainable: bool = True) -> None:
    """Make one adapter the active one, None for none; its parameters are trained if ``trainable``, no others."""
    if name is not None:
        _known(model, name)
    _refuse_merged(model, "switch adapters")
    if model.layout is not None:
        let_go(model)  # what is gathered would be thrown away, and what is said of it
    for layer in lora_layers(model).values():
        layer.active = name
        for matrices in (layer.lora_A, layer.lora_B):
            for other, matrix in matrices.items():
                for parameter in matrix.parameters():
                    parameter.requires_grad = trainable and other == name
    model.active_adapter = name


def delete_adapter(model: CausalLM, name: str) -> None:
    """Take one adapter out; layers left without any become what they were."""
    _known(model, name)
    _refuse_merged(model, "delete an adapter")
    for layer in lora_layers(model).values():
        layer.remove(name)
    model.adapters = {other: config for other, config in model.adapters.items() if other != name}
    if model.active_adapter == name:
        set_adapter(model, None)
    _unwrap(model, lambda layer: not layer.scaling)
    close_doors(model)


def merge(model: CausalLM) -> None:
    """See `AdapterMethods.merge_adapter`."""
    if model.layout is not None:
        raise ParallelError(
            f"an adapter cannot be merged on a device mesh ({model.layout.describe()}): save_adapter() it on all "
            "ranks, then load base and adapter on one process and merge there"
        )
    if model.active_adapter is None:
        raise ArgumentError("no adapter is active; set_adapter(name) first")
    layers = list(lora_layers(model).values())
    done = []
    try:
        for layer in layers:
            done.append(layer)
            layer.merge()
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: CausalLM) -> None:
    """See `AdapterMethods.unmerge_adapter`."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def unload(model: CausalLM) -> None:
    """Take all adapters out. What is merged stays in the weights."""
    _unwrap(model, lambda layer: True)
    close_doors(model)
    model.adapters, model.active_adapter = {}, None


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is in the weights now."""
    return any(layer.merged is not None for layer in lora_layers(model).values())


def _unwrap(model: CausalLM, which: Any) -> None:
    for name, layer in lora_layers(model).items():
        if which(layer):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layer.base_layer)


def _known(model: CausalLM, name: str) -> None:
    if name not in model.adapters:
        held = ", ".join(model.adapters) or "none"
        raise ArgumentError(f"the model has no adapter {name!r}{nearest(str(name), model.adapters)} (it has {held})")


def _refuse_merged(model: CausalLM, doing: str) -> None:
    if is_merged(model):
        raise ArgumentError(f"cannot {doing} while one is merged into the weights; unmerge_adapter() first")


def refuse_foreign(model: nn.Module) -> None:
    """ArgumentError if PEFT's layers are on the model already: two libraries' adapters would nest."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and not isinstance(module, LoraLinear):
            raise ArgumentError(
                f"{name} is wrapped by another library's {type(module).__name__} (PEFT's?); unload its adapters first"
            )
