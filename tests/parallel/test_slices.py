"""Each rank's part of a tensor: the parts make the whole, and only their bytes are read."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loadstone.loading.checkpoint import open_checkpoint
from loadstone.loading.files import Files
from loadstone.loading.parallel_slices import Cut, chunk, part_of, region
from loadstone.loading.reading import Reader
from loadstone.loading.source import resolve_source


def layout(fsdp: int, tp: int, rank: int) -> Any:
    return SimpleNamespace(
        fsdp=None if fsdp == 1 else object(), fsdp_size=fsdp, fsdp_rank=rank // tp, tp_size=tp, tp_rank=rank % tp
    )


@st.composite
def cuttings(draw: Any) -> tuple[tuple[int, ...], Cut | None, int, int]:
    """A shape, a cut that divides it, and the sizes of a mesh."""
    tp, fsdp = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    cut = None
    if tp > 1:
        cut = Cut(draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 3)))
        shape[cut.dim] *= tp * cut.parts
    return tuple(shape), cut, fsdp, tp


@tiny.examples(60)
@given(case=cuttings(), mapped=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_parts_are_what_slicing_the_whole_gives(
    case: Any, mapped: bool, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, cut, fsdp, tp = case
    whole = torch.arange(math.prod(shape)).view(shape).to(dtype)
    place = tmp_path_factory.mktemp("parts")
    save_file({"first": torch.zeros(3), "weight": whole}, place / "model.safetensors")
    checkpoint = open_checkpoint(resolve_source(place))
    viewed = shape if cut is None else cut.viewed(shape)
    times = torch.zeros(viewed)
    with Files(checkpoint, mapped=mapped) as files:
        for rank in range(fsdp * tp):
            bounds = region(shape, cut, layout(fsdp, tp, rank))
            index = tuple(slice(*bound) for bound in bounds)
            times[index] += 1
            part = part_of(checkpoint.entries["weight"], viewed, bounds)
            expected = whole.view(viewed)[index]
            assert part.shape == expected.shape
            assert part.nbytes == expected.nbytes
            found = files.flat(part, 0, expected.numel())
            assert torch.equal(found, expected.reshape(-1))
            middle = expected.numel() // 2
            assert torch.equal(files.flat(part, middle // 2, middle), expected.reshape(-1)[middle // 2 : middle])
    assert bool((times == 1).all())


@given(size=st.integers(0, 50), count=st.integers(1, 9))
def test_chunks_are_those_of_torch(size: int, count: int) -> None:
    pieces = torch.arange(size).chunk(count) if size else ()
    ours = [chunk(size, count, index) for index in range(count)]
    assert [list(range(*bounds)) for bounds in ours if bounds[0] < bounds[1]] == [piece.tolist() for piece in pieces]


@pytest.mark.parametrize(("width", "exact"), [(1 << 12, True), (1 << 9, False)])
def test_columns_are_read_one_by_one_where_that_is_cheaper(
    width: int, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are a range of the file and read exactly; so are columns, if what lies between them is worth skipping."""
    save_file({"weight": torch.randn(64, width)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(resolve_source(tmp_path))
    entry, read = checkpoint.entries["weight"], []
    into = Reader.into
    monkeypatch.setattr(
        Reader, "into", lambda self, target, *place: (read.append(target.nbytes), into(self, target, *place))[1]
    )
    with Files(checkpoint, mapped=False) as files:
        for dim in (0, 1):
            read.clear()
            part = part_of(entry, entry.shape, region(entry.shape, Cut(dim), layout(1, 4, 2)))
            files.flat(part, 0, math.prod(part.shape))
            assert part.nbytes == entry.nbytes // 4
            assert (sum(read) == part.nbytes) is (exact or dim == 0)
            assert sum(read) <= entry.nbytes
