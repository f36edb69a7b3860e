"""From a checkpoint to a model and back: what `CausalLM.from_pretrained`, ``from_config`` and ``save_pretrained`` do.

The way of the data: source → configuration → meta model → plan → stream → report. Nothing is read but headers, and
nothing is allocated, before every argument, name and shape is known to be right.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentError, ConfigError, ParallelError, nearest
from ..kernels import Kernels, check_attention
from ..loading.checkpoint import Checkpoint
from ..loading.load import load_into
from ..loading.memory import check_memory
from ..loading.source import HUB_ARGUMENTS, Source
from .adapters.source import AdaptedSource
from .configuration import PreTrainedConfig
from .custom_code import carried_code, check_trust
from .depth import check_depth
from .fields import parse_dtype
from .meta import MetaBuild
from .origin import Origin
from .parallel import Joined, class_of, refuse_on_mesh
from .quantized import choose_quantizer, default_place, plain_config, quantize_on_meta

if TYPE_CHECKING:
    from .causal_lm import CausalLM

logger = logging.getLogger("loadstone.models")
_Model = TypeVar("_Model", bound="CausalLM")
_LOAD_ARGUMENTS = (
    "config", "dtype", "torch_dtype", "device_map", "max_memory", "offload_buffers", "attn_implementation", "kernels",
    "state_dict", "gguf_file",
    "quantization_config", "variant", "use_safetensors", "key_mapping", "ignore_mismatched_sizes", "strict",
    "output_loading_info", "generation_config", "trust_remote_code", "code_revision", "progress", "disable_mmap",
    "device_mesh", "parallel",
)  # fmt: skip
# What they asked for is how loading works: nothing is built twice, and what is offloaded stays in its own files.
NO_EFFECT = ("low_cpu_mem_usage", "offload_folder", "offload_state_dict")
_NO_EFFECT_ON_SAVE = ("save_function",)  # how accelerate's loops had pickles written on the main process alone


def load_pretrained(
    cls: type[CausalLM],
    name_or_path: str | os.PathLike[str] | Source | None,
    *model_args: Any,
    config: PreTrainedConfig | str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_buffers: bool = False,
    attn_implementation: str | None = None,
    kernels: Kernels | str | Mapping[str, str] = "auto",
    quantization_config: Any = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    gguf_file: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    strict: bool = False,
    output_loading_info: bool = False,
    generation_config: Any = None,
    trust_remote_code: bool | None = None,
    code_revision: str | None = None,
    progress: bool | None = None,
    disable_mmap: bool | None = None,
    device_mesh: Joined | None = None,
    **kwargs: Any,
) -> Any:
    """See `AutoModelForCausalLM.from_pretrained`; ``device_mesh`` as `across_ranks` gives it."""
    if model_args:
        raise ArgumentError(
            f"{cls.__name__}.from_pretrained takes keyword arguments after the name, got {len(model_args)} more values"
        )
    check_trust(trust_remote_code)  # of a class that is here: there is nothing to trust
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    for name in NO_EFFECT:
        kwargs.pop(name, None)
    origin = Origin(variant, use_safetensors, state_dict, gguf_file)
    source = origin.source(name_or_path, hub, config)
    config = _configuration(cls, source, config, kwargs, hub, origin)
    selection = _choose(config, attn_implementation, kernels)
    quantizer = choose_quantizer(source.name, config, quantization_config)
    if device_mesh is not None:
        refuse_on_mesh(device_mesh.layout, source, device_map, max_memory, quantizer)
    checkpoint = origin.checkpoint(source)
    config.dtype = choose_dtype(dtype if dtype is not None else torch_dtype, config, checkpoint)
    generation_config = generation_config_of(generation_config, source, config)

    check_depth(config, checkpoint)
    model = build_on_meta(cls, config)
    if quantizer is not None:
        quantize_on_meta(model, quantizer, device_map)
    model.set_kernels(selection)
    spread = None if device_mesh is None else device_mesh.spread(model, source.commit)
    report = load_into(
        model,
        checkpoint,
        device_map=default_place(quantizer, device_map) if spread is None else spread.layout.device,
        max_memory=max_memory,
        offload_buffers=offload_buffers,
        skip_keys=model._skip_keys_device_placement,
        key_mapping=key_mapping,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        strict=strict,
        initialize=model._init_weights,
        progress=progress,
        disable_mmap=disable_mmap,
        spread=spread,
        **declarations(model),
    )
    if device_mesh is not None:
        device_mesh.finish(model)
    if quantizer is not None:
        quantizer.check(model)
    model.load_report = report
    model.generation_config = generation_config
    model.eval()
    if isinstance(source, AdaptedSource):
        model.load_adapter(source.adapter)
    return (model, report.loading_info()) if output_loading_info else model


def _choose(
    config: PreTrainedConfig, attn_implementation: str | None, kernels: Kernels | str | Mapping[str, str]
) -> Kernels:
    """The checked selection of kernels; the attention goes to the configuration: the caller's, or with all operations
    in Triton, attention too."""
    selection = Kernels.of(kernels).require()
    if attn_implementation is None and selection.default == "triton" and config._attn_implementation is None:
        attn_implementation = "flash_attention_2"
    if attn_implementation is not None:
        config._attn_implementation = check_attention(attn_implementation)
    return selection


def declarations(model: CausalLM) -> dict[str, Any]:
    """What the architecture declares for the plan of a load, as keywords of `make_plan` and `load_into`."""
    return {
        "no_split": model._no_split_modules,
        "ties": model.active_ties(),
        "base_model_prefix": model.base_model_prefix,
        "ignore_unexpected": model._keys_to_ignore_on_load_unexpected,
        "ignore_missing": model._keys_to_ignore_on_load_missing,
    }


def _configuration(
    cls: type[CausalLM], source: Source, given: Any, kwargs: dict[str, Any], hub: dict[str, Any], origin: Origin
) -> PreTrainedConfig:
    """The configuration to build from: the caller's, copied, or the checkpoint's with the caller's overrides."""
    expected = cls.config_class
    if isinstance(given, PreTrainedConfig):
        if kwargs:
            name = next(iter(kwargs))
            if expected.has_field(name):
                raise ArgumentError(
                    f"{name}= was given beside config=; set config.{name} instead, so that it is clear which one counts"
                )
            raise _unknown_argument(cls, name)
        config = copy.deepcopy(given)
        config.name_or_path = source.name
        config._commit_hash = source.commit
        return config
    for name in kwargs:
        if not expected.has_field(name):
            raise _unknown_argument(cls, name)
    if given is None:
        config = origin.configuration(expected, source, **kwargs)
        config._commit_hash = source.commit
        return config
    return expected.from_pretrained(given, **hub, **{**kwargs, "name_or_path": source.name})


def _unknown_argument(cls: type[CausalLM], name: str) -> ArgumentError:
    known = [*_LOAD_ARGUMENTS, *HUB_ARGUMENTS, *cls.config_class.field_names()]
    if name in ("load_in_4bit", "load_in_8bit"):
        return ArgumentError(f"{name}= is not an argument of from_pretrained; pass quantization_config=")
    return ArgumentError(
        f"from_pretrained got an unknown argument {name!r}{nearest(name, known)} It is neither an option of "
        f"loading nor a field of {cls.config_class.__name__}"
    )


def choose_dtype(asked: Any, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """None and "auto": what config.json says, else the dtype of the first floating-point tensor of the checkpoint."""
    if asked is not None and asked != "auto":
        return parse_dtype(asked)
    if (said := getattr(config, "dtype", None)) is not None:
        return parse_dtype(said)
    floating = (entry.dtype for entry in checkpoint.entries.values() if entry.dtype.is_floating_point)
    return next(floating, torch.get_default_dtype())


def generation_config_of(given: Any, source: Source, config: PreTrainedConfig) -> Any:
    """The caller's generation configuration, else the checkpoint's, None where it has none."""
    path = source.find("generation_config.json") if given is None else None
    if given is None and path is None:
        return None
    from .generation import GenerationConfig

    return GenerationConfig.of(given) if path is None else GenerationConfig.from_file(path)


def build_on_meta(cls: type[_Model], config: PreTrainedConfig) -> _Model:
    """The module tree with every parameter on the meta device, floating-point ones in ``config.dtype``."""
    with MetaBuild(config.dtype or torch.get_default_dtype()):
        return cls(config)


def build_from_config(
    cls: type[_Model],
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    kernels: Kernels | str | Mapping[str, str] = "auto",
    **kwargs: Any,
) -> _Model:
    """See `AutoModelForCausalLM.from_config`."""
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(f"from_config takes a configuration object, got {type(config).__name__}")
    for name, value in kwargs.items():
        if name == "trust_remote_code":  # nothing here comes from anywhere else
            check_trust(value)
            continue
        raise ArgumentError(
            f"from_config got an unknown argument {name!r}{nearest(name, ('dtype', 'attn_implementation', 'kernels'))}"
        )
    config = copy.deepcopy(config)
    asked = dtype if dtype is not None else torch_dtype
    if asked is not None and asked != "auto":
        config.dtype = parse_dtype(asked)
    elif config.dtype is None:
        config.dtype = torch.get_default_dtype()
    if getattr(config, "quantization_config", None) is not None:
        logger.warning(
            "%s.from_config makes new weights, which are not quantized: quantization_config is left out", cls.__name__
        )
        plain_config(config)
    selection = _choose(config, attn_implementation, kernels)
    _check_fits_memory(cls, config)
    model = cls(config)
    model.set_kernels(selection)
    if config.dtype != torch.get_default_dtype():
        model.to(config.dtype)
    return model


def _check_fits_memory(cls: type[CausalLM], config: PreTrainedConfig) -> None:
    """MemoryLimitError before anything is allocated, for a configuration whose weights the CPU cannot hold."""
    if torch.get_default_device().type != "cpu":
        return
    held = build_on_meta(cls, copy.deepcopy(config)).parameters()
    check_memory(sum(parameter.nbytes for parameter in held), f"a {cls.__name__} of this configuration")


def save_pretrained(
    model: CausalLM,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool,
    state_dict: dict[str, Tensor] | None,
    push_to_hub: bool,
    max_shard_size: int | str,
    variant: str | None,
    token: str | bool | None,
    safe_serialization: bool,
    **push_kwargs: Any,
) -> None:
    """See `CausalLM.save_pretrained`."""
    from ..loading.save import save_checkpoint

    if not safe_serialization:
        raise ArgumentError("safe_serialization=False would write pickles; loadstone writes safetensors only")
    push_kwargs = {name: value for name, value in push_kwargs.items() if name not in _NO_EFFECT_ON_SAVE}
    if push_kwargs and not push_to_hub:
        name = next(iter(push_kwargs))
        raise ArgumentError(f"save_pretrained got an unknown argument {name!r} (push_to_hub is False)")
    if model.adapters:
        if state_dict is not None or push_to_hub:
            raise ArgumentError(
                "with adapters save_pretrained writes the active adapter alone, to a directory: leave out state_dict "
                "and push_to_hub, or merge_and_unload() the adapters first"
            )
        if is_main_process or model.layout is not None:
            model.save_adapter(save_directory)
        return
    if model.layout is not None and state_dict is None:
        from ..loading.parallel_save import save_spread

        if push_to_hub:
            raise ParallelError("a model on a device mesh is saved to a directory first; upload that from one rank")
        save_spread(
            save_directory,
            model,
            model.layout,
            texts=texts_of(model),
            max_shard_size=max_shard_size,
            variant=variant,
        )
        return
    if is_main_process:
        save_checkpoint(
            save_directory,
            model.state_dict() if state_dict is None else state_dict,
            texts=texts_of(model),
            max_shard_size=max_shard_size,
            variant=variant,
            tied=tuple(model.active_ties()),
        )
    if push_to_hub and is_main_process:
        from ..loading.upload import push_directory

        repo_id = push_kwargs.pop("repo_id", None) or Path(save_directory).resolve().name
        push_directory(save_directory, repo_id, token=token, variant=variant, **push_kwargs)


def texts_of(model: CausalLM) -> dict[str, str | bytes]:
    """The text files of a checkpoint, by name; the code of a class that is registered for an auto class among them."""
    config = copy.deepcopy(model.config)
    config.architectures = [class_of(model).__name__]
    config.dtype = model.dtype
    if not model.is_quantized:
        plain_config(config)
    files, auto_map = carried_code(config, model)
    return {
        **files,
        "config.json": config.with_auto_map(auto_map).to_json_string(),
        "generation_config.json": model.generation_config.to_json_string(),
    }


def push_to_hub(
    model: CausalLM, repo_id: str, *, max_shard_size: int | str = "50GB", variant: str | None = None, **kwargs: Any
) -> Any:
    """See `CausalLM.push_to_hub`."""
    import tempfile

    from ..loading.upload import push_directory

    if model.layout is not None:
        raise ParallelError("a model on a device mesh is not pushed: save_pretrained() it on all ranks, upload on one")
    if model.adapters:
        raise ArgumentError(
            "a model with adapters is not pushed whole: merge_and_unload() them, or save_adapter() and upload that"
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)
        return push_directory(folder, repo_id, variant=variant, **kwargs)
