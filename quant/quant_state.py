"""What 4-bit codes need to become numbers again, and how a checkpoint holds it: the entries bitsandbytes writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..kernels import AUTO, Kernels
from ..kernels.scales import NestedScales, dequantize_absmax
from .codebooks import QUANT_TYPES, codebook

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PACKED = "quant_state.bitsandbytes__"
_LONGEST_JSON = 1 << 16  # bytes; real ones have some 170
_MOST_NUMBERS = 1 << 48
_CODE_ROOM = 1e-6  # a map in a file may be another version's rounding of ours, no other map


def packed_size(shape: tuple[int, ...]) -> int:
    """Bytes of the packed codes of a tensor of ``shape``: half the numbers, rounded up."""
    return (math.prod(shape) + 1) // 2


@dataclass(frozen=True, eq=False)
class QuantState:
    """All but the packed codes of one 4-bit tensor.

    absmax: (blocks,), fp32 or, with ``nested``, uint8. shape, dtype: of the tensor before it was quantized. blocksize:
    numbers that share a scale. quant_type: "nf4" or "fp4". code: (16,) fp32, what each code stands for.
    """

    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    code: Tensor
    nested: NestedScales | None = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed codes: half the numbers, rounded up."""
        return packed_size(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of this state."""
        tensors = [self.absmax, self.code, *((self.nested.absmax, self.nested.code) if self.nested else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def scales(self, kernels: Kernels = AUTO) -> Tensor:
        """The scale of each block, (blocks,) fp32; ``absmax`` itself unless it is nested."""
        return self.absmax if self.nested is None else dequantize_absmax(self.absmax, *self.nested, kernels=kernels)

    def to(self, device: torch.device | str) -> QuantState:
        """This state with its tensors on ``device``."""
        nested = self.nested
        if nested is not None:
            nested = nested._replace(absmax=nested.absmax.to(device), code=nested.code.to(device))
        return replace(self, absmax=self.absmax.to(device), code=self.code.to(device), nested=nested)

    def to_tensors(self) -> dict[str, Tensor]:
        """The entries that a checkpoint holds beside ``weight``, by what follows ``weight.`` in their names.

        Names, order and bytes are those of bitsandbytes: ``absmax``, ``quant_map``, with nested scales
        ``nested_absmax`` and ``nested_quant_map``, and the bytes of a JSON object, uint8, on the CPU.
        """
        entries = {"absmax": self.absmax, "quant_map": self.code}
        facts: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": _dtype_name(self.dtype),
            "shape": list(self.shape),
        }
        if self.nested is not None:
            entries |= {"nested_absmax": self.nested.absmax, "nested_quant_map": self.nested.code}
            facts |= {
                "nested_blocksize": self.nested.blocksize,
                "nested_dtype": "float32",
                "nested_offset": self.nested.offset,
            }
        text = json.dumps(facts).encode()
        return {**entries, _PACKED + self.quant_type: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], *, name: str = "weight") -> QuantState:
        """The state from the entries of a checkpoint, keyed as `to_tensors` does, on the device they are on.

        name: of the tensor, for messages. Everything is checked against everything else, so that a state that was
        made can be decoded. Raises FormatError naming what is wrong.
        """
        return _Reader(tensors, name).state()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Reader:
    """Builds a QuantState from what may be a hostile file."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.tensors, self.name = tensors, name

    def wrong(self, what: str) -> FormatError:
        return FormatError(f"the quantization state of {self.name!r} cannot be used: {what}; write the checkpoint anew")

    def state(self) -> QuantState:
        quant_type, facts = self._facts()
        dtype = self._fact(facts, "dtype", str)
        if dtype not in DTYPES:
            raise self.wrong(f"its dtype is {dtype[:40]!r}, not one of {', '.join(DTYPES)}")
        blocksize = self._fact(facts, "blocksize", int)
        if blocksize not in BLOCK_SIZES:
            raise self.wrong(f"its blocksize is {blocksize}, not one of {', '.join(map(str, BLOCK_SIZES))}")
        shape = self._shape(facts)
        blocks = -(-math.prod(shape) // blocksize)
        nested = self._nested(facts, blocks)
        absmax = self._tensor("absmax", torch.float32 if nested is None else torch.uint8, blocks)
        code = codebook(quant_type).to(absmax.device)
        given = self._tensor("quant_map", torch.float32, 16)
        if not torch.allclose(given, code.to(given.device), rtol=0, atol=_CODE_ROOM):
            raise self.wrong(f"its quant_map is not that of {quant_type}")
        return QuantState(absmax, shape, DTYPES[dtype], blocksize, quant_type, code, nested)

    def _facts(self) -> tuple[str, dict[str, Any]]:
        keys = [key for key in self.tensors if key.startswith("quant_state.")]
        known = [_PACKED + quant_type for quant_type in QUANT_TYPES]
        if len(keys) != 1 or keys[0] not in known:
            raise self.wrong(f"it needs one of {' and '.join(known)}, it has {', '.join(keys) or 'none'}")
        packed = self.tensors[keys[0]]
        if packed.dtype != torch.uint8 or packed.dim() != 1 or not 0 < packed.numel() <= _LONGEST_JSON:
            raise self.wrong(f"{keys[0]} has shape {tuple(packed.shape)} and dtype {packed.dtype}, not bytes of JSON")
        try:
            facts = json.loads(bytes(packed.tolist()).decode())
        except (ValueError, RecursionError) as error:
            raise self.wrong(f"{keys[0]} is not JSON ({type(error).__name__})") from error
        if not isinstance(facts, dict):
            raise self.wrong(f"{keys[0]} holds a JSON {type(facts).__name__}, not an object")
        quant_type = keys[0].removeprefix(_PACKED)
        if facts.get("quant_type") != quant_type:
            raise self.wrong(f"{keys[0]} says quant_type {str(facts.get('quant_type'))[:40]!r}")
        return quant_type, facts

    def _fact(self, facts: dict[str, Any], key: str, kind: type) -> Any:
        value = facts.get(key)
        if type(value) is not kind:
            raise self.wrong(f"its {key} is {str(value)[:40]!r}, not a {kind.__name__}")
        return value

    def _shape(self, facts: dict[str, Any]) -> tuple[int, ...]:
        shape: Any = facts.get("shape")
        good = isinstance(shape, list) and 0 < len(shape) <= 8
        if not good or not all(type(size) is int and 0 < size <= _MOST_NUMBERS for size in shape):
            raise self.wrong(f"its shape is {str(shape)[:80]}, not a list of positive sizes")
        if math.prod(shape) > _MOST_NUMBERS:
            raise self.wrong(f"its shape {str(shape)[:80]} is of more numbers than there can be")
        return tuple(shape)

    def _nested(self, facts: dict[str, Any], blocks: int) -> NestedScales | None:
        given = {"nested_absmax", "nested_quant_map"} & self.tensors.keys() | {
            key for key in facts if key.startswith("nested_")
        }
        if not given:
            return None
        blocksize = self._fact(facts, "nested_blocksize", int)
        if not 0 < blocksize <= 1 << 16:
            raise self.wrong(f"its nested_blocksize is {blocksize}")
        if facts.get("nested_dtype") != "float32":
            raise self.wrong(f"its nested_dtype is {str(facts.get('nested_dtype'))[:40]!r}, not 'float32'")
        offset = self._fact(facts, "nested_offset", float)
        # As fp32, which it is: what is out of range there becomes infinite.
        offset = torch.tensor(offset, dtype=torch.float64).float().item()
        if not math.isfinite(offset):
            raise self.wrong(f"its nested_offset is {offset}")
        absmax = self._tensor("nested_absmax", torch.float32, -(-blocks // blocksize))
        return NestedScales(absmax, self._tensor("nested_quant_map", torch.float32, 256), offset, blocksize)

    def _tensor(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        tensor = self.tensors.get(key)
        if tensor is None:
            raise self.wrong(f"{key} is missing")
        if tensor.dtype != dtype or tensor.shape != (count,):
            raise self.wrong(
                f"{key} has shape {tuple(tensor.shape)} and dtype {_dtype_name(tensor.dtype)}, where the other entries "
                f"say ({count},) and {_dtype_name(dtype)}"
            )
        if dtype.is_floating_point and not bool(tensor.isfinite().all()):
            raise self.wrong(f"{key} holds infinities or NaN")
        return tensor.contiguous()
