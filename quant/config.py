"""`BitsAndBytesConfig`: how weights are to be held, in the fields and the JSON that users and checkpoints know."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..errors import QuantizationError, nearest

logger = logging.getLogger("loadstone.quant")

METHOD = "bitsandbytes"
QUANT_TYPES = ("nf4", "fp4")
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_COMPUTE = {**_FLOATS, "float64": torch.float64}
_STORAGE = {**_FLOATS, "uint8": torch.uint8, "int8": torch.int8}
_ALIASES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


class BitsAndBytesConfig:
    """4-bit (NF4, FP4) or 8-bit (LLM.int8()) weights, as bitsandbytes holds them.

    load_in_8bit, load_in_4bit: exactly one of them.
    llm_int8_threshold: input columns with a magnitude of at least this are multiplied in 16 bits; 0: none.
    llm_int8_skip_modules: names of modules to leave as they are, instead of the output head and what is tied to it;
        for 4 bits too. A name fits from the start or to the end of a module's name, at dots.
    llm_int8_enable_fp32_cpu_offload: leave modules that a ``device_map`` dictionary puts on the CPU unquantized.
    llm_int8_has_fp16_weight: only False; weights are held in 8 bits.
    bnb_4bit_compute_dtype: dtype of the product (a floating-point dtype or its name; None: float32).
    bnb_4bit_quant_type: "fp4" or "nf4". bnb_4bit_use_double_quant: quantize the scales too.
    bnb_4bit_quant_storage: dtype under which the packed bytes are held (None: uint8).
    Other fields are kept, written back, and named in a warning. Raises QuantizationError for a value that is wrong.
    """

    quant_method: ClassVar[str] = METHOD
    blocksize: int = 64  # numbers that share a scale, for 4 bits: files say it for each weight, the JSON has no field

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        llm_int8_threshold: float = 6.0,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> None:
        method = kwargs.pop("quant_method", METHOD)
        if getattr(method, "value", method) != METHOD:
            raise QuantizationError(f"BitsAndBytesConfig is for quant_method={METHOD!r}, got {method!r}")
        self.load_in_8bit = load_in_8bit
        self.load_in_4bit = load_in_4bit
        for bits, flag in (("8bit", load_in_8bit), ("4bit", load_in_4bit)):  # files hold each flag twice
            again = kwargs.pop(f"_load_in_{bits}", flag)
            if again != flag:
                raise QuantizationError(f"load_in_{bits}={flag!r} contradicts _load_in_{bits}={again!r}")
        self.llm_int8_threshold = llm_int8_threshold
        self.llm_int8_skip_modules = llm_int8_skip_modules
        self.llm_int8_enable_fp32_cpu_offload = llm_int8_enable_fp32_cpu_offload
        self.llm_int8_has_fp16_weight = llm_int8_has_fp16_weight
        self.bnb_4bit_compute_dtype = _dtype("bnb_4bit_compute_dtype", bnb_4bit_compute_dtype, _COMPUTE, torch.float32)
        self.bnb_4bit_quant_type = bnb_4bit_quant_type
        self.bnb_4bit_use_double_quant = bnb_4bit_use_double_quant
        self.bnb_4bit_quant_storage = _dtype("bnb_4bit_quant_storage", bnb_4bit_quant_storage, _STORAGE, torch.uint8)
        self.unknown = kwargs
        self.post_init()
        if kwargs:
            hint = nearest(next(iter(kwargs)), self._fields())
            logger.warning("BitsAndBytesConfig: unknown fields kept without effect: %s%s", ", ".join(kwargs), hint)

    def post_init(self) -> None:
        """Check every field. Raises QuantizationError naming the field, the value and what it may be."""
        for name in ("load_in_8bit", "load_in_4bit", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
                     "bnb_4bit_use_double_quant"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if self.load_in_4bit and self.load_in_8bit:
            raise QuantizationError("load_in_4bit and load_in_8bit are both True; choose one")
        if not (self.load_in_4bit or self.load_in_8bit):
            raise QuantizationError("BitsAndBytesConfig chooses no bits; pass load_in_4bit=True or load_in_8bit=True")
        threshold = self.llm_int8_threshold
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not math.isfinite(threshold) or threshold < 0:
            raise _wrong("llm_int8_threshold", threshold, "a number from 0")
        self.llm_int8_threshold = float(threshold)
        skip = self.llm_int8_skip_modules
        if skip is not None:
            if not isinstance(skip, (list, tuple)) or not all(isinstance(name, str) and name for name in skip):
                raise _wrong("llm_int8_skip_modules", skip, "a list of module names, or None")
            self.llm_int8_skip_modules = list(skip)
        if self.llm_int8_has_fp16_weight:
            raise QuantizationError(
                "llm_int8_has_fp16_weight=True would hold the weights in 16 bits and quantize them in every forward; "
                "that is not available: load with dtype=torch.float16 and no quantization_config"
            )
        kind = self.bnb_4bit_quant_type
        if kind not in QUANT_TYPES:
            hint = nearest(kind, QUANT_TYPES) if isinstance(kind, str) else ""
            raise _wrong("bnb_4bit_quant_type", kind, f"{' or '.join(map(repr, QUANT_TYPES))}{hint}")

    def is_quantizable(self) -> bool:
        """True: a configuration without bits cannot be built."""
        return self.load_in_4bit or self.load_in_8bit

    def quantization_method(self) -> str:
        """``"llm_int8"``, ``"nf4"`` or ``"fp4"``."""
        return "llm_int8" if self.load_in_8bit else self.bnb_4bit_quant_type

    @property
    def modules_to_not_convert(self) -> list[str] | None:
        """The caller's list of modules to leave as they are, None for the default one."""
        return self.llm_int8_skip_modules

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from a dictionary (a checkpoint's ``quantization_config``); keyword arguments override its fields.

        Returns the configuration, with ``return_unused_kwargs`` the pair (configuration, keywords that are no fields).
        """
        if not isinstance(config_dict, Mapping):
            raise QuantizationError(f"quantization_config must be an object, got {type(config_dict).__name__}")
        values = {str(name): value for name, value in config_dict.items()}
        for bits in ("8bit", "4bit"):
            if f"load_in_{bits}" not in values and f"_load_in_{bits}" in values:
                values[f"load_in_{bits}"] = values[f"_load_in_{bits}"]
        unused = {name: value for name, value in kwargs.items() if name not in cls._fields()}
        config = cls(**{**values, **{name: value for name, value in kwargs.items() if name not in unused}})
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def _fields(cls) -> tuple[str, ...]:
        return ("load_in_8bit", "load_in_4bit", "llm_int8_threshold", "llm_int8_skip_modules",
                "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype",
                "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds as ``quantization_config``: JSON values, each flag under both its names."""
        values: dict[str, Any] = {name: copy.deepcopy(getattr(self, name)) for name in self._fields()}
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            values[name] = str(values[name]).removeprefix("torch.")
        flags = {"_load_in_4bit": self.load_in_4bit, "_load_in_8bit": self.load_in_8bit, "quant_method": METHOD}
        return {**copy.deepcopy(self.unknown), **values, **flags}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields of `to_dict` that differ from the defaults."""
        default = type(self)(load_in_4bit=True).to_dict()
        default.update(load_in_4bit=False, _load_in_4bit=False)
        return {name: value for name, value in self.to_dict().items() if name not in default or default[name] != value}

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_diff_dict`, or `to_dict`, as sorted, indented JSON."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        try:
            return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise QuantizationError(f"BitsAndBytesConfig holds a value that JSON cannot: {error}") from error

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set fields; returns the keywords that are none. Raises QuantizationError, with nothing changed."""
        changed = type(self).from_dict({**self.to_dict(), **self._flags(kwargs)})
        unused = {name: value for name, value in kwargs.items() if name not in self._fields()}
        self.__dict__.update(changed.__dict__)
        return unused

    def _flags(self, values: Mapping[str, Any]) -> dict[str, Any]:
        known = {name: value for name, value in values.items() if name in self._fields()}
        twice = {f"_{name}": value for name, value in known.items() if name.startswith("load_in_")}
        return {**known, **twice}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(use_diff=False)}"


def _dtype(field: str, value: Any, known: Mapping[str, torch.dtype], default: torch.dtype) -> torch.dtype:
    """A dtype from itself or its name, looked up in a fixed list."""
    if value is None:
        return default
    if isinstance(value, torch.dtype) and value in known.values():
        return value
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        found = known.get(_ALIASES.get(name, name))
        if found is not None:
            return found
    hint = nearest(value, known) if isinstance(value, str) else ""
    raise _wrong(field, value, f"one of {', '.join(known)} (a torch dtype or its name){hint}")


def _wrong(field: str, value: Any, wanted: str) -> QuantizationError:
    return QuantizationError(f"{field} must be {wanted}; got {value!r}")
