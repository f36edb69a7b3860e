"""The sides of the attention race: ours, and what else computes the same, each behind one signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import harness

harness.importable()

from loadstone import kernels  # noqa: E402

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Make = Callable[["Case", torch.device], Forward]


@dataclass(frozen=True)
class Case:
    """What is computed: "forward", "backward" or "decode" (one query a sequence over a cache of ``keys``)."""

    what: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool = True
    window: int | None = None

    @property
    def name(self) -> str:
        """As in "forward 4096, 16 heads of 128, causal"."""
        heads = f"{self.heads} heads of {self.head_dim}"
        if self.kv_heads != self.heads:
            heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        if self.what == "decode":
            return f"decode at {self.keys}, batch {self.batch}, {heads}"
        sees = "full" if not self.causal else "causal" if self.window is None else f"window {self.window}"
        return f"{self.what} {self.queries}, {heads}, {sees}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class NotApplicable(Exception):
    """A side that does not compute the case."""


def on_gpu() -> dict[str, Make]:
    """The sides there are on this machine, ours first."""
    sides: dict[str, Make] = {
        "loadstone": lambda case, _: _flash(case),
        "sdpa flash": lambda case, place: _sdpa(case, place, "FLASH_ATTENTION"),
        "sdpa cudnn": lambda case, place: _sdpa(case, place, "CUDNN_ATTENTION"),
        "sdpa efficient": lambda case, place: _sdpa(case, place, "EFFICIENT_ATTENTION"),
        "flex": _flex,
    }
    if util.find_spec("flash_attn") is not None:
        sides["flash-attn 2"] = lambda case, _: _flash_attn(case, "flash_attn")
    if util.find_spec("flash_attn_interface") is not None:
        sides["flash-attn 3"] = lambda case, _: _flash_attn(case, "flash_attn_interface")
    return sides


def missing() -> dict[str, str]:
    """Peers that are not installed."""
    wanted = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}
    return {name: f"{module} is not installed" for name, module in wanted.items() if util.find_spec(module) is None}


def on_cpu(case: Case) -> dict[str, Make]:
    """The sides on a CPU: our "sdpa", which is what models use there, and torch's called directly."""
    sides: dict[str, Make] = {
        "loadstone": lambda case, _: _by_name(case, "sdpa"),
        "sdpa": lambda case, _: _plain_sdpa(case),
    }
    if case.kv_heads != case.heads:
        sides["sdpa, keys repeated"] = lambda case, _: _repeated(case)
    if case.what != "decode":
        sides["eager"] = lambda case, _: _by_name(case, "eager")
    return sides


def _flash(case: Case) -> Forward:
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "kernels": kernels.Kernels("triton")}
    return lambda query, key, value: kernels.flash_attention(query, key, value, **options)


def _by_name(case: Case, name: str) -> Forward:
    mask = kernels.AttentionMask(
        case.queries, case.keys, query_start=case.keys - case.queries, causal=case.causal, window=case.window
    )
    scaling = case.head_dim**-0.5
    return lambda query, key, value: kernels.attention(name, query, key, value, mask, scaling=scaling)[0]


def _plain_sdpa(case: Case) -> Forward:
    options = {"is_causal": case.causal and case.queries > 1, "enable_gqa": case.kv_heads != case.heads}
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, **options)


def _repeated(case: Case) -> Forward:
    group, causal = case.heads // case.kv_heads, case.causal and case.queries > 1

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return forward


def _sdpa(case: Case, place: torch.device, backend: str) -> Forward:
    """One backend of torch's; keys are repeated in the call where it does not take grouped heads."""
    attention = import_module("torch.nn.attention")
    chosen = [getattr(attention.SDPBackend, backend)]
    options: dict[str, Any] = {"is_causal": case.causal and case.queries > 1}
    if case.window is not None:
        if backend != "EFFICIENT_ATTENTION":
            raise NotApplicable("takes no window")
        options = {"attn_mask": _window_mask(case, place)}
    group = case.heads // case.kv_heads
    grouped = group > 1 and backend != "EFFICIENT_ATTENTION"

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if group > 1 and not grouped:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        with attention.sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **options)

    return forward


def _window_mask(case: Case, place: torch.device) -> Tensor:
    places = torch.arange(case.keys - case.queries, case.keys, device=place)[:, None]
    keys = torch.arange(case.keys, device=place)
    assert case.window is not None
    return (keys <= places) & (keys > places - case.window)


def _flex(case: Case, place: torch.device) -> Forward:
    """Compiled for each case: shapes that vary would cost it speed."""
    flex = import_module("torch.nn.attention.flex_attention")
    import_module("torch._dynamo").reset()
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    first, window = case.keys - case.queries, case.window
    grouped = case.kv_heads != case.heads
    if not case.causal or case.queries == 1:
        return lambda query, key, value: compiled(query, key, value, enable_gqa=grouped)

    def visible(_: Any, __: Any, row: Tensor, column: Tensor) -> Tensor:
        seen = column <= row + first
        return seen if window is None else seen & (column > row + first - window)

    mask = flex.create_block_mask(visible, None, None, case.queries, case.keys, device=place)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask, enable_gqa=grouped)


def _flash_attn(case: Case, module: str) -> Forward:
    """Tri Dao's packages; they take (batch, seq, heads, head_dim)."""
    package = import_module(module)
    if case.what == "decode":

        def decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            given = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return _first(package.flash_attn_with_kvcache(*given, causal=True)).transpose(1, 2)

        return decode
    window = (-1, -1) if case.window is None else (case.window - 1, 0)

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return _first(package.flash_attn_func(*given, causal=case.causal, window_size=window)).transpose(1, 2)

    return forward


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
