"""Rotary embeddings: what must hold for every type."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone.kernels import apply_rotary
from loadstone.models.rope import RotaryEmbedding, check_rope_parameters

DIM, LONGEST = 16, 32
TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16,
                 "factor": 2.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}  # fmt: skip
types = pytest.mark.parametrize("kind", sorted(TYPES))


def rotary(kind: str, **overrides: Any) -> RotaryEmbedding:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **TYPES[kind], **overrides}
    check_rope_parameters(parameters, DIM, LONGEST)
    return RotaryEmbedding(parameters, DIM, LONGEST)


def test_frequencies_are_the_papers() -> None:
    frequencies = rotary("default").inv_freq
    for pair in range(DIM // 2):
        assert float(frequencies[pair]) == pytest.approx(10000.0 ** (-2 * pair / DIM), rel=1e-6)
    assert torch.equal(rotary("linear").inv_freq, frequencies / 4)


@types
@tiny.examples(15)
@given(distance=st.integers(-10, 10), start=st.integers(10, 300))
def test_scores_depend_on_distance_alone(kind: str, distance: int, start: int) -> None:
    """The product of a rotated query and key is the same wherever the pair stands."""
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 1, 1, DIM, generator=generator)
    module = rotary(kind)

    def score(at: int) -> float:
        q_cos, q_sin = module(torch.tensor([[at]]), 400, torch.float32)
        k_cos, k_sin = module(torch.tensor([[at + distance]]), 400, torch.float32)
        turned_query, _ = apply_rotary(query, key, q_cos, q_sin)
        _, turned_key = apply_rotary(query, key, k_cos, k_sin)
        return float((turned_query * turned_key).sum())

    scale = float(query.norm() * key.norm()) * module.attention_scaling**2
    assert abs(score(start) - score(10)) <= 2e-4 * scale


@types
def test_rotation_keeps_lengths(kind: str) -> None:
    module = rotary(kind)
    query = torch.randn(2, 3, 7, DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = module(torch.arange(7)[None], 7, torch.float32)
    assert cos.shape == sin.shape == (1, 1, 7, DIM)
    turned, _ = apply_rotary(query, query[:, :1], cos, sin)
    assert torch.allclose(turned.norm(dim=-1), query.norm(dim=-1) * module.attention_scaling, rtol=1e-5)
    assert torch.allclose(turned[:, :, 0], query[:, :, 0] * module.attention_scaling)  # position 0 turns nothing


@types
def test_no_state_is_kept(kind: str) -> None:
    """A long input leaves no trace in a short one."""
    module = rotary(kind)
    short = torch.arange(5)[None]
    first = module(short, 5, torch.float32)
    module(torch.arange(200)[None], 200, torch.float32)
    again = module(short, 5, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_types_that_follow_the_length(kind: str) -> None:
    module = rotary(kind)
    short, long = module(torch.tensor([[3]]), 10, torch.float32), module(torch.tensor([[3]]), 100, torch.float32)
    assert not torch.allclose(short[0], long[0])
    positions = torch.tensor([[3, 99]])
    from_positions, from_length = module(positions, None, torch.float32), module(positions, 100, torch.float32)
    assert torch.equal(from_positions[0], from_length[0])


@types
@tiny.examples(20)
@given(length=st.integers(1, 80))
def test_a_length_on_the_device_is_the_same_length(kind: str, length: int) -> None:
    """Also to compilers and CUDA graphs: nothing is brought to the host."""
    module = rotary(kind)
    positions = torch.tensor([[length - 1]])
    expected = module(positions, length, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "__int__", "__float__", "__bool__", "__index__", "tolist", "cpu"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the length was brought to the host"))
        got = module(positions, torch.tensor(length), torch.float32)
        alone = module(positions, None, torch.float32)
    for one, two, three in zip(expected, got, alone, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-5)


def test_llama3_bands() -> None:
    """Long waves are slowed by the factor, short ones left alone, those between lie between."""
    plain, scaled = rotary("default").inv_freq, rotary("llama3").inv_freq
    wavelength = 2 * math.pi / plain
    long_wave, short_wave = wavelength > LONGEST / 1.0, wavelength < LONGEST / 4.0
    assert torch.allclose(scaled[long_wave], plain[long_wave] / 4)
    assert torch.equal(scaled[short_wave], plain[short_wave])
    assert (scaled <= plain).all()
    assert (scaled >= plain / 4 * (1 - 1e-6)).all()
    assert (scaled[:-1] >= scaled[1:]).all()


def test_yarn_lies_between() -> None:
    plain, scaled = rotary("default").inv_freq, rotary("yarn").inv_freq
    assert (scaled <= plain * (1 + 1e-6)).all()
    assert (scaled >= plain / 4 * (1 - 1e-6)).all()
    assert rotary("yarn").attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
    assert rotary("yarn", attention_factor=0.5).attention_scaling == 0.5


@types
def test_fp32_whatever_it_is_cast_to(kind: str) -> None:
    module = rotary(kind)
    before = module.inv_freq.clone()
    if kind == "longrope":
        assert torch.equal(module.long_inv_freq, module.inv_freq / 2)
    for cast in (lambda: module.to(torch.bfloat16), module.half, module.double, lambda: module.to("cpu")):
        cast()
        assert module.inv_freq.dtype == torch.float32
        assert torch.equal(module.inv_freq, before)
        assert all(buffer.dtype == torch.float32 for buffer in module.buffers())
    cos, _ = module(torch.tensor([[40000]]), 40001, torch.bfloat16)
    exact, _ = module(torch.tensor([[40000]]), 40001, torch.float32)
    assert cos.dtype == torch.bfloat16
    assert torch.equal(cos, exact.bfloat16())  # angles in fp32, rounded once
    assert not module.state_dict()


@types
def test_from_meta(kind: str) -> None:
    reference = rotary(kind)
    with torch.device("meta"):
        module = rotary(kind)
    assert module.inv_freq.is_meta
    module.reset_buffers(torch.device("cpu"))
    for name, buffer in reference.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer)
    assert module.attention_scaling == reference.attention_scaling
