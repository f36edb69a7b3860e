"""Key/value caches of whole models: growing, of fixed memory, and with sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, GenerationError
from .cache_layers import Buffers, DynamicLayer, Layer
from .key_view import KeyView
from .static_layers import StaticLayer, StaticSlidingLayer

__all__ = ["Cache", "DynamicCache", "DynamicLayer", "StaticCache", "StaticLayer", "StaticSlidingLayer"]


def one_spelling(past_key_values: Any, cache: Any) -> Any:
    """The cache a caller gave as ``past_key_values`` or by its newer name ``cache``. Raises ArgumentError for both."""
    if cache is None:
        return past_key_values
    if past_key_values is not None:
        raise ArgumentError("past_key_values and cache are the same thing; pass one of them")
    return cache


def layer_windows(config: Any) -> list[int | None]:
    """The window of each layer of a configuration, None for full attention."""
    count = int(config.num_hidden_layers)
    window = declared(config, "sliding_window")
    if declared(config, "use_sliding_window") is False:
        window = None
    types: Sequence[str] | None = declared(config, "layer_types")
    if types is None:
        return [window] * count
    return [window if kind == "sliding_attention" else None for kind in types[:count]]


def declared(config: Any, name: str) -> Any:
    """A field of a configuration if its class declares it: what a file holds beside means nothing to the model."""
    has_field = getattr(type(config), "has_field", None)
    return getattr(config, name, None) if has_field is None or has_field(name) else None


class Cache:
    """One layer of keys and values for each attention layer of a model."""

    def __init__(self, layers: Sequence[Layer] = ()) -> None:
        self.layers: list[Any] = list(layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers, {self.get_seq_length()} tokens)"

    def __len__(self) -> int:
        return len(self.layers)

    def _layer(self, layer_idx: int) -> Any:
        if layer_idx >= len(self.layers):
            raise GenerationError(f"the cache has {len(self.layers)} layers, layer {layer_idx} was asked for")
        return self.layers[layer_idx]

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> Buffers:
        """Append keys and values (batch, kv_heads, q, head_dim) to a layer; returns what its attention must see.

        The returned tensors are views, valid until the layer is updated again. Raises GenerationError when a static
        cache is full.
        """
        return self._layer(layer_idx).update(key, value)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, also those that a window has dropped. A static cache asks its device once, after steps
        that were compiled or replayed."""
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def known_length(self, layer_idx: int = 0) -> int | None:
        """As `get_seq_length`; None where only the device knows: in a static cache, compiled or in a CUDA graph."""
        return self.layers[layer_idx].known_length() if layer_idx < len(self.layers) else 0

    def next_position(self, layer_idx: int = 0) -> int | Tensor:
        """The position of the next token: of a static cache () int64 on its device, which the next update changes."""
        return self.layers[layer_idx].next_position() if layer_idx < len(self.layers) else 0

    def key_view(self, query_length: int, layer_idx: int = 0) -> KeyView:
        """What attention will see of a layer with ``query_length`` more tokens."""
        return self.layers[layer_idx].key_view(query_length) if layer_idx < len(self.layers) else KeyView(query_length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The largest number of tokens a layer (default: any layer) holds, -1 where there is no bound."""
        if layer_idx is not None:
            return self.layers[layer_idx].get_max_length() if layer_idx < len(self.layers) else -1
        return max((layer.get_max_length() for layer in self.layers), default=-1)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The largest number of tokens one layer holds, -1 where there is no bound."""
        return self.get_max_length(layer_idx)

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer, whether it keeps a window only."""
        return [layer.is_sliding for layer in self.layers]

    @property
    def batch_size(self) -> int:
        """Rows held, -1 while empty."""
        return next((layer.keys.shape[0] for layer in self.layers if layer.keys is not None), -1)

    def crop(self, length: int) -> None:
        """Take tokens back: a negative number removes that many, a positive one is the length to keep.

        Raises GenerationError, with the cache unchanged, when a sliding layer no longer holds the older keys that its
        window would reach again.
        """
        counts = []
        for index, layer in enumerate(self.layers):
            seen = layer.get_seq_length()
            count = min(-length, seen) if length <= 0 else max(seen - length, 0)
            if not layer.can_crop(count):
                raise GenerationError(
                    f"cannot take back {count} of {seen} tokens: layer {index} has a sliding window and no longer holds"
                    " the keys before it. Build the cache again from the prompt, or use a DynamicCache() without config"
                )
            counts.append(count)
        for layer, count in zip(self.layers, counts, strict=True):
            if count:
                layer.crop(count)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order: (rows,) indices, or a (batch,) bool mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        spare: Buffers | None = None
        for layer in self.layers:
            spare = layer.select(indices, spare)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the old row ``beam_idx[i]``; costs one copy of what is held and the memory of one layer."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies side by side."""
        if repeats != 1 and self.batch_size >= 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens; a static cache keeps its memory."""
        for layer in self.layers:
            layer.reset()


class DynamicCache(Cache):
    """A cache that grows with the text; layers with a sliding window keep what the window needs.

    Without ``config`` layers appear as they are used, and none has a window.
    """

    def __init__(self, config: Any = None, *, expected_length: int | None = None) -> None:
        windows = [] if config is None else layer_windows(config)
        self.expected_length = expected_length
        super().__init__([DynamicLayer(window, expected_length) for window in windows])

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> Buffers:
        while layer_idx >= len(self.layers):
            self.layers.append(DynamicLayer(None, self.expected_length))
        return self.layers[layer_idx].update(key, value)


class StaticCache(Cache):
    """A cache of fixed memory for at most ``max_cache_len`` tokens; fuller raises GenerationError.

    Layers with a shorter window hold the window only. With ``batch_size`` the memory is allocated now (on ``device``,
    in ``dtype``), otherwise at the first update.

    How far it is lies on the device, so a compiled forward or one captured in a CUDA graph is right at every length:
    feed the prompt eagerly, then step as you like, also eagerly in between. A captured step needs memory allocated
    before, a compiled one under ``mode="reduce-overhead"`` too. There the host does not see the length: an overfull
    cache is not reported (full-attention layers fail on the device: IndexError on the CPU, an assertion on CUDA), nor
    is an attention_mask that has not one entry for each token; one of max_cache_len entries spares recompilations.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        *,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.max_cache_len = max_cache_len
        layers = [_static_layer(max_cache_len, window) for window in layer_windows(config)]
        super().__init__(layers)
        self._heads, self._width = _heads_and_width(config)
        if batch_size is not None:
            if not self._heads or not self._width:
                raise GenerationError(
                    f"{type(config).__name__} does not say how many heads of which width there are; leave out "
                    "batch_size, so that the memory is taken when keys come"
                )
            like = torch.empty((batch_size, self._heads, 0, self._width), device=device, dtype=dtype)
            for layer in layers:
                layer.allocate(like, like)

    def memory_needed(self, batch_size: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values that so many rows take, taken yet or not; 0 for a configuration without heads."""
        places = sum(layer.places for layer in self.layers)
        return 2 * batch_size * self._heads * self._width * places * dtype.itemsize


def _heads_and_width(config: Any) -> tuple[int, int]:
    """Key/value heads and the width of one; 0 for what a configuration does not say."""
    queries = getattr(config, "num_attention_heads", None) or 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None)
    return heads, width or (getattr(config, "hidden_size", None) or 0) // max(queries, 1)


def _static_layer(max_cache_len: int, window: int | None) -> StaticLayer:
    # A ring that saves less than an eighth of the memory is not worth that it cannot be cropped.
    if window is None or window + max_cache_len // 8 >= max_cache_len:
        return StaticLayer(max_cache_len)
    return StaticSlidingLayer(max_cache_len, window)
