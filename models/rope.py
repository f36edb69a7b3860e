"""Rotary position embeddings: their parameters in a configuration, and the table of angles.

Types: default (Su et al. 2021, arXiv:2104.09864), linear (position interpolation, Chen et al. 2023,
arXiv:2306.15595), dynamic (NTK-aware with a base that follows the length), yarn (Peng et al. 2023, arXiv:2309.00071),
longrope (Ding et al. 2024, arXiv:2402.13753), llama3 (Llama 3.1's frequency bands).

Notable: frequencies are fp32 whatever the model is cast to. dynamic and longrope depend on the length of the present
input alone, never on what was seen before; a length on the device stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, nearest

_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_POSITIVE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
             "attention_factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")  # fmt: skip
_LARGEST = 1e18  # beyond it powers of these numbers overflow


def standard_rope_parameters(values: dict[str, Any], default_theta: float = 10000.0) -> dict[str, Any]:
    """Merge both spellings (rope_parameters; rope_theta + rope_scaling) into one ``rope_parameters`` entry.

    values: configuration fields by name; consumed spellings are removed. Returns the same dictionary.
    """
    present = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"} & values.keys()
    if not present:
        return values
    theta = values.pop("rope_theta", None)
    scaling = values.pop("rope_scaling", None)
    merged = values.pop("rope_parameters", None) or scaling or {}
    if not isinstance(merged, dict):
        raise ConfigError(f"rope_parameters must be a JSON object, got {merged!r}")
    merged = dict(merged)
    old_type = merged.pop("type", None)
    merged.setdefault("rope_type", old_type or "default")
    if merged["rope_type"] in ("su", "mrope"):
        merged["rope_type"] = {"su": "longrope"}.get(merged["rope_type"], merged["rope_type"])
    merged.setdefault("rope_theta", default_theta if theta is None else theta)
    if (partial := values.pop("partial_rotary_factor", None)) is not None:
        merged.setdefault("partial_rotary_factor", partial)
    values["rope_parameters"] = merged
    return values


def replace_rope(held: dict[str, Any] | None, **old: Any) -> dict[str, Any]:
    """``rope_parameters`` with the part replaced that an older name stands for: ``rope_theta=``, ``rope_scaling=``."""
    kept = dict(held or {})
    values = {"rope_theta": old.get("rope_theta", kept.get("rope_theta"))}
    values["rope_parameters"] = old.get("rope_scaling", kept)
    if "rope_theta" in old and isinstance(values["rope_parameters"], dict):
        values["rope_parameters"] = {k: v for k, v in values["rope_parameters"].items() if k != "rope_theta"}
    return standard_rope_parameters(values)["rope_parameters"]


def check_rope_parameters(parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> None:
    """Complete ``parameters`` in place and raise ConfigError for an unknown type or a missing or bad value."""
    defaults: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if parameters.get("rope_type") in ("yarn", "longrope", "llama3"):
        defaults["original_max_position_embeddings"] = max_position_embeddings
    for name, value in defaults.items():
        if parameters.get(name) is None:
            parameters[name] = value
    kind = parameters["rope_type"]
    if not isinstance(kind, str) or kind not in _NEEDS:
        hint = nearest(kind, _NEEDS) if isinstance(kind, str) else ""
        raise ConfigError(f"rope_type {kind!r} is not known{hint} known: {', '.join(_NEEDS)}")
    missing = [name for name in _NEEDS[kind] if parameters.get(name) is None]
    if kind == "yarn" and missing == ["factor"]:  # the ratio of the lengths stands in
        missing = []
    if missing:
        raise ConfigError(f"rope_type {kind!r} needs {', '.join(missing)} in rope_parameters, got {parameters}")
    for name in _POSITIVE:
        value = parameters.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST:
            raise ConfigError(f"rope_parameters[{name!r}] must be a positive number, got {value!r}")
    rotary_dim = _rotary_dim(parameters, head_dim)
    if rotary_dim % 2 or rotary_dim < 2:
        raise ConfigError(f"rotary embeddings need an even head_dim, got {rotary_dim}")
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            _check_factors(name, parameters[name], rotary_dim // 2)
        if parameters["original_max_position_embeddings"] <= 1:
            raise ConfigError("rope_parameters: longrope needs original_max_position_embeddings above 1")
    if kind == "dynamic" and rotary_dim == 2:
        raise ConfigError(
            "rope_type 'dynamic' has no meaning for head_dim=2: its one frequency does not depend on theta"
        )
    if kind == "yarn" and parameters["rope_theta"] <= 1:
        raise ConfigError(f"rope_parameters: yarn needs rope_theta above 1, got {parameters['rope_theta']}")
    if kind == "yarn" and not isinstance(parameters.get("truncate", True), bool):
        raise ConfigError(f"rope_parameters['truncate'] must be true or false, got {parameters['truncate']!r}")
    if kind == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise ConfigError("rope_parameters: high_freq_factor must be greater than low_freq_factor")


def _check_factors(name: str, values: Any, length: int) -> None:
    numbers = isinstance(values, (list, tuple)) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in values
    )
    if not numbers or len(values) != length:
        raise ConfigError(f"rope_parameters[{name!r}] must be a list of {length} positive numbers, got {values!r}")


def _rotary_dim(parameters: dict[str, Any], head_dim: int) -> int:
    factor = parameters.get("partial_rotary_factor")
    if factor not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor={factor!r} is not supported: all of head_dim is rotated")
    return head_dim


def _base_frequencies(theta: float | Tensor, dim: int, device: torch.device | None = None) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def _default(p: dict[str, Any], dim: int, longest: int, length: int | Tensor | None) -> tuple[Tensor, float]:
    return _base_frequencies(p["rope_theta"], dim), 1.0


def _linear(p: dict[str, Any], dim: int, longest: int, length: int | Tensor | None) -> tuple[Tensor, float]:
    return _base_frequencies(p["rope_theta"], dim) / p["factor"], 1.0


def _dynamic(
    p: dict[str, Any], dim: int, longest: int, length: int | Tensor | None, device: torch.device | None = None
) -> tuple[Tensor, float]:
    factor = p["factor"]
    length = length.float().clamp(min=longest) if isinstance(length, Tensor) else max(length or 0, longest)
    stretch = (factor * length / longest) - (factor - 1)
    return _base_frequencies(p["rope_theta"] * stretch ** (dim / (dim - 2)), dim, device), 1.0


def _yarn(p: dict[str, Any], dim: int, longest: int, length: int | Tensor | None) -> tuple[Tensor, float]:
    theta, original = p["rope_theta"], p["original_max_position_embeddings"]
    factor = p["factor"] if p.get("factor") is not None else longest / original

    def attention_scale(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    scaling = p.get("attention_factor")
    if scaling is None:
        mscale, mscale_all = p.get("mscale"), p.get("mscale_all_dim")
        if mscale and mscale_all:
            scaling = attention_scale(factor, mscale) / attention_scale(factor, mscale_all)
        else:
            scaling = attention_scale(factor)

    def dimension_of(rotations: float) -> float:  # the dimension that turns this often over the original length
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(p.get("beta_fast") or 32), dimension_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    keep = 1 - ramp
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, float(scaling)


def _longrope(p: dict[str, Any], dim: int, longest: int, length: int | Tensor | None) -> tuple[Tensor, float]:
    original = p["original_max_position_embeddings"]
    factor = p["factor"] if p.get("factor") is not None else longest / original
    scaling = p.get("attention_factor")
    if scaling is None:
        scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    long = length is not None and length > original  # a tensor never comes here: both tables are held
    factors = torch.tensor(p["long_factor" if long else "short_factor"], dtype=torch.float32)
    return 1.0 / (factors * p["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)), float(scaling)


def _llama3(p: dict[str, Any], dim: int, longest: int, length: int | Tensor | None) -> tuple[Tensor, float]:
    original, factor = p["original_max_position_embeddings"], p["factor"]
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    frequencies = _base_frequencies(p["rope_theta"], dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    long_wave, short_wave = wavelengths > original / low, wavelengths < original / high
    scaled = torch.where(long_wave, frequencies / factor, frequencies)
    return torch.where(~long_wave & ~short_wave, between, scaled), 1.0


_FREQUENCIES: dict[str, Callable[[dict[str, Any], int, int, Any], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}


class RotaryEmbedding(nn.Module):
    """The cosines and sines of each position, in the form `apply_rotary` takes.

    Holds ``inv_freq`` (head_dim / 2,), fp32, not in the state dict; casting the model does not cast it. longrope holds
    the frequencies of long inputs beside it, ``long_inv_freq``.
    """

    inv_freq: Tensor
    long_inv_freq: Tensor

    def __init__(self, parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> None:
        super().__init__()
        self.rope_parameters = parameters
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_type = parameters["rope_type"]
        self.follows_length = self.rope_type in ("dynamic", "longrope")
        self.attention_scaling = 1.0
        for name in ("inv_freq", "long_inv_freq") if self.rope_type == "longrope" else ("inv_freq",):
            self.register_buffer(name, torch.empty(head_dim // 2, dtype=torch.float32), persistent=False)
        if not self.inv_freq.is_meta:
            self.reset_buffers(self.inv_freq.device)

    def frequencies(self, length: float | None = None) -> tuple[Tensor, float]:
        """Inverse frequencies (head_dim / 2,), fp32 on the CPU, and the factor on cosines and sines."""
        with torch.device("cpu"):
            compute = _FREQUENCIES[self.rope_type]
            return compute(self.rope_parameters, self.head_dim, self.max_position_embeddings, length)

    def reset_buffers(self, device: torch.device) -> None:
        """Compute the buffers anew on ``device``."""
        inv_freq, self.attention_scaling = self.frequencies()
        self.inv_freq = inv_freq.to(device)
        if self.rope_type == "longrope":
            self.long_inv_freq = self.frequencies(math.inf)[0].to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        for name, held in list(self.named_buffers()):
            moved = fn(held)
            # bf16 angles are off by whole turns at long positions: follow the device, never the dtype
            setattr(self, name, moved if moved.dtype == torch.float32 else held.to(moved.device))
        return self

    def _at_length(self, length: int | Tensor) -> Tensor:
        """The inverse frequencies for inputs of a length; a tensor, () int64 on their device, is not waited for."""
        if self.rope_type == "longrope":
            long = length > self.rope_parameters["original_max_position_embeddings"]
            if isinstance(long, Tensor):
                return torch.where(long, self.long_inv_freq, self.inv_freq)
            return self.long_inv_freq if long else self.inv_freq
        if not isinstance(length, Tensor) and length <= self.max_position_embeddings:
            return self.inv_freq
        device = self.inv_freq.device
        return _dynamic(self.rope_parameters, self.head_dim, self.max_position_embeddings, length, device)[0]

    def forward(self, position_ids: Tensor, length: int | Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids: (batch or 1, seq), integer. length: tokens seen so far with these, () int64 where only the
        device knows, or None to take it from the positions.
        Returns cos and sin, each (batch or 1, 1, seq, head_dim) in ``dtype``, the first half of sin negated.
        """
        inv_freq = self.inv_freq
        if self.follows_length:
            inv_freq = self._at_length(position_ids.max() + 1 if length is None else length)
        angles = position_ids[:, None, :, None].float() * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.rope_type}, head_dim={self.head_dim}, theta={self.rope_parameters['rope_theta']}"
