"""What a quantized causal language model is beside a plain one: made on meta, taken apart, counted, named."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OffloadError, ParallelError, QuantizationError
from .configuration import PreTrainedConfig

if TYPE_CHECKING:
    from ..quant import Quantizer
    from .causal_lm import CausalLM

logger = logging.getLogger("loadstone.models")


def choose_quantizer(name: str, config: PreTrainedConfig, asked: Any) -> Quantizer | None:
    """The quantizer that checkpoint ``name`` needs by its configuration, or that the caller asks for; else None."""
    of_checkpoint = getattr(config, "quantization_config", None)
    if of_checkpoint is None and asked is None:
        return None
    from ..quant import find_quantizer

    return find_quantizer(name, of_checkpoint, asked)


def quantize_on_meta(model: CausalLM, quantizer: Quantizer, device_map: Any = None) -> None:
    """Put the quantizer's packed layers into a model on meta, and its configuration into the model's."""
    places = dict(device_map) if isinstance(device_map, Mapping) else {}
    tied = {name.rpartition(".")[0] for pair in model.active_ties().items() for name in pair}  # of one parameter
    quantizer.replace(model, default_skips(model), [*sorted(tied), *quantizer.skipped_by_place(places)])
    model.set_quantizer(quantizer)


def default_skips(model: CausalLM) -> list[str]:
    """Modules that stay as they are unless the caller lists others: the head, what is tied, what comes last."""
    head = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is head}
    last = list(dict(model.named_parameters(remove_duplicate=False)))[-1]
    weights = {last, *(name for pair in model.active_ties().items() for name in pair)}
    return sorted(names | {name.rpartition(".")[0] for name in weights} - {""})


def default_place(quantizer: Quantizer | None, device_map: Any) -> Any:
    """Where a load without ``device_map`` goes: quantized by bitsandbytes' method, the current GPU if there is one."""
    if quantizer is None or device_map is not None or quantizer.bits is None:
        return device_map
    if torch.get_default_device().type != "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.current_device()


def plain_config(config: PreTrainedConfig) -> None:
    """Take the quantization out of the configuration of a model whose weights are plain."""
    config.__dict__.pop("quantization_config", None)


def dequantize(model: CausalLM, dtype: torch.dtype | None = None) -> CausalLM:
    """See `CausalLM.dequantize`."""
    if model.hf_quantizer is None:
        raise QuantizationError(f"this {type(model).__name__} is not quantized; there is nothing to dequantize")
    from ..loading.offload import is_offloaded

    if model.layout is not None:
        raise ParallelError(
            f"a quantized model on a device mesh ({model.layout.describe()}) cannot be dequantized, for each rank has "
            "a share of the codes; load it without quantization, or dequantize() it on one process and save that"
        )
    if is_offloaded(model):
        raise OffloadError(
            "some weights of this model are offloaded, and decoded they would all have to be in memory; load the model "
            "on one device to dequantize it"
        )
    with torch.no_grad():
        model.hf_quantizer.dequantize(model, dtype)
    plain_config(model.config)
    model.set_quantizer(None)
    return model


def packed_numbers(model: CausalLM) -> tuple[set[int], int]:
    """Ids of the parameters that hold codes, and how many numbers they stand for."""
    from ..quant import PackedLinear

    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    holders = {id(p) for layer in layers for name, p in layer.named_parameters(recurse=False) if name != "bias"}
    return holders, sum(layer.in_features * layer.out_features for layer in layers)


def check_learns(model: CausalLM, loss: Tensor | None) -> None:
    """QuantizationError for a loss, in training, from which nothing could learn."""
    if loss is not None and model.training and torch.is_grad_enabled() and not loss.requires_grad:
        raise QuantizationError(
            f"nothing in this quantized {type(model).__name__} can be trained: quantized weights are codes, which have "
            "no gradient, and all others are frozen. Add adapters (LoRA) to train it; to take the loss only, call "
            "model.eval() or use torch.no_grad()"
        )
