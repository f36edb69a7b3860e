"""AutoConfig and AutoModelForCausalLM: from a name to the right class, by config.json's model_type."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..errors import ArgumentError, ConfigError, RemoteCodeRefused, UnsupportedModelError
from ..loading.collector import collector_paused
from ..loading.source import HUB_ARGUMENTS, Source, resolve_source
from . import table

if TYPE_CHECKING:
    from ..kernels import Kernels
    from ..models.causal_lm import CausalLM
    from ..models.configuration import PreTrainedConfig


class AutoConfig:
    """Configurations by model_type. Not to be built: use its class methods."""

    def __init__(self) -> None:
        _refuse_building(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The configuration of a checkpoint.

        pretrained_model_name_or_path: a directory, a Hub repository id, or a configuration file. ``cache_dir``,
            ``force_download``, ``local_files_only``, ``token``, ``revision`` and ``subfolder`` as for
            `AutoModelForCausalLM.from_pretrained`; other arguments override fields. With
            ``return_unused_kwargs=True`` returns the pair (configuration, arguments that are no fields).
        Raises NotFoundError if there is no config.json, ConfigError if it is malformed, UnsupportedModelError if its
            model_type is missing or unknown, RemoteCodeRefused if it could only be served by the repository's code.
        """
        from ..models.configuration import PreTrainedConfig, read_config_file

        trust_remote_code = kwargs.pop("trust_remote_code", None)
        kwargs.pop("code_revision", None)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        given = pretrained_model_name_or_path
        if isinstance(given, (str, os.PathLike)) and os.path.isfile(given):
            name, path = str(given), given
            values = PreTrainedConfig.get_config_dict(path)
        else:
            source = resolve_source(given, **hub)
            name = source.name
            values = read_config_file(source.require("config.json"))
        row = _row_of_file(name, values, trust_remote_code)
        kwargs.setdefault("name_or_path", name)
        return row.config_class().from_dict(values, **kwargs)

    @classmethod
    def for_model(cls, model_type: str, **kwargs: Any) -> PreTrainedConfig:
        """The configuration of an architecture with its defaults, fields overridden by keyword."""
        return table.lookup(model_type).config_class()(**kwargs)

    @staticmethod
    def register(model_type: str, config: type[PreTrainedConfig], exist_ok: bool = False) -> None:
        """Make a configuration known; AutoModelForCausalLM.register gives it a model. See `loadstone.register`."""
        table.register(model_type, config, None, exist_ok=exist_ok)


class AutoModelForCausalLM:
    """Causal language models by model_type. Not to be built: use its class methods."""

    def __init__(self) -> None:
        _refuse_building(self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        attn_implementation: str | None = None,
        kernels: Kernels | str | Mapping[str, str] = "auto",
        quantization_config: Any = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        strict: bool = False,
        output_loading_info: bool = False,
        generation_config: Any = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        subfolder: str = "",
        trust_remote_code: bool | None = None,
        code_revision: str | None = None,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint into the class its model_type is registered with; returns it in evaluation mode.

        pretrained_model_name_or_path: a directory with config.json and safetensors, or a Hub repository id; or of a
            LoRA adapter in PEFT's format: the base that it names is loaded with these arguments, then the adapter.
        config: a configuration, or where to read one, instead of the checkpoint's. Keyword arguments that are fields
            of the configuration override it.
        dtype: a torch dtype or its name; None and "auto" take config.json's, else that of the first tensor.
            ``torch_dtype`` is its older name.
        device_map: None (the CPU, or the device of an enclosing ``torch.device(...)``), a device in any spelling, a
            dictionary of module names to devices, or "auto", "balanced", "balanced_low_0", "sequential", with
            ``max_memory`` per device. With several devices accelerate moves the activations.
        attn_implementation: "sdpa" (default), "eager", "flash_attention_2" (also "flash": our Triton kernel, on a GPU),
            or a registered name.
        kernels: which implementation of the other operations runs: "auto" (Triton on a GPU, torch elsewhere), "torch",
            "triton" (attention too, if attn_implementation is not given), a registered name, or {operation: name}.
        quantization_config: a `BitsAndBytesConfig`, or of another registered method, or its dictionary: weights of
            linear layers are quantized as they come, one by one. A checkpoint that is quantized already keeps its own.
            bitsandbytes' methods go to the current GPU, if there is one, when no device_map is given.
        variant: load ``model.<variant>.safetensors``. use_safetensors: False is refused, pickles are not read.
        key_mapping: {regular expression: replacement}, applied to the checkpoint's keys.
        ignore_mismatched_sizes: initialise parameters whose shapes differ instead of raising. strict: raise if
            anything is missing or unexpected, instead of initialising and reporting it.
        output_loading_info: return (model, info) with the sets missing_keys, unexpected_keys, mismatched_keys.
        generation_config: instead of the checkpoint's.
        cache_dir, force_download, local_files_only, token, revision, subfolder: for the Hub; configuration and
            weights come from the one commit that ``revision`` names.
        trust_remote_code: running a repository's code is not available in this version; True changes nothing where
            a registered class serves the model, and is refused where none does. code_revision: accepted with it.
        progress: show a bar (None: on a terminal, when it takes long).
        The model's ``load_report`` says what came from where. On the CPU in the checkpoint's own dtype parameters are
        private copy-on-write mappings of the files: nothing is read until used, and training never changes the files.
        Raises NotFoundError, OfflineError or GatedError where files cannot be had; ConfigError and
            UnsupportedModelError for the configuration; FormatError, IntegrityError, PathError, ShapeMismatchError,
            MissingWeightsError for the weights; DeviceMapError; AttentionError and KernelError for what
            is unknown or cannot run here; QuantizationError for an unknown method, a wrong configuration and codes that
            do not fit; ArgumentError (a TypeError) for an unknown keyword. All before a byte of weights is read, but
            for numbers that have no code (infinities, NaN); no half-built model is left.
        """
        from ..models.adapters.source import with_base

        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        source = with_base(
            resolve_source(pretrained_model_name_or_path, **hub, token=token, revision=revision, subfolder=subfolder),
            {**hub, "token": token},
        )
        with collector_paused():
            model_class = cls._class_for(source, config, hub, token, trust_remote_code)
            return model_class.from_pretrained(
                source,
                *model_args,
                config=config,
                dtype=dtype,
                torch_dtype=torch_dtype,
                device_map=device_map,
                max_memory=max_memory,
                attn_implementation=attn_implementation,
                kernels=kernels,
                quantization_config=quantization_config,
                variant=variant,
                use_safetensors=use_safetensors,
                key_mapping=key_mapping,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                strict=strict,
                output_loading_info=output_loading_info,
                generation_config=generation_config,
                trust_remote_code=trust_remote_code,
                code_revision=code_revision,
                progress=progress,
                **kwargs,
            )

    @staticmethod
    def _class_for(
        source: Any, config: Any, hub: dict[str, Any], token: Any, trust_remote_code: bool | None
    ) -> type[CausalLM]:
        from ..models.configuration import PreTrainedConfig, read_config_file

        if isinstance(config, PreTrainedConfig):
            return table.architecture_of(config).model_class()
        if config is not None:
            values = PreTrainedConfig.get_config_dict(config, **hub, token=token)
            return _row_of_file(str(config), values, trust_remote_code).model_class()
        values = read_config_file(source.require("config.json"))
        return _row_of_file(source.name, values, trust_remote_code).model_class()

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> CausalLM:
        """A randomly initialised model of a configuration, in training mode.

        dtype (or torch_dtype): default ``config.dtype``, else torch's default. attn_implementation and kernels
            as for `from_pretrained`. The configuration is copied, not changed.
        Raises UnsupportedModelError if no registered class serves the configuration, ArgumentError for other keywords.
        """
        from ..models.configuration import PreTrainedConfig

        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(
                f"from_config takes a configuration object, got {type(config).__name__}; "
                "AutoConfig.from_pretrained(name_or_path) makes one"
            )
        return table.architecture_of(config).model_class().from_config(config, **kwargs)

    @staticmethod
    def register(config_class: type[PreTrainedConfig], model_class: type[CausalLM], exist_ok: bool = False) -> None:
        """Give a configuration class its model class; registers the configuration too if it is not yet.

        Raises RegistrationError if they do not fit together, or a model is there and ``exist_ok`` is false.
        """
        table.register_model(config_class, model_class, exist_ok=exist_ok)


def _row_of_file(name: str, values: dict[str, Any], trust_remote_code: bool | None) -> table.Architecture:
    """The row for a parsed config.json."""
    model_type = values.get("model_type")
    auto_map = values.get("auto_map")
    try:
        if model_type is None:
            raise UnsupportedModelError(
                f"{name}: config.json has no model_type; registered: "
                f"{', '.join(row.model_type for row in table.list_architectures())}"
            )
        return table.lookup(model_type)
    except UnsupportedModelError as error:
        if not auto_map:
            raise UnsupportedModelError(f"{name}: {error}") from None
        files = sorted({str(ref).rpartition("--")[2].rpartition(".")[0] + ".py" for ref in _references(auto_map)})
        advice = (
            "running it is not available in this version, with or without trust_remote_code"
            if trust_remote_code
            else "it is not run"
        )
        raise RemoteCodeRefused(
            f"{name} is of type {model_type!r}, which only its own code serves ({', '.join(files)} in the "
            f"repository: read it there); {advice}. To use it, put the classes in a module of yours and "
            "loadstone.register(model_type, config_class, model_class)"
        ) from None


def _references(auto_map: Any) -> list[Any]:
    return list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]


def _refuse_building(instance: object) -> NoReturn:
    name = type(instance).__name__
    raise _NotBuilt(f"{name} is not built directly; call {name}.from_pretrained(name_or_path)")


class _NotBuilt(ArgumentError, OSError):
    """Also the OSError that callers from transformers expect."""
