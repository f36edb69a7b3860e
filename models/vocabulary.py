"""A vocabulary of another size: rows of the token embedding and of the head added or cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ParallelError, QuantizationError
from ..quant.packed import PackedLinear

if TYPE_CHECKING:
    from .causal_lm import CausalLM

_SPREAD = 1e-9  # of the covariance of the old rows that new ones are drawn with, so that each differs a little


def resize_token_embeddings(
    model: CausalLM,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """Give the token embedding and the head another number of rows, and ``config.vocab_size`` that number.

    new_num_tokens: rows, None: as many as there are. pad_to_multiple_of: rounded up to one.
    mean_resizing: new rows lie about the mean of the old ones; False: they are initialised as in a new model.
    Parameters stay the objects they are, tied ones tied; returns the embedding. Make optimizers after it.
    Raises ArgumentError for a size that is none, adapters on either or weights that are not in memory;
        QuantizationError if either is quantized.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if new_num_tokens is None and pad_to_multiple_of is None:
        return embedding
    if model.layout is not None:
        raise ParallelError(
            "the vocabulary of a model that is spread over a device mesh cannot be resized; resize it on one process, "
            "save it, and load that"
        )
    _check_resizable(embedding, "token embedding", nn.Embedding)
    _check_resizable(head, "head", nn.Linear)
    size = _size(new_num_tokens, pad_to_multiple_of, embedding.weight.shape[0])
    tied = head.weight is embedding.weight
    with torch.no_grad():
        _resize(model, embedding, size, mean_resizing)
        if not tied:
            _resize(model, head, size, mean_resizing)
    embedding.num_embeddings = head.out_features = size
    if embedding.padding_idx is not None and embedding.padding_idx >= size:
        embedding.padding_idx = None
    model.config.vocab_size = size
    model.tie_weights()
    return embedding


def _size(asked: int | None, multiple: int | None, now: int) -> int:
    for name, value in (("new_num_tokens", asked), ("pad_to_multiple_of", multiple)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ArgumentError(f"{name} must be a whole number from 1 on, got {value!r}")
    size = now if asked is None else asked
    return size if multiple is None else -(-size // multiple) * multiple


def _check_resizable(module: Any, role: str, kind: type[nn.Module]) -> None:
    """Only plain matrices that are here grow rows: not codes, adapters, shards, or weights that lie on disk."""
    weight: Any = getattr(module, "weight", None)
    name = type(module).__name__
    if isinstance(module, PackedLinear) or (isinstance(weight, Tensor) and not weight.is_floating_point()):
        raise QuantizationError(
            f"the {role} is a quantized {name}, whose codes cannot grow rows; resize before quantizing, or dequantize()"
        )
    if not isinstance(module, kind):
        raise ArgumentError(
            f"the {role} is a {name}, not a plain nn.{kind.__name__}, and cannot be resized; take adapters out first "
            "(merge_and_unload)"
        )
    if weight.is_meta or type(weight) is not nn.Parameter:
        what = "on the meta device (offloaded, or not loaded)" if weight.is_meta else f"a {type(weight).__name__}"
        raise ArgumentError(f"the weight of the {role} is {what}; resize a model whose weights are in memory")


def _resize(model: CausalLM, module: Any, size: int, from_mean: bool) -> None:
    """Give a module's weight, and bias, another number of rows; the parameters stay the same objects."""
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        if parameter is None or parameter.shape[0] == size:
            continue
        old, kept = parameter.data, min(parameter.shape[0], size)
        new = old.new_empty((size, *old.shape[1:]))
        new[:kept] = old[:kept]
        if size > kept:
            new[kept:] = _around_mean(old, size - kept) if from_mean else _initialised(model, module, name, size - kept)
        parameter.data, parameter.grad = new, None


def _around_mean(old: Tensor, count: int) -> Tensor:
    """Rows drawn about the mean of the old ones, which leaves what the model says of known tokens nearly as it was.

    Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """
    rows = old.float()
    mean = rows.mean(0)
    if rows.dim() == 1:
        return mean + torch.randn(count, device=old.device) * rows.std() * _SPREAD
    centred = rows - mean
    factor, failed = torch.linalg.cholesky_ex(_SPREAD * (centred.T @ centred / rows.shape[0]))
    if int(failed):  # fewer old rows than columns, or rows that depend on each other
        return mean.expand(count, -1)
    return mean + torch.randn(count, mean.shape[0], device=old.device) @ factor.T


def _initialised(model: CausalLM, module: Any, name: str, count: int) -> Tensor:
    """New rows as the architecture initialises them."""
    width = module.weight.shape[1]
    place: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    fresh = (
        nn.Embedding(count, width, **place)
        if isinstance(module, nn.Embedding)
        else nn.Linear(width, count, bias=module.bias is not None, **place)
    )
    model._init_weights(fresh)
    return getattr(fresh, name)
