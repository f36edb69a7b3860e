"""Files damaged at random, by hypothesis."""

from __future__ import annotations

import struct

from hypothesis import strategies as st


def damaged(content: bytes, data: st.DataObject, *more: str) -> bytearray:
    """A few bytes changed, inserted, removed or made another number; ``more``: "length", for numbers of 8 bytes."""
    raw = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        change = data.draw(st.sampled_from(("set", "flip", "insert", "remove", "number", *more)))
        if change == "set":
            raw[place] = data.draw(st.integers(0, 255))
        elif change == "flip":
            raw[place] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "insert":
            raw[place:place] = data.draw(st.binary(max_size=8))
        elif change == "number":
            raw[place : place + 4] = struct.pack("<I", data.draw(st.integers(0, 2**32 - 1)))
        elif change == "length":
            raw[place : place + 8] = struct.pack("<Q", data.draw(st.sampled_from((0, 1, 2**31, 2**63, 2**64 - 1))))
        else:
            del raw[place : place + data.draw(st.integers(1, 8))]
    return raw
