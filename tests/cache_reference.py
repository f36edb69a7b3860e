"""What cache tests compare with: tensors joined with torch.cat, under random sequences of operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

HEADS, WIDTH, VALUE_WIDTH = 2, 3, 5


@dataclass
class Shape:
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = HEADS
    head_dim: int = WIDTH
    sliding_window: int | None = None
    layer_types: list[str] | None = None


def tokens(batch: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    key = torch.randn(batch, HEADS, count, WIDTH, generator=generator)
    # as a projection gives it: heads and positions transposed
    value = torch.randn(batch, count, HEADS, VALUE_WIDTH, generator=generator).transpose(1, 2)
    return key, value


class Reference:
    """Holds everything ever appended; knows what a window shows."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        before = self.length
        self.key = key if self.key is None else torch.cat((self.key, key), 2)
        self.value = value if self.value is None else torch.cat((self.value, value), 2)
        first = 0 if self.window is None else max(0, before - (self.window - 1))
        return self.key[:, :, first:], self.value[:, :, first:], first

    def crop(self, count: int) -> None:
        assert self.key is not None
        assert self.value is not None
        self.key, self.value = self.key[:, :, : self.length - count], self.value[:, :, : self.length - count]

    def select(self, rows: Tensor) -> None:
        assert self.key is not None
        assert self.value is not None
        self.key, self.value = self.key[rows], self.value[rows]


OPERATION = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 12)),
    st.tuples(st.just("update"), st.just(1)),
    st.tuples(st.just("update"), st.just(1)),
    st.tuples(st.just("crop"), st.integers(1, 4)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 7), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("mode"), st.sampled_from(["grad", "no_grad", "inference"])),
    st.tuples(st.just("copy"), st.sampled_from(["deepcopy", "pickle"])),
)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
