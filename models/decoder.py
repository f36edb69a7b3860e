"""The walk that decoders share: inputs to embeddings, mask and cache once, then the layers, then the final norm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import ArgumentError, AttentionError
from .cache import DynamicCache, layer_windows
from .masks import build_mask
from .outputs import BaseModelOutputWithPast
from .packing import given_segments, positions_in
from .recompute import Recomputation


class Decoder(nn.Module):
    """Base of decoder stacks. A subclass builds the modules named below and says in `embed` how positions enter.

    ``embedding_name``, ``layers_name``, ``norm_name``: the attributes that hold the token embedding, the ModuleList of
    layers and the final norm. A layer is called as ``layer(hidden_states, *beside, mask, cache, output_attentions)``
    and returns (hidden_states, attention weights or None).
    """

    embedding_name: ClassVar[str] = "embed_tokens"
    layers_name: ClassVar[str] = "layers"
    norm_name: ClassVar[str] = "norm"

    config: Any
    checkpointing: Recomputation | None = None
    """Which layers are computed again in the backward pass of a training, None for none."""

    def embed(
        self, inputs_embeds: Tensor, position_ids: Tensor, length: int | Tensor | None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """From token embeddings (batch, seq, hidden_size) and positions (batch or 1, seq) to the first hidden states
        and what every layer gets beside them. length: tokens seen including these, () int64 where only the device
        knows (compiled or captured steps of a static cache), None if the caller chose positions.
        """
        return inputs_embeds, ()

    def beside(self, hidden_states: Tensor, position_ids: Tensor, length: int | Tensor | None) -> tuple[Any, ...]:
        """What every layer gets beside the hidden states: the second thing that `embed` returns, which a pipeline's
        later stages need without the first. An architecture whose `embed` has weights says it here."""
        return type(self).embed(self, hidden_states, position_ids, length)[1]

    def check_length(self, length: int) -> None:
        """Raise if the model cannot take texts of ``length`` tokens; where only the device knows, it is called with
        what the cache has room for. Not called if the caller chose positions."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return getattr(self, self.embedding_name)

    def set_input_embeddings(self, module: nn.Module) -> None:
        """Replace the token embedding."""
        setattr(self, self.embedding_name, module)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **packing: Any,
    ) -> BaseModelOutputWithPast:
        """See `CausalLM.forward`; returns the final hidden states (batch, seq, hidden_size).

        return_dict: False for the tuple of the fields that are set. packing: what collators of packed sequences pass
        (`packing.PACKING`).
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        recompute = self.checkpointing if self.training else None
        if output_attentions and not kernels.returns_weights(config._attn_implementation):
            raise AttentionError(
                f"output_attentions=True needs an implementation that holds the weights, not "
                f"{config._attn_implementation!r}; call model.set_attn_implementation('eager')"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        cache = past_key_values
        if recompute is not None:
            cache = None  # a recomputed forward would append its keys twice
        elif cache is None and use_cache:
            cache = DynamicCache(config)

        batch, seq, _ = inputs_embeds.shape
        segments = given_segments(packing, batch, seq, inputs_embeds.device) if packing else None
        windows = layer_windows(config)
        masks = {
            window: build_mask(
                inputs_embeds,
                attention_mask,
                position_ids,
                cache,
                segments=segments,
                window=window,
                layer_idx=windows.index(window),
            )
            for window in dict.fromkeys(windows)
        }
        length: int | Tensor | None = None
        if position_ids is None and segments is not None:
            position_ids = positions_in(segments)
        elif position_ids is None:
            position_ids, length = self._positions(inputs_embeds, cache)
        hidden_states, beside = self.embed(inputs_embeds, position_ids, length)

        all_hidden_states, all_attentions = [], []
        for index, (layer, window) in enumerate(zip(getattr(self, self.layers_name), windows, strict=True)):
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            arguments = (hidden_states, *beside, masks[window], cache, output_attentions)
            hidden_states, weights = layer(*arguments) if recompute is None else recompute.run(index, layer, *arguments)
            if output_attentions:
                all_attentions.append(weights)
        hidden_states = getattr(self, self.norm_name)(hidden_states)
        if output_hidden_states:
            all_hidden_states.append(hidden_states)
        result = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return result.to_tuple() if return_dict is False else result  # type: ignore[return-value]

    def _positions(self, inputs_embeds: Tensor, cache: Any) -> tuple[Tensor, int | Tensor]:
        """(1, seq) positions of tokens after what the cache has seen, and the `embed` length."""
        count, device = inputs_embeds.shape[1], inputs_embeds.device
        known = cache.known_length() if cache is not None else 0
        start = cache.next_position() if cache is not None else 0
        self.check_length(cache.get_max_length(0) if known is None else known + count)
        if isinstance(start, int):
            return torch.arange(start, start + count, device=device)[None], start + count
        start = start.to(device)
        positions = (torch.arange(count, device=device) + start)[None]
        return positions, start + count if known is None else known + count
