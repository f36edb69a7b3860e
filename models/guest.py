"""Models of classes that are not loadstone's: loaded by its plan and stream, everything else their own.

A repository's code may be written for transformers, or for nothing but torch. Such a class is a guest if it is an
nn.Module that is built by ``cls(config)``, where ``config`` comes from a class with ``from_dict(values)``. It gets the
checks of names, shapes and files, dtypes, device maps and the report; what loadstone's own classes declare (ties,
``_no_split_modules``, ``_init_weights``, ...) counts here too. Nothing of transformers is imported: the code does that
itself if it needs it.

Notable: parameters are built without memory, buffers for real, since a guest cannot recompute them; a buffer that is
only allocated in ``__init__`` is an error, so that none is ever garbage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import (
    ArgumentError,
    MissingWeightsError,
    ParallelError,
    QuantizationError,
    RemoteCodeError,
    nearest,
)
from ..loading.load import load_into
from ..loading.plan import Plan, make_plan
from ..loading.source import HUB_ARGUMENTS, Source
from .adapters.source import AdaptedSource
from .configuration import read_config_file
from .fields import parse_dtype
from .meta import CONSTRUCTORS, INITIALIZERS
from .origin import Origin
from .pretrained import NO_EFFECT, choose_dtype

_META = torch.device("meta")


def load_guest(
    cls: type[nn.Module],
    config_class: Any,
    source: Source,
    *,
    config: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_buffers: bool = False,
    attn_implementation: str | None = None,
    kernels: Any = "auto",
    quantization_config: Any = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    strict: bool = False,
    output_loading_info: bool = False,
    generation_config: Any = None,
    progress: bool | None = None,
    disable_mmap: bool | None = None,
    device_mesh: Any = None,
    **kwargs: Any,
) -> Any:
    """A model of a guest's class in evaluation mode; the arguments are those of `AutoModelForCausalLM.from_pretrained`.

    Raises ArgumentError or ParallelError for what needs a class of loadstone's, QuantizationError if the checkpoint or
    the caller wants codes, RemoteCodeError if the class cannot be built, and what `load_into` raises.
    """
    if isinstance(source, AdaptedSource):
        raise ArgumentError(
            f"{source.describe()} has an adapter, and {cls.__name__} is not loadstone's class; load the base model "
            "alone and put the adapter on it with the library that the class is written for"
        )
    if device_mesh is not None:
        raise ParallelError(
            f"device_mesh= needs a class of loadstone's, not {cls.__name__}, whose layers nobody declares"
        )
    if kernels != "auto":
        raise ArgumentError(f"kernels= needs a class of loadstone's, not {cls.__name__}")
    config = _configuration(config_class, source, config, kwargs)
    _check_plain(cls, config, quantization_config)
    origin = Origin(variant, use_safetensors, state_dict)
    checkpoint = origin.checkpoint(source)
    final = choose_dtype(dtype if dtype is not None else torch_dtype, config, checkpoint)
    config.dtype = final
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    model, restore = build_guest(cls, config, final)
    _check_names(make_plan(model, checkpoint, device_map="meta", **_declarations(model, key_mapping)))
    report = load_into(
        model,
        checkpoint,
        device_map=device_map,
        max_memory=max_memory,
        offload_buffers=offload_buffers,
        skip_keys=getattr(model, "_skip_keys_device_placement", None),
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        strict=strict,
        initialize=restore,
        progress=progress,
        disable_mmap=disable_mmap,
        **_declarations(model, key_mapping),
    )
    model.load_report = report  # type: ignore[assignment]
    _set_generation(model, generation_config, source)
    model.eval()
    return (model, report.loading_info()) if output_loading_info else model


def preview_guest(
    cls: type[nn.Module],
    config_class: Any,
    source: Source,
    *,
    dtype: Any = None,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    variant: str | None = None,
    quantization_config: Any = None,
    origin: Origin | None = None,
) -> Any:
    """The `Preview` of a load: its plan from headers alone, for devices that need not be here."""
    from .preview import Preview

    config = _configuration(config_class, source, None, {})
    _check_plain(cls, config, quantization_config)
    checkpoint = (origin or Origin(variant)).checkpoint(source)
    config.dtype = choose_dtype(dtype, config, checkpoint)
    model: Any = build_guest(cls, config, config.dtype)[0]
    plan = make_plan(
        model,
        checkpoint,
        device_map=device_map,
        max_memory=max_memory,
        devices_must_exist=False,
        **_declarations(model),
    )
    return Preview(config, model, checkpoint, plan)


def new_guest(
    cls: type[nn.Module], config: Any, *, dtype: Any = None, torch_dtype: Any = None, **options: Any
) -> nn.Module:
    """A model of a guest's class with the weights that its ``__init__`` gives it, in training mode."""
    config, attention = copy.deepcopy(config), options.pop("attn_implementation", None)
    for name in options:
        raise ArgumentError(f"from_config got {name!r}, which needs a class of loadstone's, not {cls.__name__}")
    if attention is not None:
        config._attn_implementation = attention
    asked = dtype if dtype is not None else torch_dtype
    model = _built(cls, config)
    return model if asked in (None, "auto") else model.to(parse_dtype(asked))


def _check_plain(cls: type, config: Any, asked: Any) -> None:
    if asked is not None or getattr(config, "quantization_config", None) is not None:
        raise QuantizationError(
            f"{cls.__name__} is not loadstone's class: its layers are not made into quantized ones. Where loadstone "
            "has a class for this model_type, leave out trust_remote_code"
        )


def _check_names(plan: Plan) -> None:
    """MissingWeightsError where weights are missing and others have no place: then a name has changed.

    What a library renames or merges by itself when it loads a class of its own, nobody does here.
    """
    if plan.missing and plan.unexpected:
        raise MissingWeightsError(
            f"{plan.name}: {len(plan.missing)} weights of {plan.model_class} are not in its files, which hold "
            f"{len(plan.unexpected)} others: {_shown(plan.missing)} are missing, {_shown(plan.unexpected)} are left."
            " The library that the class is written for may translate the names or merge tensors as it loads: pass "
            "key_mapping={pattern: replacement} if it is the names, else load it with that library"
        )


def _shown(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _declarations(model: nn.Module, key_mapping: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the class declares for the plan of a load, under the names that transformers has for it too."""
    return {
        "no_split": list(getattr(model, "_no_split_modules", None) or ()),
        "key_mapping": key_mapping or getattr(model, "_checkpoint_conversion_mapping", None) or None,
        "base_model_prefix": getattr(model, "base_model_prefix", "") or "",
        "ignore_unexpected": list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        "ignore_missing": list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()),
    }


def build_guest(cls: type[nn.Module], config: Any, dtype: torch.dtype) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    """The module tree with its weights on meta in ``dtype``, and what initialises a module's own weights.

    Weights that the class keeps in float32 stay so. Buffers that no file holds are real.
    """
    with _Hollow(dtype):
        model = _built(cls, config)
    names = _kept_wide(model, dtype)
    moved: dict[int, nn.Parameter] = {}
    values: dict[int, dict[str, torch.Tensor]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    wide = any(part in names for part in f"{path}.{name}".split("."))
                    moved[id(parameter)] = _on_meta(parameter, torch.float32 if wide else dtype)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                values.setdefault(id(module), {})[name] = buffer
                module._buffers[name] = buffer.to(_META)
    own: Any = getattr(model, "_init_weights", None)

    def initialize(module: nn.Module) -> None:
        for name, value in values.get(id(module), {}).items():
            there = module._buffers[name]
            if there is not None and not there.is_meta and not value.is_meta:
                there.copy_(value)
        if own is not None:
            own(module)

    return model, initialize


class _Hollow(TorchFunctionMode):
    """Context in which ``torch.empty``, of which parameters are made, takes no memory, and initialisers skip those.

    dtype: of floating-point tensors that are made without one, as if it were torch's default, in this thread alone.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in INITIALIZERS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        if func not in CONSTRUCTORS:
            return func(*args, **kwargs)
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = _META
        made = func(*args, **kwargs)
        free = (
            kwargs.get("dtype") is None and isinstance(made, torch.Tensor) and made.dtype == torch.get_default_dtype()
        )
        given = any(isinstance(value, torch.Tensor) for value in args)  # whose dtype it has
        return made.to(self.dtype) if free and not given else made


def _built(cls: type[nn.Module], config: Any) -> nn.Module:
    try:
        return cls(config)
    except Exception as error:
        raise RemoteCodeError(
            f"{cls.__name__}(config) failed: {type(error).__name__}: {error}; the fault is in the repository's code, "
            "or in the version of a package that it was written for"
        ) from error


def _on_meta(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    wanted = dtype if parameter.is_floating_point() else parameter.dtype
    blank = torch.empty(parameter.shape, dtype=wanted, device=_META)
    return nn.Parameter(blank, requires_grad=parameter.requires_grad)


def _kept_wide(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Parts of names of weights that the class wants in float32: some for half precision only, others always."""
    always = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return always | set((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ())


def guest_config(
    config_class: Any, values: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A configuration of a class with ``from_dict``, and of ``changes`` those that are none of its attributes."""
    config = config_class.from_dict(dict(values))
    known = {name: value for name, value in changes.items() if hasattr(config, name)}
    if known:
        config = config_class.from_dict({**values, **known})
    return config, {name: value for name, value in changes.items() if name not in known}


def _configuration(config_class: Any, source: Source, given: Any, changes: dict[str, Any]) -> Any:
    """The caller's configuration, copied, or the checkpoint's, with the caller's changes."""
    for name in (*HUB_ARGUMENTS, *NO_EFFECT):
        changes.pop(name, None)
    if given is None:
        config, unknown = guest_config(config_class, read_config_file(source.require("config.json")), changes)
    else:
        config, unknown = copy.deepcopy(given), changes
    for name in unknown:
        known = [key for key in vars(config) if not key.startswith("_")]
        raise ArgumentError(f"from_pretrained got an unknown argument {name!r}{nearest(name, known)}")
    config.name_or_path, config._commit_hash = source.name, source.commit
    return config


def _set_generation(model: nn.Module, given: Any, source: Source) -> None:
    """The generation defaults, of the class that the model has for them."""
    current = getattr(model, "generation_config", None)
    path = source.find("generation_config.json")
    if given is not None:
        model.generation_config = given
    elif path is not None and callable(getattr(type(current), "from_dict", None)):
        model.generation_config = type(current).from_dict(read_config_file(path))  # type: ignore[union-attr]
