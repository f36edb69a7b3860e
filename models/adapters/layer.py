"""`LoraLinear`: a linear layer, plain or packed, with low-rank matrices beside its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, OffloadError
from ...loading.placement import ON_DISK, RUNS_ON
from ...quant.packed import PackedLinear, holds_in_out
from ...quant.wrappers import Codes, decoded
from .config import LoraConfig


class LoraLinear(nn.Module):
    """``base_layer(x) + scaling * B(A(dropout(x)))``: (..., in_features) → (..., out_features), in the base's dtype.

    ``lora_A[name].weight``: (r, in_features); ``lora_B[name].weight``: (out_features, r); in fp32 (fp64 over fp64), in
    which their product is computed. At most one adapter is active. Names are PEFT's.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.active: str | None = None
        self.merged: str | None = None
        self._codes: Codes | None = None
        self.training = base_layer.training

    @property
    def in_out(self) -> bool:
        """Whether the base stores its weight (in_features, out_features), or did before it was packed."""
        return holds_in_out(self.base_layer) or bool(getattr(self.base_layer, "transposed", False))

    def add(self, name: str, config: LoraConfig) -> None:
        """Put a new adapter's matrices beside the others, on the base's device, initialised as the config says."""
        device, dtype = _home(self.base_layer)
        down = nn.Linear(self.in_features, config.r, bias=False, device=device, dtype=dtype)
        up = nn.Linear(config.r, self.out_features, bias=False, device=device, dtype=dtype)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(down.weight, std=1 / config.r)
        if config.init_lora_weights is not False:
            nn.init.zeros_(up.weight)
        self.lora_A[name], self.lora_B[name] = down, up
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout.train(self.training)
        self.scaling[name] = config.scaling

    def remove(self, name: str) -> None:
        """Take an adapter out."""
        if name in self.scaling:
            del self.lora_A[name], self.lora_B[name], self.lora_dropout[name], self.scaling[name]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        out: Tensor = self.base_layer(hidden_states)
        name = self.active
        if name is None or self.merged is not None or name not in self.scaling:
            return out
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        x = self.lora_dropout[name](hidden_states.to(down.weight.device, down.weight.dtype))
        return (out + (up(down(x)) * self.scaling[name]).to(out.device)).to(out.dtype)

    def delta(self, name: str) -> Tensor:
        """scaling · B · A, (out_features, in_features), in the adapter's dtype."""
        up: Any = self.lora_B[name].weight
        down: Any = self.lora_A[name].weight
        product: Tensor = up.detach() @ down.detach()
        return product * self.scaling[name]

    @torch.no_grad()
    def merge(self) -> None:
        """Add the active adapter's product to the weight; a packed weight is decoded, added to, and encoded again."""
        if self.active is None or self.active not in self.scaling or self.merged is not None:
            return
        base: Any = self.base_layer
        if any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers())):
            raise ArgumentError("weights that are offloaded cannot be merged into; load them onto a device first")
        if vars(base).get(ON_DISK):
            raise OffloadError(
                "weights that stay on disk are not written to, so no adapter is merged into them; load the model with "
                "device_map='cpu', or run with the adapter beside them"
            )
        delta = self.delta(self.active).to(base.weight.device)
        if isinstance(base, PackedLinear):
            codes = Codes(base)
            with decoded(base) as matrix:
                matrix.add_(delta)
            self._codes = codes
        else:
            base.weight += delta.t() if self.in_out else delta
        self.merged = self.active

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`: bit for bit for a packed weight, whose codes were kept; within rounding for a plain one."""
        if self.merged is None:
            return
        base: Any = self.base_layer
        if isinstance(base, PackedLinear) and self._codes is not None:
            self._codes.restore(base)
        else:
            delta = self.delta(self.merged).to(base.weight.device)
            base.weight -= delta.t() if self.in_out else delta
        self.merged = self._codes = None

    def extra_repr(self) -> str:
        return f"active={self.active!r}, merged={self.merged is not None}"


def is_adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear layer that an adapter can stand beside."""
    return isinstance(module, (nn.Linear, LoraLinear)) or holds_in_out(module)


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer."""
    if holds_in_out(layer):
        rows, columns = layer.weight.shape  # type: ignore[misc]
        return int(rows), int(columns)
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def _home(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where an adapter of this layer lives, and its dtype."""
    tensor = next((t for t in (*layer.parameters(), *layer.buffers())), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    executes_on = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    if RUNS_ON in vars(layer):
        device = vars(layer)[RUNS_ON]  # offloaded: the weights are brought there for the forward
    elif device.type == "meta" and executes_on is not None:
        device = torch.device(executes_on)  # the same, by accelerate
    double = tensor is not None and tensor.dtype == torch.float64
    return device, torch.float64 if double else torch.float32
