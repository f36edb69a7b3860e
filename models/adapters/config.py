"""`LoraConfig`: the fields of PEFT's adapter_config.json that this LoRA knows; what else would matter is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...errors import ConfigError, nearest

ALL_LINEAR = "all-linear"
# Fields of a file that change nothing here, whatever they say.
_NO_MATTER = ("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out",
              "megatron_core", "runtime_config", "ensure_weight_tying", "eva_config", "layers_pattern")  # fmt: skip
_LARGEST_RANK = 1 << 16
_LARGEST = 1e30  # of lora_alpha: beyond it float32 overflows


@dataclass
class LoraConfig:
    """What to adapt and how; names, meaning and defaults of PEFT's ``LoraConfig``.

    r: rank. lora_alpha: the product is scaled by ``lora_alpha / r``, or ``/ sqrt(r)`` with ``use_rslora``.
    target_modules: names of linear layers, or their ends ("q_proj"); or a regular expression for whole names; or
        "all-linear": all but the output head. Needed to make an adapter.
    lora_dropout: on the input, in training. bias: only "none". init_lora_weights: True: A as nn.Linear begins, B zeros;
    "gaussian": A normal with deviation 1/r; False: B as nn.Linear begins too, for tests.
    base_model_name_or_path, revision: what it was made for, written to and read from files.
    Raises ConfigError. Source: Hu et al. 2021, arXiv:2106.09685; rank-stabilised: Kalajdzievski 2023, arXiv:2312.03732.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if type(self.r) is not int or not 0 < self.r <= _LARGEST_RANK:
            raise ConfigError(f"LoraConfig: r must be a whole number from 1 to {_LARGEST_RANK}, not {self.r!r}")
        _number("lora_alpha", self.lora_alpha, -_LARGEST, _LARGEST)
        _number("lora_dropout", self.lora_dropout, 0.0, 1.0)
        if self.bias != "none":
            raise ConfigError(f"LoraConfig: bias={self.bias!r} is not available, only 'none': biases stay as they are")
        if type(self.use_rslora) is not bool:
            raise ConfigError(f"LoraConfig: use_rslora must be true or false, not {self.use_rslora!r}")
        if type(self.init_lora_weights) is not bool and self.init_lora_weights != "gaussian":
            raise ConfigError(
                f"LoraConfig: init_lora_weights={self.init_lora_weights!r} is none of True, False, 'gaussian'; other "
                "starts change the base weights or need data, for which use PEFT"
            )
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ConfigError(f"LoraConfig: {name} must be a string, not {getattr(self, name)!r}")
        self._check_targets()

    def _check_targets(self) -> None:
        targets = self.target_modules
        if isinstance(targets, (set, tuple, frozenset)):
            self.target_modules = targets = sorted(targets)
        if targets is None or (isinstance(targets, str) and targets):
            return
        if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
            raise ConfigError(f"LoraConfig: target_modules must be a list of names, or a string, not {targets!r}")

    @property
    def scaling(self) -> float:
        """What B·A·x is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def of(cls, given: Any) -> LoraConfig:
        """``given`` if it is one; of another library's configuration (PEFT's), by its ``to_dict``; of a dictionary."""
        if isinstance(given, cls):
            return given
        values = given.to_dict() if callable(getattr(given, "to_dict", None)) else given
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Any) -> LoraConfig:
        """The configuration of a parsed adapter_config.json; ConfigError for what this LoRA would do otherwise."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"an adapter's configuration must be an object, not {type(values).__name__}")
        kind = values.get("peft_type")
        if getattr(kind, "value", kind) != "LORA":
            raise ConfigError(
                f"peft_type is {getattr(kind, 'value', kind)!r}; only 'LORA' is read here, others load with PEFT"
            )
        known = {field.name for field in fields(cls)}
        for name, value in values.items():
            if name in known or name in _NO_MATTER or not _asks(value):
                continue
            raise ConfigError(
                f"the adapter's configuration sets {name}={value!r}, which is not available here"
                f"{nearest(name, known)}; such an adapter loads with PEFT (PeftModel.from_pretrained)"
            )
        return cls(**{name: values[name] for name in known if name in values})

    def to_dict(self, *, in_out: bool = False, inference_mode: bool = True) -> dict[str, Any]:
        """adapter_config.json's contents. in_out: whether adapted layers store weights (in, out), as GPT-2's do."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": inference_mode,
            "fan_in_fan_out": in_out,
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "modules_to_save": None,
        }


def _asks(value: Any) -> bool:
    """Whether an unknown field's value may ask for something: sizes alone, and empty values, do not."""
    return value is not None and value is not False and value not in ("", [], {}, ()) and (
        type(value) not in (int, float)
    )  # fmt: skip


def _number(name: str, value: Any, low: float, high: float) -> None:
    fits = type(value) in (int, float) and low <= value <= high
    if not fits or (name == "lora_dropout" and value == 1):
        bounds = " from 0 to below 1" if name == "lora_dropout" else ""
        raise ConfigError(f"LoraConfig: {name} must be a finite number{bounds}, not {value!r}")
