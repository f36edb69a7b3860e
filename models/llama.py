"""Llama: pre-norm decoder with rotary positions, grouped-query attention and a gated MLP.

Notable: RMSNorm casts back before its weight multiplies (as the checkpoints were trained); rope tables are computed
once per forward from fp32 frequencies and shared by all layers; ``head_dim`` may differ from hidden_size / heads.
Source: Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .. import kernels
from ..errors import ConfigError
from ..kernels import AUTO, AttentionMask, Kernels
from .causal_lm import CausalLM
from .configuration import PreTrainedConfig
from .decoder import Decoder
from .fields import ranged
from .layers import Embedding, Linear, RMSNorm, padding_index
from .rope import RotaryEmbedding, check_rope_parameters, replace_rope, standard_rope_parameters

_OLD_ROPE = ("rope_theta", "rope_scaling")


class LlamaConfig(PreTrainedConfig):
    """Sizes and options of a Llama; the defaults are Llama 2 7B's."""

    model_type: ClassVar[str] = "llama"

    vocab_size: int = ranged(32000, minimum=1, maximum=1 << 31)
    hidden_size: int = ranged(4096, minimum=1, maximum=1 << 20)
    intermediate_size: int = ranged(11008, minimum=1, maximum=1 << 22)
    num_hidden_layers: int = ranged(32, minimum=1, maximum=1 << 14)
    num_attention_heads: int = ranged(32, minimum=1, maximum=1 << 14)
    num_key_value_heads: int | None = ranged(None, minimum=1)
    head_dim: int | None = ranged(None, minimum=1, maximum=1 << 14)
    hidden_act: str = ranged("silu", choices=tuple(kernels.activation_names()))
    max_position_embeddings: int = ranged(2048, minimum=1, maximum=1 << 60)
    initializer_range: float = ranged(0.02, minimum=0, maximum=1)
    rms_norm_eps: float = ranged(1e-6, minimum=0, maximum=1)
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = ranged(0.0, minimum=0, maximum=1)
    mlp_bias: bool = False

    @classmethod
    def _current_spelling(cls, values: Any) -> dict[str, Any]:
        return standard_rope_parameters(super()._current_spelling(values))

    @classmethod
    def has_field(cls, name: str) -> bool:
        """As `PreTrainedConfig.has_field`; the older rope_theta and rope_scaling count."""
        return name in _OLD_ROPE or super().has_field(name)

    @classmethod
    def _override(cls, values: Any, changes: Any) -> dict[str, Any]:
        old = {name: changes[name] for name in _OLD_ROPE if name in changes}
        rest = {name: value for name, value in changes.items() if name not in old}
        if old and "rope_parameters" not in rest:
            rest["rope_parameters"] = replace_rope(values.get("rope_parameters"), **old)
        return super()._override(values, rest)

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size={self.hidden_size} is not a multiple of "
                    f"num_attention_heads={self.num_attention_heads}; set head_dim if that is meant"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.rope_parameters = dict(self.rope_parameters or {})
        check_rope_parameters(self.rope_parameters, self.head_dim, self.max_position_embeddings)

    def validate(self) -> None:
        """Raise ConfigError if the query heads cannot be shared out over the key heads."""
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    def _change_rope(self, **old: Any) -> None:
        parameters = replace_rope(self.rope_parameters, **old)
        assert self.head_dim is not None
        check_rope_parameters(parameters, self.head_dim, self.max_position_embeddings)
        self.rope_parameters = parameters

    @property
    def rope_theta(self) -> float:
        """The base of the rotary frequencies, as older configurations spell it."""
        return (self.rope_parameters or {})["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self._change_rope(rope_theta=value)

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """``rope_parameters`` under its older name; None for the default type."""
        parameters = self.rope_parameters or {}
        return None if parameters["rope_type"] == "default" else parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self._change_rope(rope_scaling=value)


class LlamaAttention(nn.Module):
    """Causal self-attention in which groups of query heads share a key and value head."""

    kernels: Kernels = AUTO

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.dropout = config.attention_dropout
        bias = getattr(config, "attention_bias", False)
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: AttentionMask,
        cache: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (batch, seq, hidden_size) → the same, and the weights if asked for."""
        batch, seq, _ = hidden_states.shape
        by_head = (batch, seq, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(by_head).transpose(1, 2)
        key = self.k_proj(hidden_states).view(by_head).transpose(1, 2)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        query, key = kernels.apply_rotary(query, key, *rotary, kernels=self.kernels)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, weights = kernels.attention(
            self.config._attn_implementation,
            query,
            key,
            value,
            mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            output_attentions=output_attentions,
        )
        return self.o_proj(output.transpose(1, 2).reshape(batch, seq, -1)), weights


class LlamaMLP(nn.Module):
    """Gated MLP: down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    kernels: Kernels = AUTO

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.act_fn = config.hidden_act

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, seq, hidden_size) → the same."""
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(kernels.gated(self.act_fn, gate, up, kernels=self.kernels))


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    attention_class: ClassVar[type[nn.Module]] = LlamaAttention

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: AttentionMask,
        cache: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (batch, seq, hidden_size) → the same, and the attention weights if asked for."""
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), rotary, mask, cache, output_attentions)
        normed, hidden_states = self.post_attention_layernorm.after_add(attended, hidden_states)
        return hidden_states + self.mlp(normed), weights


class LlamaModel(Decoder):
    """Token embedding, decoder layers, final norm."""

    layer_class: ClassVar[type[nn.Module]] = LlamaDecoderLayer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, padding_idx=padding_index(config))
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope_parameters, config.head_dim, config.max_position_embeddings)

    def embed(
        self, inputs_embeds: Tensor, position_ids: Tensor, length: int | Tensor | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The first hidden states, and what every layer gets beside them: the rotary tables."""
        return inputs_embeds, (self.rotary_emb(position_ids, length, inputs_embeds.dtype),)


class LlamaForCausalLM(CausalLM):
    """Llama with a language-modelling head."""

    config_class: ClassVar[type[PreTrainedConfig]] = LlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["LlamaDecoderLayer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {
        "model.embed_tokens": "embedding_rowwise",
        "model.layers.*.self_attn": "shared_input",
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.[kv]_proj": "colwise_key_heads",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp": "shared_input",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "lm_head": "colwise_gather_output",
    }
    model_class: ClassVar[type[LlamaModel]] = LlamaModel

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
