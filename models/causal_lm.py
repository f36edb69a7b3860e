"""The base of every causal language model: forward, loss, accessors, and the doors to loading, saving and generation.

An architecture subclasses `CausalLM`, sets the class attributes below, builds a `Decoder` under ``base_model_prefix``
and a head named ``lm_head``, and calls ``post_init()`` last. Everything else is inherited. Methods that are assigned
below are functions of the files they come from, one subject each.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import ArgumentError, AttentionError, ConfigError, nearest
from ..kernels import AUTO, Kernels
from ..loading.collector import collector_paused
from ..loading.placement import ON_DISK, RUNS_ON
from ..quant.packed import refuse_cast, refuse_training
from . import accounting, freezing, kernel_choice, parts, pretrained, quantized, training, vocabulary
from .adapters.methods import AdapterMethods
from .cache import one_spelling
from .configuration import PreTrainedConfig
from .custom_code import check_auto_class
from .head import fused_loss, skips_logits
from .initial import initialize_module
from .outputs import CausalLMOutputWithPast, keep_positions
from .packing import PACKING
from .parallel import across_ranks, check_all_spread
from .peer_class import reduce_by_type, seen_class, set_class

_Model = TypeVar("_Model", bound="CausalLM")
_LOSS_KWARGS = ("num_items_in_batch", "shift_labels", "ignore_index")


class CausalLM(AdapterMethods, nn.Module):
    """A decoder and a language-modelling head.

    Class attributes an architecture declares:
    ``config_class``; ``base_model_prefix``: the attribute that holds the decoder, and the prefix of its state-dict
    keys; ``_tied_weights_keys``: {tied parameter: its source}, in force when ``config.tie_word_embeddings``;
    ``_no_split_modules``: class names never split over devices; ``_keys_to_ignore_on_load_unexpected`` and
    ``_keys_to_ignore_on_load_missing``: regular expressions of checkpoint keys that are no news; ``_tp_plan``: how
    tensor parallelism shares out its modules (see `parallel_plan`).
    """

    config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True
    loss_type: ClassVar[str] = (
        "ForCausalLM"  # the peers' name of a loss that shifts labels: how the Trainer counts them
    )
    is_parallelizable: ClassVar[bool] = False
    model_parallel: ClassVar[bool] = False
    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    _no_split_modules: ClassVar[list[str]] = []
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = []
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = []
    _tp_plan: ClassVar[dict[str, Any]] = {}
    _auto_class: ClassVar[str | None] = None

    lm_head: nn.Module
    kernels: Kernels = AUTO
    layout: Any = None
    """Over which device mesh the model is spread, None for a model of one process."""
    stage_skips_logits: bool = False
    """Whether the last stage of a pipeline gives hidden states in training, of which its loss is taken."""
    hf_quantizer: Any = None
    is_quantized: bool = False
    is_loaded_in_4bit: bool = False
    is_loaded_in_8bit: bool = False
    quantization_method: str | None = None
    model_tags: list[str] | None = None
    _input_grads_hook: Any = None

    __class__ = property(seen_class, set_class)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if type(self) is self.__class__ else reduce_by_type(self)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(
                f"{type(self).__name__} is built from a {self.config_class.__name__}, got {type(config).__name__}; "
                f"to load weights use {type(self).__name__}.from_pretrained(name_or_path)"
            )
        self.config: Any = config
        self.name_or_path: str = config.name_or_path  # what it was loaded from, or an empty string; PEFT writes it
        self.load_report: Any = None
        self.warnings_issued: dict[str, bool] = {}  # trainers note there what they said once
        self._generation_config: Any = None
        if config._attn_implementation is None:
            config._attn_implementation = "eager" if config.output_attentions else "sdpa"
        kernels.check_attention(config._attn_implementation)
        if config.output_attentions and not kernels.returns_weights(config._attn_implementation):
            raise AttentionError(
                f"config.output_attentions=True needs attn_implementation='eager', not {config._attn_implementation!r}"
            )

    def post_init(self) -> None:
        """Initialise the parameters and tie what is tied. The last line of an architecture's ``__init__``.

        On the meta device, where loading builds models, there is nothing to initialise yet.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        with torch.no_grad():
            self.apply(self._init_weights)
        self.tie_weights()

    _init_weights = initialize_module

    # Forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        cache: Any = None,
        **loss_kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss if labels are given; in training the loss alone.

        input_ids: (batch, seq), int64; or inputs_embeds: (batch, seq, hidden_size).
        attention_mask: (batch, past + seq), 1 = keep, padding on either side; or dense (batch, heads, seq, keys).
        position_ids: (batch or 1, seq); default: the places after what the cache has seen. They are not derived from
            the mask: left-padded rows need them (``generate`` passes them). Without mask and past, positions that
            start over mark packed sequences, which do not see each other.
        past_key_values, or by its newer name ``cache``: a cache, filled in place; use_cache: whether to make one
            (default ``config.use_cache``).
        labels: (batch, seq), int64, -100 = ignored; shifted inside. loss_kwargs: ``num_items_in_batch``,
            ``shift_labels``, ``ignore_index`` (see `kernels.causal_lm_loss`); and of sequences packed into one row
            ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k`` or ``seq_idx`` (see
            `models.packing`), which do not see each other and whose positions start over unless position_ids say other.
        logits_to_keep: logits for the last n positions only (0: all), or a tensor of positions (`keep_positions`).
        skip_logits: take the loss without ever holding the logits, which are None then (`linear_cross_entropy`).
            Default: in training mode with labels, if the head is a plain matrix (`why_not_fused`). False: both.
        Returns a CausalLMOutputWithPast, or the tuple of its set fields if ``return_dict`` is false.
        Raises ArgumentError for unknown keywords or contradicting inputs, or if logits are to be skipped that are all
            that is asked for, or cannot be; AttentionError for attention weights that
            the implementation does not hold.
        """
        packing = {name: value for name, value in loss_kwargs.items() if name in PACKING}
        loss_kwargs = {name: value for name, value in loss_kwargs.items() if name not in PACKING}
        unknown = [name for name in loss_kwargs if name not in _LOSS_KWARGS]
        if unknown:
            hint = nearest(
                unknown[0], ("input_ids", "attention_mask", "position_ids", "labels", *_LOSS_KWARGS, *PACKING)
            )
            raise ArgumentError(f"{type(self).__name__}.forward got an unknown argument {unknown[0]!r}{hint}")
        has_labels = labels is not None or loss_kwargs.get("shift_labels") is not None
        fused = skips_logits(self, skip_logits, has_labels)
        if self.layout is not None and self.training:
            check_all_spread(self)
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_spelling(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packing,
        )
        hidden_states = keep_positions(outputs.last_hidden_state, logits_to_keep)
        loss = logits = None
        if fused:
            loss = fused_loss(self.lm_head, hidden_states, labels, kernels=self.kernels, **loss_kwargs)
        else:
            logits = self.lm_head(hidden_states)
            if has_labels:
                loss = kernels.causal_lm_loss(logits, labels, kernels=self.kernels, **loss_kwargs)
        if self.is_quantized:
            quantized.check_learns(self, loss)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()  # type: ignore[return-value]

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Continue prompts; see `loadstone.models.generation.generate` for all options.

        inputs: (batch, seq), int64. Returns (batch, seq + new), int64, or an output object if asked for.
        """
        from .generation import generate

        return generate(self, inputs, generation_config=generation_config, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The keywords of one forward of a generation loop of your own (`generate` has its own): what is not cached.

        input_ids: (batch, seq), all tokens so far. kwargs: of `forward`, ``past_key_values`` among them.
        """
        past = kwargs.get("past_key_values")
        seen = 0 if past is None else past.get_seq_length()
        return {**kwargs, "input_ids": input_ids[:, seen:]}

    @property
    def generation_config(self) -> Any:
        """The generation defaults: of the checkpoint if it had any, else derived from the configuration."""
        if self._generation_config is None:
            from .generation import GenerationConfig

            self._generation_config = GenerationConfig.from_model_config(self.config)
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if value is not None:
            from .generation import GenerationConfig

            value = GenerationConfig.of(value)
        self._generation_config = value

    def can_generate(self) -> bool:
        """True: every causal language model can."""
        return True

    set_attn_implementation = kernel_choice.set_attn_implementation
    set_kernels = kernel_choice.set_kernels
    kernel_report = kernel_choice.kernel_report

    # Loading and saving

    @classmethod
    @across_ranks
    def from_pretrained(cls: type[_Model], pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint; see `AutoModelForCausalLM.from_pretrained` for the arguments."""
        with collector_paused():
            return pretrained.load_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls: type[_Model], config: PreTrainedConfig, **kwargs: Any) -> _Model:
        """A randomly initialised model, in training mode; see `AutoModelForCausalLM.from_config`."""
        return pretrained.build_from_config(cls, config, **kwargs)

    _from_config = from_config

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        safe_serialization: bool = True,
        **push_kwargs: Any,
    ) -> None:
        """Write weights as safetensors, the index if sharded, config.json and generation_config.json.

        With adapters on the model it writes the active one only, as `save_adapter` does.
        The directory holds the old checkpoint or the new one whole, whatever happens in between.
        A model spread over a device mesh is gathered weight by weight and written by the mesh's first rank: every
        rank has to call this, whatever is_main_process.
        is_main_process: False writes nothing (distributed training). state_dict: instead of the model's own.
        max_shard_size: bytes or "5GB". variant: as in ``model.<variant>.safetensors``. push_to_hub: upload too, with
        ``push_kwargs`` as in `push_to_hub` (repo_id defaults to the directory's name).
        Raises CheckpointError (PathError, ...) with the old checkpoint untouched; ArgumentError for
        ``safe_serialization=False`` or an unknown keyword (``save_function``, of older loops, has no effect).
        """
        pretrained.save_pretrained(
            self,
            save_directory,
            is_main_process=is_main_process,
            state_dict=state_dict,
            push_to_hub=push_to_hub,
            max_shard_size=max_shard_size,
            variant=variant,
            token=token,
            safe_serialization=safe_serialization,
            **push_kwargs,
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload weights, configuration and a model card to the Hub; ``max_shard_size`` and ``variant`` as for
        `save_pretrained`, other keywords as in `loading.upload.push_directory`."""
        return pretrained.push_to_hub(self, repo_id, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Mark the class so that saving carries its code, and that of what it imports relatively, along.

        auto_class: ``AutoModelForCausalLM`` or its name; it then loads the checkpoint with trust_remote_code=True.
        Raises ArgumentError for another auto class.
        """
        cls._auto_class = check_auto_class(cls, auto_class, "AutoModelForCausalLM")

    # The parts, and what they amount to

    @property
    def base_model(self) -> nn.Module:
        """The decoder without its head."""
        return getattr(self, self.base_model_prefix)

    active_ties = parts.active_ties
    tie_weights = parts.tie_weights
    get_decoder = parts.get_decoder
    set_decoder = parts.set_decoder
    get_input_embeddings = parts.get_input_embeddings
    set_input_embeddings = parts.set_input_embeddings
    get_output_embeddings = parts.get_output_embeddings
    set_output_embeddings = parts.set_output_embeddings
    resize_token_embeddings = vocabulary.resize_token_embeddings
    num_parameters = accounting.num_parameters
    get_memory_footprint = accounting.get_memory_footprint
    estimate_tokens = accounting.estimate_tokens
    floating_point_ops = accounting.floating_point_ops

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter, as it is used (one on disk may be held in another)."""
        return next(
            vars(module).get(ON_DISK, {}).get(name, parameter.dtype)
            for module in self.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_floating_point() and parameter.dtype.itemsize > 1  # else codes
        )

    @property
    def device(self) -> torch.device:
        """Where inputs belong: the device of the first parameter, or the first that a spread-out model runs on."""
        return vars(self).get(RUNS_ON) or next(self.parameters()).device

    # Quantization

    def set_quantizer(self, quantizer: Any) -> None:
        """Note the `Quantizer` whose packed layers the model has, None for none; its configuration goes into ours."""
        self.hf_quantizer = quantizer
        self.is_quantized = quantizer is not None
        bits = None if quantizer is None else quantizer.bits
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = bits == 4, bits == 8
        self.quantization_method = None
        if quantizer is not None:
            self.config.quantization_config = quantizer.config
            self.quantization_method = quantizer.config.quant_method

    def dequantize(self, dtype: torch.dtype | None = None) -> CausalLM:
        """Decode the packed weights, to ``dtype`` or that of before; the model, changed in place, is a plain one again.

        Raises QuantizationError if it is not quantized.
        """
        return quantized.dequantize(self, dtype)

    def requires_grad_(self: _Model, requires_grad: bool = True) -> _Model:
        """As for any module; True is a QuantizationError on a quantized model, whose codes have no gradient."""
        if requires_grad and self.is_quantized:
            refuse_training()
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.is_quantized:
            refuse_cast(fn)  # before the first module is cast
        return super()._apply(fn, recurse)

    # Training

    gradient_checkpointing_enable = training.gradient_checkpointing_enable
    gradient_checkpointing_disable = training.gradient_checkpointing_disable
    is_gradient_checkpointing = property(training.is_gradient_checkpointing)
    activation_checkpointing_enable = training.activation_checkpointing_enable
    activation_checkpointing_disable = training.gradient_checkpointing_disable
    is_activation_checkpointing = property(training.is_gradient_checkpointing)
    enable_input_require_grads = training.enable_input_require_grads
    disable_input_require_grads = training.disable_input_require_grads
    freeze = freezing.freeze
    unfreeze = freezing.unfreeze

    def pipeline_stage(self, skip_logits: bool = True) -> Any:
        """This rank's stage for the schedules of ``torch.distributed.pipelining``; see `pipeline_stage.Stage`.

        skip_logits: in training the last stage gives hidden states, of which the stage's ``loss`` takes the loss
            without ever holding the logits; False: logits, for a ``loss_fn`` of your own.
        Raises ParallelError for a model that was not loaded onto a mesh with a "pp" dimension.
        """
        from .pipeline_stage import Stage

        return Stage(self, skip_logits)

    # What trainers of others ask for

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Note words that trainers put on the card of a model they upload; each once."""
        known = self.model_tags or []
        new = [tags] if isinstance(tags, str) else tags
        self.model_tags = list(dict.fromkeys([*known, *new]))

    @classmethod
    def is_custom_code(cls) -> bool:
        """True: the code is not transformers' own, so PEFT and it rename no keys for it."""
        return True

    @property
    def _keys_to_ignore_on_save(self) -> list[str] | None:
        """Names that files do not hold, as they are tied: transformers' Trainer ties them after reading one."""
        return list(self.active_ties()) or None
