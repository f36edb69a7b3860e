"""NF4 and FP4: frozen vectors of bitsandbytes, what holds for every tensor, and states that files may not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quant_weights
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_weights import FLOATS, same_bytes
from torch import Tensor

from loadstone.errors import FormatError, QuantizationError
from loadstone.quant import four_bit
from loadstone.quant.codebooks import QUANT_TYPES, boundaries, codebook
from loadstone.quant.four_bit import dequantize_4bit, quantize_4bit
from loadstone.quant.quant_state import QuantState

VECTORS = json.loads((Path(__file__).parent / "vectors" / "four_bit.json").read_text())
JSON = "quant_state.bitsandbytes__nf4"
tensors = quant_weights.weights.filter(lambda weight: bool(weight.abs().max() < 1e35))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['options']['quant_type']}-{v['weight']['dtype']}")
def test_frozen_vectors(vector: dict[str, Any]) -> None:
    packed, state = quantize_4bit(quant_weights.from_json(vector["weight"]), **vector["options"])
    assert same_bytes(packed, quant_weights.from_json(vector["packed"]))
    entries = state.to_tensors()
    for name, entry in vector["entries"].items():
        assert same_bytes(entries[name], quant_weights.from_json(entry)), name


@tiny.examples(60)
@given(weight=tensors, options=quant_weights.options)
def test_every_number_gets_the_nearest_code(weight: Tensor, options: dict[str, Any]) -> None:
    packed, state = quantize_4bit(weight, **{**options, "double_quant": False})
    flat = weight.reshape(-1).double()
    scales = state.absmax.double().repeat_interleave(state.blocksize)[: flat.numel()]
    off = (flat - dequantize_4bit(packed, state, torch.float32).reshape(-1).double()).abs()
    numbers = codebook(options["quant_type"]).double()
    best = (flat.unsqueeze(1) - numbers * scales.unsqueeze(1)).abs().amin(1)
    large = scales >= 1e-38  # a smaller scale divides by this, as the peer does, and its codes mean less
    assert bool((off <= best + 3e-7 * scales + 1e-44)[large].all())


@tiny.examples(60)
@given(weight=tensors, options=quant_weights.options)
def test_quantizing_what_was_decoded_gives_the_same_codes(weight: Tensor, options: dict[str, Any]) -> None:
    """In fp32, with exact scales, where no scale is so small that it has few bits."""
    weight = weight.where(weight.abs() > 1e-30, 0.0)
    options = {**options, "double_quant": False}
    packed, state = quantize_4bit(weight, **options)
    decoded = dequantize_4bit(packed, state, torch.float32)
    again, other = quantize_4bit(decoded, **options)
    assert same_bytes(dequantize_4bit(again, other), decoded)
    if options["quant_type"] == "nf4":  # FP4 has a code for zero just below it and one for just above
        assert same_bytes(again, packed)


@tiny.examples(60)
@given(weight=tensors, options=quant_weights.options)
def test_a_state_survives_its_entries(weight: Tensor, options: dict[str, Any]) -> None:
    packed, state = quantize_4bit(weight, **options)
    entries = state.to_tensors()
    back = QuantState.from_tensors(entries)
    assert (back.shape, back.dtype, back.blocksize, back.quant_type) == (
        tuple(weight.shape), weight.dtype, options["blocksize"], options["quant_type"],
    )  # fmt: skip
    assert all(same_bytes(tensor, entries[name]) for name, tensor in back.to_tensors().items())
    assert same_bytes(dequantize_4bit(packed, back), dequantize_4bit(packed, state))
    assert dequantize_4bit(packed, back).shape == weight.shape
    assert packed.nbytes == state.packed_bytes
    assert state.to("cpu").nbytes == sum(tensor.nbytes for name, tensor in entries.items() if "state" not in name)


@tiny.examples(30)
@given(weight=tensors, options=quant_weights.options, chunk=st.sampled_from((4096, 8192)))
def test_chunks_do_not_show(weight: Tensor, options: dict[str, Any], chunk: int) -> None:
    expected = quantize_4bit(weight, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(four_bit, "_CHUNK", chunk)
        found = quantize_4bit(weight, **options)
    assert same_bytes(found[0], expected[0])
    assert same_bytes(found[1].absmax, expected[1].absmax)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_table_is_the_search(quant_type: str) -> None:
    """On every bf16 number, and on fp32 numbers around each bound and the edge of each cell that holds one."""
    bounds, _ = boundaries(quant_type)
    edges = ((bounds.double().mul(32767).floor().unsqueeze(1) + torch.arange(-2, 4)) / 32767).float().view(-1)
    places = torch.cat((bounds, edges))
    near = torch.cat([places.view(torch.int32) + off for off in range(-300, 301)]).view(torch.float32)
    near = torch.cat((near, -near, torch.arange(-32768, 32768).to(torch.int16).view(torch.bfloat16).float()))
    near = near[near.abs() <= 1]
    near = torch.cat((near, near.new_ones(-near.numel() % 64))).view(-1, 64)
    factors = torch.ones(near.shape[0])
    found = four_bit._Table(quant_type, near.numel())(near, factors)
    assert torch.equal(found, four_bit._Search(quant_type, near.device)(near, factors))


def test_memory_is_bounded_by_a_chunk() -> None:
    weight = torch.ones(64, 1 << 14, dtype=torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as profile:
        quantize_4bit(weight)
    most = max((event.self_cpu_memory_usage for event in profile.events()), default=0)
    assert most <= 4 * four_bit._CHUNK


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 64, 129])
def test_refuses_what_has_no_code(bad: float, place: int, dtype: torch.dtype) -> None:
    weight = torch.ones(130, dtype=dtype)
    weight[place] = bad
    with pytest.raises(QuantizationError, match="infinities or NaN"):
        quantize_4bit(weight)


def test_refuses_scales_whose_mean_overflows() -> None:
    weight = torch.full((256,), 3e38)
    assert bool(dequantize_4bit(*quantize_4bit(weight)).isfinite().all())
    with pytest.raises(QuantizationError, match="without double_quant"):
        quantize_4bit(weight, double_quant=True)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(64), {"quant_type": "int4"}, "unknown 4-bit type 'int4'"),
        (torch.ones(64), {"blocksize": 0}, "blocksize of 0"),
        (torch.ones(64), {"blocksize": 48}, "blocksize of 48"),
        (torch.ones(64), {"storage": torch.int64}, "cannot store"),
        (torch.ones(66), {"storage": torch.bfloat16}, "33 packed bytes"),
        (torch.ones(64, dtype=torch.float64), {}, "float64"),
        (torch.ones(64, dtype=torch.int8), {}, "int8"),
        (torch.ones(0), {}, "not empty"),
    ],
)
def test_refuses_what_it_cannot_do(weight: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_4bit(weight, **options)


def test_refuses_packed_bytes_of_another_shape() -> None:
    packed, state = quantize_4bit(torch.ones(4, 64))
    for wrong in (packed[:-1], packed.float()):
        with pytest.raises(QuantizationError, match="has 128 packed bytes"):
            dequantize_4bit(wrong, state)


def written(**changes: Any) -> dict[str, Tensor]:
    """The entries of a small nested state, with changes to its JSON (None takes a key out)."""
    entries = quantize_4bit(torch.ones(3, 64), double_quant=True)[1].to_tensors()
    facts = {**json.loads(bytes(entries[JSON].tolist())), **changes}
    text = json.dumps({key: value for key, value in facts.items() if value is not None})
    return {**entries, JSON: torch.tensor(list(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocksize": 0}, "blocksize is 0"),
        ({"blocksize": -64}, "blocksize is -64"),
        ({"blocksize": 128}, "absmax has shape"),
        ({"blocksize": 64.0}, "blocksize is '64.0', not a int"),
        ({"blocksize": True}, "not a int"),
        ({"dtype": "__class__"}, "dtype is '__class__'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"dtype": None}, "dtype is 'None'"),
        ({"quant_type": "fp4"}, "quant_type 'fp4'"),
        ({"shape": None}, "shape is None"),
        ({"shape": []}, "not a list of positive sizes"),
        ({"shape": [3, -64]}, "not a list of positive sizes"),
        ({"shape": [3, "64"]}, "not a list of positive sizes"),
        ({"shape": [1 << 40, 1 << 40]}, "more numbers than there can be"),
        ({"shape": [3, 65]}, "absmax has shape"),
        ({"nested_blocksize": 0}, "nested_blocksize is 0"),
        ({"nested_blocksize": 2}, "nested_absmax has shape"),
        ({"nested_blocksize": None}, "nested_blocksize is 'None'"),
        ({"nested_dtype": "float16"}, "nested_dtype is 'float16'"),
        ({"nested_offset": "1"}, "nested_offset is '1'"),
        ({"nested_offset": float("nan")}, "nested_offset is nan"),
        ({"nested_offset": 1e300}, "nested_offset is inf"),
    ],
)
def test_refuses_facts_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        QuantState.from_tensors(written(**changes), name="model.q_proj.weight")
    assert "'model.q_proj.weight'" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({JSON: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "a JSON list"),
        ({JSON: torch.tensor(list(b"{"), dtype=torch.uint8)}, "not JSON"),
        ({JSON: torch.tensor(list(b"[" * 60000), dtype=torch.uint8)}, "not JSON"),
        ({JSON: torch.tensor([255, 254], dtype=torch.uint8)}, "not JSON"),
        ({JSON: torch.zeros(0, dtype=torch.uint8)}, "not bytes of JSON"),
        ({JSON: torch.zeros(1 << 17, dtype=torch.uint8)}, "not bytes of JSON"),
        ({JSON: torch.zeros(8)}, "not bytes of JSON"),
        ({JSON: None}, "it has none"),
        ({"quant_state.bitsandbytes__fp4": torch.zeros(2, dtype=torch.uint8)}, "it needs one of"),
        ({"absmax": None}, "absmax is missing"),
        ({"absmax": torch.zeros(3)}, "absmax has shape"),
        ({"absmax": torch.zeros(3, 1, dtype=torch.uint8)}, "absmax has shape"),
        ({"quant_map": codebook("fp4")}, "not that of nf4"),
        ({"quant_map": torch.zeros(15)}, "quant_map has shape"),
        ({"nested_absmax": None}, "nested_absmax is missing"),
        ({"nested_absmax": torch.tensor([float("nan")])}, "infinities or NaN"),
        ({"nested_quant_map": torch.full((256,), float("inf"))}, "infinities or NaN"),
    ],
)
def test_refuses_tensors_that_cannot_be(changes: dict[str, Tensor | None], message: str) -> None:
    entries = {name: tensor for name, tensor in {**written(), **changes}.items() if tensor is not None}
    with pytest.raises(FormatError, match=message):
        QuantState.from_tensors(entries)


def test_scales_of_a_plain_state_must_be_finite() -> None:
    entries = quantize_4bit(torch.ones(3, 64))[1].to_tensors()
    with pytest.raises(FormatError, match="absmax holds infinities or NaN"):
        QuantState.from_tensors({**entries, "absmax": torch.tensor([1.0, float("inf"), 1.0])})
