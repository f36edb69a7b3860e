"""An architecture that loadstone does not ship, added from outside: Qwen2.

Qwen2 is a Llama whose query, key and value projections have biases, and in which only the layers from
``max_window_layers`` on attend within a window, and only if ``use_sliding_window`` says so.
Source: Yang et al. 2024, arXiv:2407.10671.

    python examples/custom_architecture.py                     # make a tiny one, save it, load it by its name
    python examples/custom_architecture.py --name Qwen/Qwen2.5-0.5B --prompt "The capital of France is"

Importing this file registers "qwen2"; after that AutoModelForCausalLM loads any checkpoint of that type.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loadstone import AutoModelForCausalLM, CausalLM, register_causal_lm
from loadstone.kernels import AttentionMask, apply_rotary, attention
from loadstone.loading import resolve_source
from loadstone.models.decoder import Decoder
from loadstone.models.layers import Embedding, Linear, RMSNorm
from loadstone.models.llama import LlamaConfig, LlamaDecoderLayer, LlamaForCausalLM
from loadstone.models.rope import RotaryEmbedding
from loadstone.models.tokenizer import load_tokenizer


class Qwen2Config(LlamaConfig):
    """The fields of a Qwen2's config.json; types and ranges are checked when they are set."""

    model_type: ClassVar[str] = "qwen2"

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.layer_types is None:
            first = self.max_window_layers if self.sliding_window is not None else self.num_hidden_layers
            self.layer_types = [
                "sliding_attention" if index >= first else "full_attention" for index in range(self.num_hidden_layers)
            ]


class Qwen2Attention(nn.Module):
    """Causal self-attention with grouped keys, biases going in and none coming out."""

    def __init__(self, config: Qwen2Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(width, heads * self.head_dim, bias=True)
        self.k_proj = Linear(width, kv_heads * self.head_dim, bias=True)
        self.v_proj = Linear(width, kv_heads * self.head_dim, bias=True)
        self.o_proj = Linear(heads * self.head_dim, width, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, cache: Any, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, seq, hidden_size) → the same, and the attention weights if asked for."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out, weights = attention(
            self.config._attn_implementation,
            q,
            k,
            v,
            mask,
            scaling=self.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            output_attentions=output_attentions,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights


class Qwen2Layer(LlamaDecoderLayer):
    """Attention and MLP, each behind a norm and beside a residual."""

    attention_class = Qwen2Attention


class Qwen2Model(Decoder):
    """Token embedding, decoder layers, final norm."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen2Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope_parameters, config.head_dim, config.max_position_embeddings)

    def embed(
        self, inputs_embeds: Tensor, position_ids: Tensor, length: int | Tensor | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The first hidden states, and what every layer gets beside them: the rotary tables."""
        return inputs_embeds, (self.rotary_emb(position_ids, length, inputs_embeds.dtype),)


@register_causal_lm("qwen2")
class Qwen2ForCausalLM(CausalLM):
    """Qwen2 with a language-modelling head."""

    config_class = Qwen2Config
    _no_split_modules = ["Qwen2Layer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = LlamaForCausalLM._tp_plan  # the same modules under the same names

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def main(argv: list[str] | None = None) -> None:
    """Load a Qwen2 by its name, or make a tiny one and do the same with that."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", help="directory or Hub repository id of a Qwen2")
    parser.add_argument("--prompt", default="The capital of France is")
    args = parser.parse_args(argv)
    if args.name:
        model = AutoModelForCausalLM.from_pretrained(args.name)
        tokenizer = load_tokenizer(resolve_source(args.name))
        print(model.load_report)
        tokens = model.generate(torch.tensor([tokenizer.encode(args.prompt)]), max_new_tokens=40)
        print(tokenizer.decode(tokens[0].tolist()))
        return
    config = Qwen2Config(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
        print(model.load_report)
        print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, eos_token_id=None))


if __name__ == "__main__":
    main()
