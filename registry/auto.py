"""AutoConfig and AutoModelForCausalLM: from a name to the right class, by config.json's model_type."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..errors import ArgumentError, ConfigError
from ..loading.collector import collector_paused
from ..loading.source import HUB_ARGUMENTS, Source, resolve_source
from ..models.parallel import across_ranks
from . import table
from .auto_map import CONFIG
from .choice import Trust, architecture_for, architecture_of_object, is_configuration, trust_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..kernels import Kernels
    from ..loading.parallel_mesh import ParallelConfig
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
            ``force_download``, ``local_files_only``, ``proxies``, ``token``, ``revision``, ``subfolder``, ``verify``,
            ``trust_remote_code``, ``code_revision`` and ``gguf_file`` as for `AutoModelForCausalLM.from_pretrained`;
            other arguments override fields. With ``return_unused_kwargs=True`` returns the pair (configuration,
            arguments that are no fields).
        Raises NotFoundError if there is no config.json, ConfigError if it is malformed, UnsupportedModelError if its
            model_type is missing or unknown, RemoteCodeRefused if only the repository's code could serve it, and
            RemoteCodeError if that is allowed and does not work.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        trust = trust_of(
            kwargs.pop("trust_remote_code", None), kwargs.pop("code_revision", None), hub, hub.get("revision")
        )
        name, source, values = _read_config(pretrained_model_name_or_path, hub, kwargs.pop("gguf_file", None))
        from .remote_class import made_config

        row = architecture_for(source, values, trust, CONFIG)
        kwargs.setdefault("name_or_path", name)
        made = made_config(row.config_class(), values, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config._commit_hash = source.commit
        return made

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
    @across_ranks
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Source | None,
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
        state_dict: Mapping[str, torch.Tensor] | None = None,
        gguf_file: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        strict: bool = False,
        output_loading_info: bool = False,
        generation_config: Any = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        proxies: Mapping[str, str | None] | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        subfolder: str = "",
        verify: str | bool | None = None,
        trust_remote_code: bool | None = None,
        code_revision: str | None = None,
        progress: bool | None = None,
        disable_mmap: bool | None = None,
        device_mesh: DeviceMesh | Any = None,
        parallel: ParallelConfig | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint into the class its model_type is registered with; returns it in evaluation mode.

        pretrained_model_name_or_path: a directory with config.json and safetensors, or a Hub repository id; or of a
            LoRA adapter in PEFT's format: the base that it names is loaded with these arguments, then the adapter.
        config: a configuration, or where to read one, instead of the checkpoint's. Keyword arguments that are fields
            of the configuration override it.
        dtype: a torch dtype or its name; None and "auto" take config.json's, else that of the first tensor.
            ``torch_dtype`` is its older name.
        device_map: None (the CPU, or the device of an enclosing ``torch.device(...)``), a device in any spelling,
            "disk", a dictionary of module names to devices, "cpu" and "disk", or "auto", "balanced", "balanced_low_0",
            "sequential"; see docs/device_maps.md. Weights on the CPU or on disk beside an accelerator visit it block by
            block. max_memory: {device, "cpu" or "disk": size}, kept by every map. offload_buffers (a keyword): plain
            buffers visit too. offload_folder is accepted and stays empty: weights on disk stay in their own files.
        attn_implementation: "sdpa" (default), "eager", "flash_attention_2" (also "flash": our Triton kernel, on a GPU),
            or a registered name.
        kernels: which implementation of the other operations runs: "auto" (Triton on a GPU, torch elsewhere), "torch",
            "triton" (attention too, if attn_implementation is not given), a registered name, or {operation: name}.
        quantization_config: a `BitsAndBytesConfig`, or of another registered method, or its dictionary: weights of
            linear layers are quantized as they come, one by one. A checkpoint that is quantized already keeps its own.
            bitsandbytes' methods go to the current GPU, if there is one, when no device_map is given.
        variant: load ``model.<variant>.safetensors``. use_safetensors: False reads ``pytorch_model.bin`` or its
            shards instead; what a pickle asks to run is refused, never run.
        state_dict: the weights, instead of the checkpoint's; tensors that fit as they are become the model's own,
            without a copy. With ``config=`` the first argument can be None.
        gguf_file: the name of a GGUF file there, of a Llama or Mistral model: configuration and weights are its own.
            Blocks of any common type are decoded (by the package gguf) to ``dtype``, or quantized anew.
        key_mapping: {regular expression: replacement}, applied to the checkpoint's keys.
        ignore_mismatched_sizes: initialise parameters whose shapes differ instead of raising. strict: raise if
            anything is missing or unexpected, instead of initialising and reporting it.
        output_loading_info: return (model, info) with the sets missing_keys, unexpected_keys, mismatched_keys.
        generation_config: instead of the checkpoint's.
        cache_dir, force_download, local_files_only, proxies, token, revision, subfolder: for the Hub; configuration and
            weights come from the one commit that ``revision`` names. verify: "sha256" compares every file, cached ones
            too, with the hash that the Hub gave for it (IntegrityError; the client compares sizes only).
        trust_remote_code: only True allows running the code of the repository, whose own classes (``auto_map``) then
            serve it unless you registered some for its model_type. Otherwise a registered class serves it, and
            RemoteCodeRefused says what is missing. code_revision: the branch, tag or commit of the code; default: the
            commit of the configuration, for code of another repository that one's main.
        progress: show a bar (None: on a terminal, when it takes long).
        disable_mmap: True reads the weights from end to end into memory of their own instead of mapping the files;
            None does so on network and FUSE file systems, where the report says it; False never. A mapped file that
            another program cuts later ends the process (SIGBUS); one that was read does not matter any more.
        device_mesh: spread the model over the ranks of a torch DeviceMesh, each of which calls this and reads its own
            parts only; see docs/parallel.md. parallel: "fsdp", "tp", "fsdp+tp" or a `ParallelConfig`; None goes by
            the names of the mesh's dimensions.
        The model's ``load_report`` says what came from where. On the CPU in the checkpoint's own dtype parameters are
        private copy-on-write mappings of the files: nothing is read until used, and training never changes the files.
        Raises NotFoundError, OfflineError or GatedError where files cannot be had; ConfigError and
            UnsupportedModelError for the configuration; FormatError, IntegrityError, PathError, ShapeMismatchError,
            MissingWeightsError for the weights; DeviceMapError; ParallelError; AttentionError and KernelError for what
            is unknown or cannot run here; QuantizationError for an unknown method, a wrong configuration and codes that
            do not fit; ArgumentError (a TypeError) for an unknown keyword. All before a byte of weights is read, but
            for numbers that have no code (infinities, NaN); no half-built model is left.
        """
        from ..models.origin import Origin

        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "proxies": proxies,
            "verify": verify,
        }
        where = {**hub, "token": token, "revision": revision, "subfolder": subfolder}
        origin = Origin(variant, use_safetensors, state_dict, gguf_file)
        source = origin.source(pretrained_model_name_or_path, where, config)
        trust = trust_of(trust_remote_code, code_revision, {**hub, "token": token}, revision)
        with collector_paused():
            from .remote_class import loader_of

            load = loader_of(row_for(source, config, {**hub, "token": token}, trust, gguf_file))
            return load(
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
                state_dict=state_dict,
                gguf_file=gguf_file,
                key_mapping=key_mapping,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                strict=strict,
                output_loading_info=output_loading_info,
                generation_config=generation_config,
                trust_remote_code=trust_remote_code,
                code_revision=code_revision,
                progress=progress,
                disable_mmap=disable_mmap,
                **({} if device_mesh is None else {"device_mesh": device_mesh}),
                **kwargs,
            )

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        *,
        trust_remote_code: bool | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> CausalLM:
        """A randomly initialised model of a configuration, in training mode.

        dtype (or torch_dtype): default ``config.dtype``, else torch's default. attn_implementation and kernels
            as for `from_pretrained`. The configuration is copied, not changed.
        trust_remote_code, code_revision: as for `from_pretrained`; the code is that beside the configuration's own
            class, else of the repository and commit which the configuration was read from (``cache_dir``, ``token``
            and the like reach it).
        Raises UnsupportedModelError if no registered class serves the configuration, ArgumentError for other keywords.
        """
        if not is_configuration(config):
            raise ConfigError(
                f"from_config takes a configuration object, got {type(config).__name__}; "
                "AutoConfig.from_pretrained(name_or_path) makes one"
            )
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs and trust_remote_code is True}
        row = architecture_of_object(config, None, trust_of(trust_remote_code, code_revision, hub))
        from .remote_class import builder_of

        return builder_of(row)(config, **kwargs)

    @staticmethod
    def register(config_class: type[PreTrainedConfig], model_class: type[CausalLM], exist_ok: bool = False) -> None:
        """Give a configuration class its model class; registers the configuration too if it is not yet.

        Raises RegistrationError if they do not fit together, or a model is there and ``exist_ok`` is false.
        """
        table.register_model(config_class, model_class, exist_ok=exist_ok)


def _read_config(given: Any, hub: dict[str, Any], gguf_file: str | None = None) -> tuple[str, Source, dict[str, Any]]:
    """Name, place and contents of a configuration: a directory's, a repository's, a file's, or a GGUF file's."""
    from ..models.configuration import read_config_file

    if gguf_file is not None:
        from ..models.gguf import read_gguf_config

        source = resolve_source(given, **hub)
        return source.name, source, read_gguf_config(source, gguf_file)
    if isinstance(given, (str, os.PathLike)) and os.path.isfile(given):
        path = Path(given)
        return str(given), resolve_source(path.absolute().parent), read_config_file(path)
    source = resolve_source(given, **hub)
    return source.name, source, read_config_file(source.require("config.json"))


def row_for(
    source: Source, config: Any, hub: dict[str, Any], trust: Trust, gguf_file: str | None
) -> table.Architecture:
    """The row for a checkpoint whose configuration is ``config``: an object, where to read one, None for its own."""
    if is_configuration(config):
        return architecture_of_object(config, source, trust)
    _, place, values = _read_config(source, hub, gguf_file) if config is None else _read_config(config, hub)
    return architecture_for(place, values, trust)


def _refuse_building(instance: object) -> NoReturn:
    name = type(instance).__name__
    raise _NotBuilt(f"{name} is not built directly; call {name}.from_pretrained(name_or_path)")


class _NotBuilt(ArgumentError, OSError):
    """Also the OSError that callers from transformers expect."""
