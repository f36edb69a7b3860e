"""GPTQ checkpoints: 2, 3, 4 or 8 bits a number, read and written in the Hub's format. Quantizing is not done here.

Frantar et al. 2022, arXiv:2210.17323. The format, as AutoGPTQ 0.7 and GPTQModel write it, for a weight (out, in):
``qweight`` (in * bits / 32, out) int32, ``qzeros`` (groups, out * bits / 32) int32, ``scales`` (groups, out), ``g_idx``
(in,) int32, the group of each input: not in order if the quantizer went by activations (``desc_act``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from .grouped import FileConfig, FileQuantizer, GroupedLinear, check_width, fields, scaled
from .packed import PackedLinear

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in each field of a word


class GPTQConfig(FileConfig):
    """The ``quantization_config`` of a GPTQ checkpoint.

    bits: 2, 3, 4 or 8. group_size: inputs that share a scale, -1 for all. desc_act: whether groups go by activation;
    the file's ``g_idx`` decides. sym: whether all zeros are in the middle; the file's ``qzeros`` decide.
    checkpoint_format (or format): "gptq", whose files hold each zero less one, or "gptq_v2". lm_head: whether the
    output head is quantized too. modules_in_block_to_quantize: lists of names, if only these are.
    modules_to_not_convert: names of modules that are not quantized, besides the output head.
    """

    quant_method: ClassVar[str] = "gptq"

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.bits = self.whole("bits")
        if self.bits not in BITS:
            raise self.wrong("bits", self.bits, f"one of {', '.join(map(str, BITS))}")
        self.desc_act, self.sym = self.flag("desc_act", False), self.flag("sym", True)
        self.lm_head = self.flag("lm_head", False)
        form = values.get("checkpoint_format") or values.get("format") or "gptq"
        if self.flag("is_marlin_format", False) or form not in FORMATS:
            form = "marlin" if self.flag("is_marlin_format", False) else form
            raise self.wrong("checkpoint_format", form, f"{' or '.join(map(repr, FORMATS))}: others are not read")
        self.checkpoint_format = form
        if values.get("dynamic"):
            raise self.wrong("dynamic", values["dynamic"], "absent: options that differ by module are not read")
        if str(values.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
            raise self.wrong("pack_dtype", values["pack_dtype"], "int32")
        self.only = self._only(values.get("modules_in_block_to_quantize"))

    def _only(self, lists: Any) -> list[str] | None:
        if lists is None:
            return None
        good = isinstance(lists, list) and all(isinstance(some, (list, str)) for some in lists)
        names = [name for some in lists for name in ([some] if isinstance(some, str) else some)] if good else []
        if not names or not all(isinstance(name, str) and name for name in names):
            raise self.wrong("modules_in_block_to_quantize", lists, "lists of module names, or null")
        return names


class GPTQLinear(GroupedLinear):
    """A linear layer of a GPTQ checkpoint; see `GroupedLinear` and the head of this file."""

    read_first = ("g_idx",)
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 128,
        checkpoint_format: str = "gptq",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, group_size=group_size, device=device, dtype=dtype)
        self.bits, self.checkpoint_format, self.in_order = bits, checkpoint_format, False
        shapes = {
            "qweight": (in_features * bits // 32, out_features),
            "qzeros": (self.groups, out_features * bits // 32),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(self.groups, out_features, dtype=torch.float16, device=device))
        self.register_buffer("g_idx", torch.zeros(in_features, dtype=torch.int32, device=device))

    def decode(self, start: int, stop: int) -> Tensor:
        """Columns of the weight, (in_features, stop - start) fp32; ``start`` is a multiple of 32."""
        words = self.qzeros[:, start * self.bits // 32 : stop * self.bits // 32]
        codes = fields(self.qweight[:, start:stop], self.bits, 0)
        return scaled(codes, self._zeros(words), self.scales[:, start:stop], None if self.in_order else self.g_idx)

    def _zeros(self, words: Tensor) -> Tensor:
        """(groups, columns) int32."""
        if self.checkpoint_format == "gptq_v2":
            return fields(words, self.bits)
        if self.bits == 3:
            return (fields(words, 3) + 1) & 7
        # A one was taken from each zero by subtracting whole words: adding them undoes it, borrows and all.
        return fields(words + _ONES[self.bits], self.bits)

    def loaded(self) -> None:
        """Note whether the groups are in order, which all zeros in a file of many groups mean too."""
        if self.g_idx.is_meta:
            return
        order = torch.arange(self.in_features, device=self.g_idx.device) // self.group_size
        even = self.in_features % self.group_size == 0
        self.in_order = even and (torch.equal(self.g_idx, order.int()) or not bool(self.g_idx.any()))
        if not even and not bool(self.g_idx.any()):
            self.g_idx = order.int()

    def check_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Raise QuantizationError for groups that are not there."""
        super().check_parts(parts)
        low, high = (int(end) for end in parts["g_idx"].aminmax())
        if low < 0 or high >= self.groups:
            raise QuantizationError(
                f"its g_idx names groups from {low} to {high}, but there are {self.groups} (0 to {self.groups - 1}): "
                "the file is damaged, or its group_size is not that of the config"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class GPTQQuantizer(FileQuantizer):
    """Reads GPTQ checkpoints."""

    config: GPTQConfig

    def skipped(self, default: Sequence[str]) -> list[str]:
        """The output head, unless the configuration says that it is quantized, and what is listed there."""
        return super().skipped([] if self.config.lm_head else default)

    def convert(self, name: str, layer: nn.Module) -> PackedLinear | None:
        """A `GPTQLinear`, or None for a module outside ``modules_in_block_to_quantize``."""
        only = self.config.only
        if only is not None and not any(f".{name}".endswith(f".{one}") for one in only):
            return None
        if not isinstance(layer, nn.Linear):
            raise QuantizationError(f"{name} is a {type(layer).__name__}: GPTQ is read for nn.Linear only")
        check_width(name, layer, 32 if self.config.bits == 3 else 32 // self.config.bits)
        packed = GPTQLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            bits=self.config.bits,
            group_size=self.config.group_size,
            checkpoint_format=self.config.checkpoint_format,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        packed.stand_in_for(layer)
        return packed
