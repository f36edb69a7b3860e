"""GPT-2: pre-norm decoder with learned positions, biased projections and a GELU MLP.

Notable: projections are Conv1D, weights stored (in, out), and query, key and value come from one of them; softmax is in
the compute dtype unless ``reorder_and_upcast_attn`` (eager only, as the checkpoints that set it were trained); the
head is tied to the token embedding. Hub files hold the keys without ``transformer.`` and old mask buffers, ignored.
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import kernels
from ..errors import ArgumentError, ConfigError
from .causal_lm import CausalLM
from .configuration import PreTrainedConfig
from .decoder import Decoder
from .fields import ranged
from .layers import Conv1D, Embedding, LayerNorm, Linear
from .outputs import CausalLMOutputWithPast
from .parallel_plan import Style


class GPT2Config(PreTrainedConfig):
    """Sizes and options of a GPT-2; the defaults are the 124M model's."""

    model_type: ClassVar[str] = "gpt2"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = ranged(50257, minimum=1, maximum=1 << 31)
    n_positions: int = ranged(1024, minimum=1, maximum=1 << 24)
    n_embd: int = ranged(768, minimum=1, maximum=1 << 20)
    n_layer: int = ranged(12, minimum=1, maximum=1 << 14)
    n_head: int = ranged(12, minimum=1, maximum=1 << 14)
    n_inner: int | None = ranged(None, minimum=1, maximum=1 << 22)
    activation_function: str = ranged("gelu_new", choices=tuple(kernels.activation_names()))
    resid_pdrop: float = ranged(0.1, minimum=0, maximum=1)
    embd_pdrop: float = ranged(0.1, minimum=0, maximum=1)
    attn_pdrop: float = ranged(0.1, minimum=0, maximum=1)
    layer_norm_epsilon: float = ranged(1e-5, minimum=0, maximum=1)
    initializer_range: float = ranged(0.02, minimum=0, maximum=1)
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    tie_word_embeddings: bool = True

    def validate(self) -> None:
        """Raise ConfigError if the width cannot be shared out over the heads, or for cross-attention."""
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.add_cross_attention:
            raise ConfigError("add_cross_attention=true makes GPT-2 half of an encoder-decoder; it is not supported")

    @property
    def num_key_value_heads(self) -> int:
        """As many as query heads."""
        return self.n_head

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head


class GPT2Attention(nn.Module):
    """Causal self-attention with one projection for query, key and value."""

    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.score_precision = "scores" if config.reorder_and_upcast_attn else "input"
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states: Tensor, mask: kernels.AttentionMask, cache: Any = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (batch, seq, n_embd) → the same, and the weights if asked for."""
        batch, seq, _ = hidden_states.shape
        by_head = self.c_attn(hidden_states).view(batch, seq, 3, -1, self.head_dim)
        query, key, value = by_head.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, weights = kernels.attention(
            self.config._attn_implementation,
            query,
            key,
            value,
            mask,
            scaling=self.scaling,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            score_precision=self.score_precision,
            output_attentions=output_attentions,
        )
        output = self.c_proj(output.transpose(1, 2).reshape(batch, seq, -1))
        return self.resid_dropout(output), weights


class GPT2MLP(nn.Module):
    """Two biased projections with an activation between."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.act = kernels.activation(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, seq, n_embd) → the same."""
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(
        self, hidden_states: Tensor, mask: kernels.AttentionMask, cache: Any = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (batch, seq, n_embd) → the same, and the attention weights if asked for."""
        attended, weights = self.attn(self.ln_1(hidden_states), mask, cache, output_attentions)
        normed, hidden_states = self.ln_2.after_add(attended, hidden_states)
        return hidden_states + self.mlp(normed), weights


class GPT2Model(Decoder):
    """Token and position embeddings, blocks, final norm."""

    embedding_name, layers_name, norm_name = "wte", "h", "ln_f"

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def check_length(self, length: int) -> None:
        """Raise ArgumentError beyond the last learned position."""
        if length > self.config.n_positions:
            raise ArgumentError(
                f"the input can reach position {length}, GPT-2 has learned {self.config.n_positions} (n_positions); "
                "shorten the input, or the static cache of a compiled step (max_cache_len)"
            )

    def embed(
        self, inputs_embeds: Tensor, position_ids: Tensor, length: int | Tensor | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Add the learned position embeddings."""
        return self.drop(inputs_embeds + self.wpe(position_ids)), ()

    def beside(self, hidden_states: Tensor, position_ids: Tensor, length: int | Tensor | None) -> tuple[Any, ...]:
        """Nothing: positions enter with the embeddings."""
        return ()


class GPT2LMHeadModel(CausalLM):
    """GPT-2 with a language-modelling head tied to the token embedding."""

    config_class = GPT2Config
    base_model_prefix = "transformer"
    _no_split_modules = ["GPT2Block"]
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$", r"attn\.masked_bias$"]
    _tp_plan = {
        "transformer.wte": "embedding_rowwise",
        "transformer.h.*.attn": "shared_input",
        "transformer.h.*.attn.c_attn": Style("colwise", parts=3),
        "transformer.h.*.attn.c_proj": "rowwise",
        "transformer.h.*.mlp": "shared_input",
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
        "lm_head": "colwise_gather_output",
    }

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Normal with ``initializer_range``; residual projections scaled by 1 / sqrt(2 * n_layer), section 2.3."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (GPT2Attention, GPT2MLP)) and module.c_proj.weight.is_floating_point():
            nn.init.normal_(module.c_proj.weight, std=std / math.sqrt(2 * self.config.n_layer))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
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
        """As `CausalLM.forward`, in the order GPT-2's callers know; token_type_ids (batch, seq) add embeddings."""
        if token_type_ids is not None:
            if (input_ids is None) == (inputs_embeds is None):
                raise ArgumentError("pass exactly one of input_ids and inputs_embeds")
            embedding = self.get_input_embeddings()
            if inputs_embeds is None:
                inputs_embeds = embedding(input_ids)
            assert inputs_embeds is not None
            input_ids, inputs_embeds = None, inputs_embeds + embedding(token_type_ids)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            skip_logits=skip_logits,
            cache=cache,
            **loss_kwargs,
        )
