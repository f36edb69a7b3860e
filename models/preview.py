"""What loading a checkpoint would do, from its configuration and headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..loading.checkpoint import Checkpoint
from ..loading.plan import Plan, make_plan
from ..loading.source import Source
from .causal_lm import CausalLM
from .configuration import PreTrainedConfig
from .depth import check_depth
from .origin import Origin
from .pretrained import build_on_meta, choose_dtype, declarations
from .quantized import choose_quantizer, quantize_on_meta


@dataclass(frozen=True)
class Preview:
    """``model`` is on meta; ``plan`` is what `CausalLM.from_pretrained` would execute."""

    config: PreTrainedConfig
    model: CausalLM
    checkpoint: Checkpoint
    plan: Plan


def preview(
    cls: type[CausalLM],
    source: Source,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    variant: str | None = None,
    quantization_config: Any = None,
    origin: Origin | None = None,
) -> Preview:
    """Plan ``cls.from_pretrained(source, ...)`` without reading weights; devices need not exist on this machine.

    origin: where the weights come from (default: safetensors of ``variant``).
    Raises what loading would raise for the configuration, the headers and the device map. What does not fit between
    checkpoint and model is in the plan, not raised.
    """
    origin = origin or Origin(variant)
    config = origin.configuration(cls.config_class, source)
    quantizer = choose_quantizer(source.name, config, quantization_config)
    checkpoint = origin.checkpoint(source)
    config.dtype = choose_dtype(dtype, config, checkpoint)
    check_depth(config, checkpoint)
    model = build_on_meta(cls, config)
    if quantizer is not None:
        quantize_on_meta(model, quantizer, device_map)
    plan = make_plan(
        model,
        checkpoint,
        device_map=device_map,
        max_memory=max_memory,
        devices_must_exist=False,
        **declarations(model),
    )
    return Preview(config, model, checkpoint, plan)
