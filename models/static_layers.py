"""Cache layers of fixed memory: buffers keep their addresses, and the number of tokens seen is a tensor beside them.

So a compiled step or a CUDA graph made at one length is right at every other. The host keeps a mirror of the number
while it runs every step itself, which spares it from asking the device.

What the host cannot know it cannot check. Compiled steps and CUDA graphs must not exceed the room: a full layer then
fails on the device (an IndexError on the CPU, a device-side assertion on CUDA), a ring goes on, for its window is
right at any length. A layer that was part of a CUDA graph never trusts its mirror again, for replays pass the host by.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..errors import GenerationError
from .key_view import KeyView

Buffers = tuple[Tensor, Tensor]


def recording() -> bool:
    """Whether this call is being recorded, to be run again without it: by a compiler or into a CUDA graph."""
    return torch.compiler.is_compiling() or _capturing()


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class StaticLayer:
    """A layer of ``max_cache_len`` places, allocated once.

    Attention sees all places, or, while the layer is known to be empty, just the new tokens. Places not yet written
    hold zeros or old tokens: causality hides them, their positions lie ahead of every query.
    ``keys``, ``values``: (batch, kv_heads, places, head_dim). ``seen``: () int64, beside them. None until allocated.
    """

    is_sliding = False

    def __init__(self, max_cache_len: int) -> None:
        if max_cache_len < 1:
            raise GenerationError(f"a static cache needs room for at least 1 token, got max_cache_len={max_cache_len}")
        self.max_cache_len = max_cache_len
        self.places = max_cache_len
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.seen: Tensor | None = None
        self._known: int | None = 0  # the mirror of `seen`, None when only the device knows
        self._empty = True  # known to be empty; compilers guard on what they read, and the mirror changes every step
        self._captured = False  # part of a CUDA graph

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seen={self.get_seq_length()}, max_cache_len={self.max_cache_len})"

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Allocate for the batch, heads, width, dtype and device of these."""
        # Out of inference mode, for tensors that can be written to in every mode; compilers run in one mode anyway.
        inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if inference else nullcontext():
            self.seen = torch.zeros((), dtype=torch.long, device=key.device)
            self._hold(
                torch.zeros((*key.shape[:2], self.places, key.shape[3]), dtype=key.dtype, device=key.device),
                torch.zeros((*value.shape[:2], self.places, value.shape[3]), dtype=value.dtype, device=value.device),
            )

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        assert self.seen is not None
        self.keys, self.values = keys, values
        if keys.is_cuda and not torch.compiler.is_compiling():
            for tensor in (keys, values, self.seen):  # the CUDA graphs of torch.compile then use them where they are
                torch._dynamo.mark_static_address(tensor, guard=False)

    # How far it is

    def get_seq_length(self) -> int:
        """Tokens seen; asks the device, once, after steps that the host did not follow."""
        if self._known is not None:
            return self._known
        assert self.seen is not None
        known = int(self.seen)
        if not self._captured:
            self._known = known
        return known

    def known_length(self) -> int | None:
        """Tokens seen, None while recording."""
        return None if recording() else self.get_seq_length()

    def _known_empty(self) -> bool:
        if torch.compiler.is_compiling():
            return self._empty
        return not _capturing() and self.get_seq_length() == 0

    def next_position(self) -> int | Tensor:
        """The position of the next token: 0 while empty, else `seen` itself, which the next update changes."""
        return 0 if self._known_empty() else self._seen()

    def _seen(self) -> Tensor:
        if self.seen is None:
            raise GenerationError(
                "a CUDA graph needs a cache that is allocated: pass batch_size, device and dtype to StaticCache, or run"
                " the prompt through the model before capturing"
            )
        return self.seen

    def _advance(self, count: int) -> None:
        assert self.seen is not None
        self.seen.add_(count)
        self._empty = False
        if torch.compiler.is_compiling():
            self._known = None
        elif _capturing():
            self._known, self._captured = None, True
        elif self._known is not None:
            self._known += count

    def _set_back(self, length: int) -> None:
        self._known = None if self._captured else length
        self._empty = length == 0 and not self._captured

    def get_max_length(self) -> int:
        return self.max_cache_len

    # Writing and showing

    def key_view(self, query_length: int) -> KeyView:
        """What attention will see with ``query_length`` more tokens."""
        if self._known_empty():
            return KeyView(query_length, room=self.max_cache_len)
        start = self._seen().clone()  # masks are built after the layer has moved on
        return KeyView(self.places, query_start=start, past=self.known_length(), room=self.max_cache_len)

    def update(self, key: Tensor, value: Tensor) -> Buffers:
        """Append (batch, kv_heads, q, head_dim); returns the keys and values of the `key_view`.

        Raises GenerationError if they do not fit, as far as the host knows.
        """
        empty = isinstance(self.next_position(), int)
        self._prepare(key, value)
        if empty:
            self._write(key, value, 0)
            shown = key, value
        else:
            shown = self._append(key, value)
        self._advance(key.shape[2])
        return shown

    def _prepare(self, key: Tensor, value: Tensor) -> None:
        count, past = key.shape[2], self.known_length() or 0
        if past + count > self.max_cache_len:
            raise GenerationError(
                f"the static cache has room for {self.max_cache_len} tokens and has seen {past}; {count} more do not"
                f" fit. Build it with max_cache_len of at least {past + count}, or use a DynamicCache"
            )
        if self.keys is None or self.values is None:
            self.allocate(key, value)
        self._make_writable()
        assert self.keys is not None
        if key.dtype != self.keys.dtype or key.shape[:2] != self.keys.shape[:2] or key.shape[3] != self.keys.shape[3]:
            raise GenerationError(
                f"the static cache holds {tuple(self.keys.shape)} of {self.keys.dtype}, keys of {tuple(key.shape)} and"
                f" {key.dtype} came: build it with the model's dtype and the batch's size"
            )

    def _make_writable(self) -> None:
        """Copies of our own, if a compiled step allocated in inference mode what is now used outside of it."""
        if self.keys is None or self.values is None or self.seen is None:
            return
        if not (_writable(self.keys) and _writable(self.seen)):
            self.seen = self.seen.clone()
            self._hold(self.keys.clone(), self.values.clone())

    def _append(self, key: Tensor, value: Tensor) -> Buffers:
        self._write(key, value, self._seen())
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _write(self, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        """Write to the places ``start`` and after it."""
        assert self.keys is not None
        assert self.values is not None
        if isinstance(start, int):
            self.keys.narrow(2, start, key.shape[2]).copy_(key)
            self.values.narrow(2, start, key.shape[2]).copy_(value)
            return
        index = _following(start, key.shape[2])
        self.keys.index_copy_(2, index, key)
        self.values.index_copy_(2, index, value)

    # Taking back, choosing rows

    def can_crop(self, count: int) -> bool:
        """Whether the last ``count`` tokens can be taken back."""
        return True

    def crop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        length = self.get_seq_length() - count
        if self.seen is not None:
            self._make_writable()
            self.seen.sub_(count)
        self._set_back(length)

    def reset(self) -> None:
        """Forget the tokens, keep the memory."""
        if self.seen is not None:
            self._make_writable()
            self.seen.zero_()
        self._set_back(0)

    def select(self, rows: Tensor, spare: Buffers | None = None) -> Buffers | None:
        """Make the batch ``rows`` (1-D indices) of the old one, in place if it keeps its size."""
        if self.keys is None or self.values is None:
            return spare
        rows = rows.to(self.keys.device)
        if rows.shape[0] == self.keys.shape[0] and _writable(self.keys) and not torch.is_grad_enabled():
            self.keys.copy_(self.keys.index_select(0, rows))
            self.values.copy_(self.values.index_select(0, rows))
        else:
            self._hold(self.keys.index_select(0, rows), self.values.index_select(0, rows))
        return spare


class StaticSlidingLayer(StaticLayer):
    """A layer that keeps the last ``window`` tokens in a ring of as many places: position p is at ``p % window``.

    One new token is written over the key that left the window, and attention sees the ring as it lies, for the order of
    keys means nothing to softmax. Several see the ring in order and themselves behind it.
    """

    is_sliding = True

    def __init__(self, max_cache_len: int, window: int) -> None:
        if window < 1:
            raise GenerationError(f"a sliding window holds at least 1 token, got {window}")
        super().__init__(max_cache_len)
        self.window = self.places = window

    def key_view(self, query_length: int) -> KeyView:
        """What attention will see with ``query_length`` more tokens."""
        if self._known_empty():
            return KeyView(query_length, room=self.max_cache_len)
        past, room = self.known_length(), self.max_cache_len
        if query_length == 1:
            seen = self._seen()
            return KeyView(self.window, newest=seen, query_start=seen.clamp(max=self.window - 1), past=past, room=room)
        first = self._seen() - self.window
        return KeyView(
            self.window + query_length,
            first,
            query_start=self.window,
            key_start=(-first).clamp(min=0).view(1),
            past=past,
            room=room,
        )

    def _append(self, key: Tensor, value: Tensor) -> Buffers:
        if key.shape[2] == 1:
            return super()._append(key, value)
        assert self.keys is not None
        assert self.values is not None
        order = _following(self._seen(), self.window) % self.window
        shown = (
            torch.cat((self.keys.index_select(2, order), key), dim=2),
            torch.cat((self.values.index_select(2, order), value), dim=2),
        )
        self._write(key, value, self._seen())
        return shown

    def _write(self, key: Tensor, value: Tensor, start: int | Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        count = key.shape[2]
        kept = min(count, self.window)
        if isinstance(start, int):
            index = torch.arange(start + count - kept, start + count, device=key.device) % self.window
        else:
            index = _following(start, count)[count - kept :] % self.window
        self.keys.index_copy_(2, index, key.narrow(2, count - kept, kept))
        self.values.index_copy_(2, index, value.narrow(2, count - kept, kept))

    def can_crop(self, count: int) -> bool:
        """Whether the last ``count`` tokens can be taken back: not once they have overwritten others."""
        return count == 0 or self.get_seq_length() <= self.window


def _following(start: Tensor, count: int) -> Tensor:
    """(count,) int64: start and what follows it."""
    return start.view(1) if count == 1 else start + torch.arange(count, device=start.device)


def _writable(tensor: Tensor) -> bool:
    """Whether a tensor may be written to in this mode; compilers cannot ask and run in one mode anyway."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference()
