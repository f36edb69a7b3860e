"""Cache layers that grow: appending a token never copies what is held.

A layer keeps its keys and values in buffers of shape (batch, kv_heads, capacity, head_dim), of which
``[start, end)`` is held. Appending writes behind ``end`` in place; when the room is used up the buffers grow by
a constant factor, or, with a sliding window, the window moves back to the front. Either way a token is copied a
constant number of times over any number of steps. Two exceptions: the first tokens are kept as they came, so a
forward that only fills a cache copies nothing, and while autograd records, tensors are joined instead of written
in place, for autograd may need the old ones.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import GenerationError
from .key_view import KeyView

_MIN_HEADROOM = 256

Buffers = tuple[Tensor, Tensor]


class Layer(Protocol):
    """What a cache asks of one layer."""

    is_sliding: bool

    @property
    def keys(self) -> Tensor | None: ...
    @property
    def values(self) -> Tensor | None: ...
    def update(self, key: Tensor, value: Tensor) -> Buffers: ...
    def get_seq_length(self) -> int: ...
    def known_length(self) -> int | None: ...
    def next_position(self) -> int | Tensor: ...
    def get_max_length(self) -> int: ...
    def key_view(self, query_length: int) -> KeyView: ...
    def can_crop(self, count: int) -> bool: ...
    def crop(self, count: int) -> None: ...
    def select(self, rows: Tensor, spare: Buffers | None = None) -> Buffers | None: ...
    def reset(self) -> None: ...


def _may_write(inference: bool) -> bool:
    """Whether buffers made in inference mode, or not, can be written to now."""
    return not inference or _inference_mode()


def _inference_mode() -> bool:
    # Compilers cannot trace the question; a compiled step runs in one mode anyway.
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _select(source: Tensor, rows: Tensor, length: int, target: Tensor) -> None:
    """Fill ``target[:, :, :length]`` with the given batch rows of ``source``."""
    torch.index_select(source, 0, rows, out=target.narrow(2, 0, length))


class DynamicLayer:
    """The cache of one attention layer; grows, or keeps the last ``window - 1`` tokens when a window is given.

    ``keys`` and ``values`` are views (batch, kv_heads, held, head_dim), valid until the next call that changes the
    layer. ``expected_length`` (tokens in all) keeps growth from overshooting when the final length is known.
    """

    def __init__(self, window: int | None = None, expected_length: int | None = None) -> None:
        if window is not None and window < 1:
            raise GenerationError(f"a sliding window holds at least 1 token, got {window}")
        self.window = window
        self.is_sliding = window is not None
        self.expected_length = expected_length
        self.reset()

    def reset(self) -> None:
        """Forget everything, buffers included."""
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._start = self._end = self._seen = 0
        self._owned = False  # whether the buffers are ours to write to
        self._inference = False  # whether they were made in inference mode (a flag, as compilers cannot ask a tensor)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seen={self._seen}, held={self._end - self._start}, window={self.window})"

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys.narrow(2, self._start, self._end - self._start)

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values.narrow(2, self._start, self._end - self._start)

    def get_seq_length(self) -> int:
        return self._seen

    def known_length(self) -> int:
        return self._seen

    def next_position(self) -> int:
        return self._seen

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def key_view(self, query_length: int) -> KeyView:
        """What attention will see with ``query_length`` more tokens."""
        held = self._end - self._start
        return KeyView(held + query_length, self._seen - held, query_start=held, past=self._seen)

    def _kept(self, total: int) -> int:
        return total if self.window is None else min(total, self.window - 1)

    def _capacity(self, need: int) -> int:
        """How much room to allocate for ``need`` tokens."""
        room = need + max(_MIN_HEADROOM, need // 4)
        if self.expected_length is not None and need <= self.expected_length:
            room = min(room, self.expected_length)
        if self.window is None:
            return room
        # Twice the window, so that it moves back to the front only once every `window` tokens.
        full = 2 * self.window
        if self.expected_length is not None and need <= self.expected_length:
            full = min(full, self.expected_length)
        return max(need, full if need >= self.window else min(room, full))

    def update(self, key: Tensor, value: Tensor) -> Buffers:
        """Append (batch, kv_heads, q, head_dim); returns the keys and values that these q queries may see."""
        count = key.shape[2]
        held = self._end - self._start
        self._seen += count
        if torch.is_grad_enabled() or (held == 0 and self._keep_first(count)):
            return self._hold(key, value, held)
        if self.window is not None and count > self.window:
            return self._refill(key, value, held)
        self._make_room(key, value, held, count)
        assert self._keys is not None
        assert self._values is not None
        self._keys.narrow(2, self._end, count).copy_(key)
        self._values.narrow(2, self._end, count).copy_(value)
        begin = self._start
        self._end += count
        self._start = self._end - self._kept(held + count)
        total = held + count
        return self._keys.narrow(2, begin, total), self._values.narrow(2, begin, total)

    def _keep_first(self, count: int) -> bool:
        # A prompt much longer than the window would stay in memory whole.
        return self.window is None or count <= 2 * self.window

    def _hold(self, key: Tensor, value: Tensor, held: int) -> Buffers:
        """Keep the tensors as they are, joined with what is held."""
        if held:
            key = torch.cat((self.keys, key), dim=2)  # type: ignore[arg-type]
            value = torch.cat((self.values, value), dim=2)  # type: ignore[arg-type]
        self._keys, self._values, self._owned = key, value, False
        self._end = key.shape[2]
        self._start = self._end - self._kept(self._end)
        return key, value

    def _refill(self, key: Tensor, value: Tensor, held: int) -> Buffers:
        """More new tokens than the window holds: all are seen now, the last ``window - 1`` are kept."""
        if held:
            key = torch.cat((self.keys, key), dim=2)  # type: ignore[arg-type]
            value = torch.cat((self.values, value), dim=2)  # type: ignore[arg-type]
        kept = self._kept(key.shape[2])
        writable = self._owned and _may_write(self._inference)
        if not (writable and self._keys is not None and self._keys.shape[2] > kept):
            self._allocate(key, value, kept + 1)
        assert self._keys is not None
        assert self._values is not None
        self._keys.narrow(2, 0, kept).copy_(key.narrow(2, key.shape[2] - kept, kept))
        self._values.narrow(2, 0, kept).copy_(value.narrow(2, value.shape[2] - kept, kept))
        self._start, self._end = 0, kept
        return key, value

    def _allocate(self, key: Tensor, value: Tensor, need: int) -> None:
        room = self._capacity(need)
        self._keys = key.new_empty((*key.shape[:2], room, key.shape[3]))
        self._values = value.new_empty((*value.shape[:2], room, value.shape[3]))
        self._owned, self._inference = True, _inference_mode()

    def _make_room(self, key: Tensor, value: Tensor, held: int, count: int) -> None:
        """Buffers of our own with ``count`` free places behind ``_end``."""
        keys, values = self._keys, self._values
        if keys is not None and values is not None and self._owned and _may_write(self._inference):
            if self._end + count <= keys.shape[2]:
                return
            if self._start >= held and held + count <= keys.shape[2] and self._capacity(held + count) <= keys.shape[2]:
                keys.narrow(2, 0, held).copy_(keys.narrow(2, self._start, held))
                values.narrow(2, 0, held).copy_(values.narrow(2, self._start, held))
                self._start, self._end = 0, held
                return
        self._allocate(key, value, held + count)
        if held and keys is not None and values is not None:
            assert self._keys is not None
            assert self._values is not None
            self._keys.narrow(2, 0, held).copy_(keys.narrow(2, self._start, held))
            self._values.narrow(2, 0, held).copy_(values.narrow(2, self._start, held))
        self._start, self._end = 0, held

    def can_crop(self, count: int) -> bool:
        """Whether the last ``count`` tokens can be taken back: a window may have dropped what it would need again."""
        # Everything in [0, end) of the buffers is still there, also what lies before the window.
        return self._end - count >= self._kept(self._seen - count)

    def crop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        self._seen -= count
        self._end -= count
        self._start = self._end - self._kept(self._seen)

    def select(self, rows: Tensor, spare: Buffers | None = None) -> Buffers | None:
        """Make the batch ``rows`` (1-D indices) of the old one; writes to ``spare`` if it fits, returns old buffers."""
        if self._keys is None or self._values is None:
            return spare
        rows = rows.to(self._keys.device)
        keys, values, held, owned = self._keys, self._values, self._end - self._start, self._owned
        if torch.is_grad_enabled():
            self._keys, self._values, self._owned = keys.index_select(0, rows), values.index_select(0, rows), False
            return spare
        shape = (rows.shape[0], keys.shape[1], self._capacity(held + 1))
        like = keys.new_empty((*shape[:2], 0, keys.shape[3])), values.new_empty((*shape[:2], 0, values.shape[3]))
        if spare is not None and _fits(spare, like, held):
            self._keys, self._values = spare
            self._inference = spare[0].is_inference()
        else:
            self._allocate(*like, held + 1)
        _select(keys.narrow(2, self._start, held), rows, held, self._keys)
        _select(values.narrow(2, self._start, held), rows, held, self._values)
        self._start, self._end, self._owned = 0, held, True
        return (keys, values) if owned else spare


def _fits(spare: Buffers, like: Buffers, held: int) -> bool:
    return all(
        s.shape[:2] == n.shape[:2]
        and s.shape[3] == n.shape[3]
        and s.shape[2] > held
        and (s.dtype, s.device) == (n.dtype, n.device)
        and _may_write(s.is_inference())
        for s, n in zip(spare, like, strict=True)
    )
