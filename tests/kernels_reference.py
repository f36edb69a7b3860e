"""Attention by its definition in float64, and in the precision of its inputs as plain torch computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loadstone.kernels import philox


def visible(queries: int, keys: int, options: dict[str, Any]) -> Tensor:
    """(batch or 1, queries, keys), bool, from the options of `flash_attention`."""
    start = options.get("query_start")
    place = torch.arange(queries)[:, None] + (keys - queries if start is None else int(start))
    key = torch.arange(keys)
    seen = torch.ones(1, queries, keys, dtype=torch.bool)
    if options.get("causal"):
        seen = seen & (key <= place)
    if options.get("window"):
        seen = seen & (key > place - options["window"])
    if options.get("key_start") is not None:
        seen = seen & (key >= options["key_start"].cpu()[:, None, None])
    if options.get("key_end") is not None:
        seen = seen & (key < options["key_end"].cpu()[:, None, None])
    return seen


def attend(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], wide: bool) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp). wide: all in float64; else matmuls in the inputs' dtype and the softmax in float32."""
    batch, heads, queries, head_dim = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    if wide:
        query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = options.get("scaling") or head_dim**-0.5
    scores = (query @ key.transpose(2, 3)) * scale
    scores = scores if wide else scores.float()
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    seen = visible(queries, keys, options).to(query.device)[:, None]
    nothing = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & ~nothing, float("-inf"))
    weights = scores.softmax(-1).masked_fill(nothing, 0.0)
    lse = scores.logsumexp(-1).masked_fill(nothing[..., 0], float("-inf"))
    if options.get("dropout"):
        kept = philox.kept(options["seed"], options["dropout"], batch, heads, queries, keys)
        weights = weights * kept / (1 - options["dropout"])
    return weights.to(value.dtype) @ value, lse


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where one is not finite and the other is."""
    a, b = a.double().cpu(), b.double().cpu()
    if a.numel() == 0:
        return 0.0
    return float(torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(float("inf")).max())
