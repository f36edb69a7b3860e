"""Registered memory: the same values, and registered exactly as long as it is there. CUDA is not needed to see that."""

from __future__ import annotations

import gc
import mmap

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone.loading import pinned as module

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Address to size of what is registered now."""
    now: dict[int, int] = {}

    def register(address: int, size: int) -> bool:
        assert address % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
        assert all(address + size <= other or other + now[other] <= address for other in now)
        now[address] = size
        return True

    monkeypatch.setattr(module, "register", register)
    monkeypatch.setattr(module, "unregister", lambda address, device: now.pop(address))
    monkeypatch.setattr(module, "REGION", 1 << 14)
    return now


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float64]),
    transposed=st.booleans(),
)
@tiny.examples(40)
def test_copies_are_equal_and_go_with_their_memory(
    registered: dict[int, int], shapes: list[list[int]], dtype: torch.dtype, transposed: bool
) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors = [tensor.transpose(0, -1) if transposed and tensor.dim() > 1 else tensor for tensor in tensors]
    found = dict(module.pinned(iter(tensors), DEVICE))
    assert list(found) == list(range(len(tensors)))
    for number, tensor in enumerate(tensors):
        copy = found[number]
        assert torch.equal(copy, tensor)
        assert copy.dtype == tensor.dtype
        assert copy.is_contiguous()
        assert copy.untyped_storage().nbytes() == tensor.nbytes  # one that is saved does not save its neighbours
        if tensor.nbytes:
            at = copy.data_ptr()
            assert at % 64 == 0
            assert any(start <= at and at + copy.nbytes <= start + size for start, size in registered.items())
    need = sum(-(-tensor.nbytes // 64) * 64 for tensor in tensors)
    assert sum(registered.values()) <= need + mmap.PAGESIZE * max(len(registered), 1)
    copy = None
    found.clear()
    gc.collect()
    assert not registered


def test_where_cuda_registers_no_more_memory(registered: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "register", lambda address, size: False)
    ((_, copy),) = module.pinned([torch.arange(5.0)], DEVICE)
    assert copy.tolist() == [0, 1, 2, 3, 4]
    del copy
    gc.collect()
    assert not registered
