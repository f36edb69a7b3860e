"""Codes, scales, state-dict entries and products the same to the byte as bitsandbytes' on a CPU.

    python tests/parity/test_bitsandbytes_codecs.py

writes the frozen vectors of tests/quant, from bitsandbytes alone.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script
import quant_weights
import tiny
from quant_weights import FLOATS, same_bytes

from loadstone.quant.codebooks import QUANT_TYPES, codebook, dynamic_map
from loadstone.quant.eight_bit import dequantize_rows, linear_int8, quantize_rows
from loadstone.quant.four_bit import dequantize_4bit, quantize_4bit
from loadstone.quant.quant_state import QuantState

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
functional = bitsandbytes.functional

VECTORS = Path(__file__).parents[1] / "quant" / "vectors"
# Where the peer's vector code takes the scale of the wrong block: a row that is not of whole blocks, but of sixteens.
# Its general code, taken for rows of an odd length and for blocks of 2048 and more, is right.


def decodes_right(shape: tuple[int, ...], blocksize: int) -> bool:
    return shape[-1] % blocksize == 0 or shape[-1] % 16 != 0 or blocksize >= 2048


def theirs_4bit(weight: Tensor, options: dict[str, Any], storage: torch.dtype = torch.uint8) -> tuple[Tensor, Any]:
    renamed = {"compress_statistics": options["double_quant"], "quant_storage": storage}
    kept = {name: value for name, value in options.items() if name != "double_quant"}
    return functional.quantize_4bit(weight, **kept, **renamed)


def test_tables() -> None:
    assert same_bytes(dynamic_map(), functional.create_dynamic_map())
    for quant_type in QUANT_TYPES:
        assert same_bytes(codebook(quant_type), functional.get_4bit_type(quant_type, device="cpu"))


@pytest.fixture(autouse=True, scope="module")
def _eager() -> Iterator[None]:
    """The peer compiles one of its decoders, for seconds."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@tiny.examples(150)
@given(weight=quant_weights.weights, options=quant_weights.options)
def test_four_bit_entries(weight: Tensor, options: dict[str, Any]) -> None:
    assume(not (options["double_quant"] and weight.abs().max() > 1e35))  # the mean of the scales may overflow
    packed, state = quantize_4bit(weight, **options)
    their_packed, their_state = theirs_4bit(weight, options)
    assert same_bytes(packed, their_packed)
    ours, theirs = state.to_tensors(), their_state.as_dict(packed=True)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert same_bytes(ours[name], tensor), name
    assert same_bytes(QuantState.from_tensors(theirs).scales(), state.scales())


@tiny.examples(60)
@given(weight=quant_weights.weights, options=quant_weights.options)
def test_four_bit_numbers(weight: Tensor, options: dict[str, Any]) -> None:
    assume(not (options["double_quant"] and weight.abs().max() > 1e35))
    packed, state = quantize_4bit(weight, **options)
    assume(decodes_right(tuple(weight.shape), state.blocksize))
    their_packed, their_state = theirs_4bit(weight, options)
    decoded = functional.dequantize_4bit(their_packed, their_state).view(weight.shape)
    ours = dequantize_4bit(packed, state)
    if weight.dtype == torch.bfloat16:  # the processor's conversion, one of the peer's ways, has no subnormal numbers
        least = torch.finfo(torch.bfloat16).smallest_normal
        ours, decoded = (numbers.where(numbers.abs() >= least, 0.0) for numbers in (ours, decoded))
    assert torch.equal(ours, decoded)  # not the sign of zeros, in which the peer's two ways differ


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", FLOATS)
def test_four_bit_storage(dtype: torch.dtype, storage: torch.dtype) -> None:
    weight = quant_weights.weight("normal", (40, 64), dtype)
    options = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
    packed, state = quantize_4bit(weight, **options, storage=storage)
    assert same_bytes(packed, theirs_4bit(weight, options, storage)[0])
    assert same_bytes(dequantize_4bit(packed, state), dequantize_4bit(*quantize_4bit(weight, **options)))


def test_many_blocks_in_several_chunks() -> None:
    weight = quant_weights.weight("normal", (1100, 513), torch.bfloat16)
    for quant_type in QUANT_TYPES:
        options = {"quant_type": quant_type, "blocksize": 64, "double_quant": True}
        packed, state = quantize_4bit(weight, **options)
        their_packed, their_state = theirs_4bit(weight, options)
        assert same_bytes(packed, their_packed)
        for name, tensor in their_state.as_dict(packed=True).items():
            assert same_bytes(state.to_tensors()[name], tensor), name


@tiny.examples(60)
@given(
    kind=st.sampled_from([kind for kind in quant_weights.KINDS if kind != "huge"]), shape=quant_weights.matrices,
    dtype=st.sampled_from(FLOATS), seed=st.integers(0, 1000),
)  # fmt: skip
def test_eight_bit_rows(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    weight = quant_weights.weight(kind, shape, dtype, seed)
    codes, scb = quantize_rows(weight)
    their_codes, their_scb, _ = functional.int8_vectorwise_quant(weight.to(torch.float16, copy=True))
    assert same_bytes(scb, their_scb)
    assert same_bytes(codes, their_codes)
    decoded = torch.ops.bitsandbytes.int8_vectorwise_dequant(their_codes, their_scb)
    assert same_bytes(dequantize_rows(codes, scb), decoded)


@tiny.examples(60)
@given(
    rows=st.integers(1, 20), shape=quant_weights.matrices, dtype=st.sampled_from(FLOATS), biased=st.booleans(),
    threshold=st.sampled_from((0.0, 3.0, 6.0)), scale=st.sampled_from((0.5, 2.0, 5.0)),
)  # fmt: skip
def test_eight_bit_product(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, biased: bool, threshold: float, scale: float
) -> None:
    assume(shape[1] > 1)  # torch._int_mm, which the peer calls, is wrong for one column
    weight = quant_weights.weight("normal", shape, dtype)
    x = quant_weights.weight("normal", (rows, shape[1]), dtype, 1) * scale
    bias = quant_weights.weight("normal", shape[:1], dtype, 2) if biased else None
    codes, scb = quantize_rows(weight)
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.is_training = codes, scb, threshold, False
    with torch.no_grad():
        expected = bitsandbytes.matmul(x.clone(), weight, bias=bias, state=state)
    ours = linear_int8(x, codes, scb, bias, threshold)
    assert ours.dtype == expected.dtype
    assert torch.equal(ours, expected)


def vectors() -> dict[str, list[dict[str, Any]]]:
    """What bitsandbytes makes of a few weights, for machines that lack it."""
    four, eight = [], []
    cases: list[tuple[str, tuple[int, ...], int]] = [
        ("normal", (7, 64), 64), ("bounds", (601,), 128), ("tiny", (5, 33), 32), ("spread", (300, 32), 32),
        ("zeros", (3, 150), 64), ("huge", (131,), 64),
    ]  # fmt: skip
    for number, (kind, shape, blocksize) in enumerate(cases):
        for quant_type in QUANT_TYPES:
            dtype = FLOATS[(number + (quant_type == "fp4")) % 3] if kind != "spread" else torch.bfloat16
            weight = quant_weights.weight(kind, shape, dtype)
            options = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": kind in ("normal", "spread")}
            packed, state = theirs_4bit(weight, options)
            entries = {name: quant_weights.to_json(tensor) for name, tensor in state.as_dict(packed=True).items()}
            four.append(
                {"weight": quant_weights.to_json(weight), "options": options, "packed": quant_weights.to_json(packed),
                 "entries": {name: entry for name, entry in entries.items() if "map" not in name}}
            )  # fmt: skip
    for kind, dtype in (("normal", torch.bfloat16), ("zeros", torch.float32), ("spread", torch.float16)):
        weight = quant_weights.weight(kind, (9, 70), dtype)
        codes, scb, _ = functional.int8_vectorwise_quant(weight.to(torch.float16, copy=True))
        made = {"weight": weight, "codes": codes, "scb": scb}
        eight.append({name: quant_weights.to_json(tensor) for name, tensor in made.items()})
    return {"four_bit": four, "eight_bit": eight}


def test_frozen_vectors_are_still_what_the_peer_makes() -> None:
    for name, made in vectors().items():
        assert json.loads((VECTORS / f"{name}.json").read_text()) == json.loads(json.dumps(made))


if __name__ == "__main__":
    for name, made in vectors().items():
        (VECTORS / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
