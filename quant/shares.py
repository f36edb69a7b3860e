"""A rank's share of a packed layer: which numbers of the weight it reads, and what it makes of them.

Codes and scales are each shared out along their first dimension, in the chunks that FSDP makes of any parameter. A rank
reads the whole blocks that its codes and its scales belong to, a few numbers more than its share, so that it makes the
codes that one process would make. Scales that are quantized in their turn need the mean of all: see `completed_4bit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import QuantizationError
from .codebooks import codebook
from .eight_bit import quantize_rows
from .four_bit import encode_blocks, nest_scales
from .quant_state import QuantState

if TYPE_CHECKING:
    from .linear import Linear4bit, Linear8bitLt
    from .packed import PackedLinear

Share = Callable[[int], tuple[int, int]]
"""Begin and end of this rank's chunk of a dimension of some size."""
Gather = Callable[[Tensor, int], Tensor]
"""All ranks' chunks of a tensor, whose first dimension is of some size in all."""
_HELD = torch.float8_e4m3fn


class Part(NamedTuple):
    """What a rank reads of a floating-point weight, and makes of it.

    ``shape``: in which the weight is seen; ``bounds``: (begin, end) of the part in each of its dimensions. ``run``: the
    contiguous part → {attribute: tensor}. ``makes``: those tensors on meta.
    """

    shape: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]
    run: Callable[[Tensor], dict[str, Tensor]]
    makes: dict[str, Tensor]


def part_of_4bit(layer: Linear4bit, share: Share) -> Part:
    """The blocks of a `Linear4bit` that this rank's codes and scales come from. Scales are fp32 still."""
    rows, width = layer.out_features, layer.in_features
    count, block, quant_type, in_out = rows * width, layer.blocksize, layer.quant_type, layer.transposed
    storage = layer.quant_storage
    codes = share((count + 1) // 2 // storage.itemsize)
    scales = share(-(-count // block))
    half = block // 2 // storage.itemsize  # of the codes' numbers, in a block
    spans = [(codes[0] // half, -(-codes[1] // half)), scales]
    spans = [span for span in spans if span[0] < span[1]]
    first, last = min((span[0] for span in spans), default=0), max((span[1] for span in spans), default=0)
    begin, end = first * block, min(last * block, count)
    shape: tuple[int, ...] = (count,)
    bounds: tuple[tuple[int, int], ...] = ((begin, end),)
    skipped = 0
    if in_out:  # the codes' order goes down the columns of what is read
        shape, columns = (width, rows), (begin // width, -(-end // width))
        bounds, skipped = ((0, width), columns), begin - columns[0] * width

    def run(weight: Tensor) -> dict[str, Tensor]:
        flat = (weight.t().contiguous() if in_out else weight).reshape(-1)[skipped : skipped + end - begin]
        packed, absmax = encode_blocks(flat, quant_type, block)
        mine = packed.view(storage)[codes[0] - first * half : codes[1] - first * half]
        return {"weight": mine.unsqueeze(1), "absmax": absmax[scales[0] - first : scales[1] - first]}

    makes = {
        "weight": torch.empty(codes[1] - codes[0], 1, dtype=storage, device="meta"),
        "absmax": torch.empty(scales[1] - scales[0], dtype=torch.float32, device="meta"),
    }
    return Part(shape, bounds, run, makes)


def completed_4bit(layer: Linear4bit, parts: Mapping[str, Tensor], share: Share, gather: Gather) -> dict[str, Tensor]:
    """All tensors of this rank's share, from what its part has made; with nested scales all ranks call it together."""
    shape, nested, absmax = (layer.out_features, layer.in_features), None, parts["absmax"]
    found = dict(parts)
    if layer.compress_statistics:
        absmax, nested = nest_scales(gather(absmax, -(-math.prod(shape) // layer.blocksize)))
        found["absmax"] = absmax[slice(*share(absmax.numel()))].clone()
    code = codebook(layer.quant_type).to(absmax.device, copy=True)
    state = QuantState(absmax, shape, layer.source_dtype, layer.blocksize, layer.quant_type, code, nested)
    entries = state.to_tensors()
    for attribute, name in layer.checkpoint_names.items():
        entry = entries.get(name.removeprefix("weight."))
        if entry is not None and attribute not in found:
            found[attribute] = entry
    if nested is not None:
        found["nested_absmax"] = nested.absmax[slice(*share(nested.absmax.numel()))].clone()
    return found


def part_of_8bit(layer: Linear8bitLt, share: Share) -> Part:
    """This rank's rows of a `Linear8bitLt`."""
    rows, width, in_out = layer.out_features, layer.in_features, layer.transposed
    begin, end = share(rows)
    shape, bounds = (
        ((width, rows), ((0, width), (begin, end))) if in_out else ((rows, width), ((begin, end), (0, width)))
    )

    def run(weight: Tensor) -> dict[str, Tensor]:
        if not weight.numel():
            codes = torch.empty(0, width, dtype=torch.int8, device=weight.device)
            return {"weight": codes, "SCB": torch.empty(0, dtype=torch.float32, device=weight.device)}
        codes, scb = quantize_rows(weight.t().contiguous() if in_out else weight)
        return {"weight": codes, "SCB": scb}

    makes = {
        "weight": torch.empty(end - begin, width, dtype=torch.int8, device="meta"),
        "SCB": torch.empty(end - begin, dtype=torch.float32, device="meta"),
    }
    return Part(shape, bounds, run, makes)


def share_out(layer: PackedLinear) -> None:
    """Make parameters of the buffers on meta that are shared out, for FSDP shares out parameters alone."""
    for attribute in layer.shared_out:
        if (buffer := layer._buffers.pop(attribute, None)) is not None:
            layer._parameters[attribute] = torch.nn.Parameter(buffer, requires_grad=False)


def as_floats(tensor: Tensor) -> Tensor:
    """Codes as floating-point numbers of the same bytes: older versions of torch shard no others. They are only
    copied, never calculated with."""
    return tensor if tensor.is_floating_point() else tensor.view(_HELD)


def as_codes(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `as_floats`."""
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def refuse_shared(layer: PackedLinear) -> None:
    """QuantizationError for a layer of which this rank holds a share, where the whole weight is asked for."""
    if layer.is_shared:
        raise QuantizationError(
            f"this {type(layer).__name__} is spread over a device mesh: each rank holds a share of its codes, which "
            "come together only while the layer runs. Do this on a model loaded without device_mesh"
        )
