"""Layers that the architectures share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import AUTO, Kernels
from .peer_class import reduce_by_type, seen_layer, set_class


class Linear(nn.Linear):
    """A linear layer that leaves its initialisation to the model it is part of."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        # What nn.Linear does, without its checks by name: a model has hundreds, and building one is most of loading it.
        nn.Module.__init__(self)
        self.__dict__.update(in_features=in_features, out_features=out_features)
        self._parameters["weight"] = nn.Parameter(torch.empty(out_features, in_features))
        self._parameters["bias"] = nn.Parameter(torch.empty(out_features)) if bias else None

    def reset_parameters(self) -> None:
        """Nothing: `CausalLM` initialises or loads every parameter, values drawn here would be thrown away."""


class Embedding(nn.Embedding):
    """An embedding that leaves its initialisation to the model it is part of."""

    def reset_parameters(self) -> None:
        """Nothing, for the reason given in `Linear`."""


class Conv1D(nn.Module):
    """A linear layer with its weight stored (in_features, out_features), as GPT-2's checkpoints hold it."""

    weight_is_in_out = True

    __class__ = property(seen_layer, set_class)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_by_type(self)

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf, self.nx = out_features, in_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])  # of a cut layer, a part of in_features
        rows = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return rows.view(*hidden_states.shape[:-1], rows.shape[-1])

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight; see `kernels.rms_norm`."""

    kernels: Kernels = AUTO

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        """(..., hidden_size) → the same; with a residual, as `after_add`."""
        weight, eps = self.weight, self.variance_epsilon
        if residual is not None:
            return kernels.add_rms_norm(hidden_states, residual, weight, eps, kernels=self.kernels)
        return kernels.rms_norm(hidden_states, weight, eps, kernels=self.kernels)

    def after_add(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of hidden_states + residual, hidden_states + residual), both (..., hidden_size), in one pass."""
        return self(hidden_states, residual)  # a call of the module, for what hangs on its calls

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over the last axis, by the model's kernels; see `kernels.layer_norm`."""

    kernels: Kernels = AUTO

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        """(..., hidden_size) → the same; with a residual, as `after_add`."""
        weight, bias, eps = self.weight, self.bias, self.eps
        if residual is not None:
            return kernels.add_layer_norm(hidden_states, residual, weight, bias, eps, kernels=self.kernels)
        return kernels.layer_norm(hidden_states, weight, bias, eps, kernels=self.kernels)

    def after_add(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of hidden_states + residual, hidden_states + residual), both (..., hidden_size), in one pass."""
        return self(hidden_states, residual)  # as in `RMSNorm`


def padding_index(config: Any) -> int | None:
    """The row of the embedding that gets no gradient: pad_token_id, where it is a row at all (some files say -1)."""
    pad = config.pad_token_id
    return pad if pad is not None and 0 <= pad < config.vocab_size else None
