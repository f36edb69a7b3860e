"""Reads the data in a pickle of tensors without the means to run anything.

A pickle is a program for a small stack machine. Python's own machine can import and call; this one has no instruction
that does. A name in a pickle stays a name (`Named`), a call of one of the few functions that torch.save uses becomes a
record of what it was given (`Call`), and any other name ends the reading. It works in one pass over the bytes, without
jumps, so a file costs no more than its length.
Source of the instructions: Python's pickletools; of what torch.save writes: torch.serialization.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import FormatError, UnsafeFormatError

_LONGEST_NAME = 1024
_MOST_LONG = 64  # bytes of an integer; torch's magic number has ten
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Named(NamedTuple):
    """A module's attribute, by name only."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call(NamedTuple):
    """What a pickle would call, and with what: nothing was called."""

    function: Named
    arguments: tuple[Any, ...]


class Pickle(NamedTuple):
    """The value of one pickle and the position after it."""

    value: Any
    end: int


class CutOff(FormatError):
    """The bytes end before the pickle does."""


def read_pickle(
    data: bytes,
    where: str,
    *,
    allowed: Callable[[Named], bool] = lambda name: False,
    outside: Callable[[Any], Any] = lambda reference: None,
    begin: int = 0,
) -> Pickle:
    """The value of the pickle at ``begin``: None, booleans, numbers, text, lists, tuples, dictionaries with simple
    keys, `Named` and `Call`, and what ``outside`` returns for a reference to something outside the pickle.

    where: the file, for messages. Raises UnsafeFormatError for a name that is not ``allowed`` or an instruction that
    torch.save does not use, CutOff if the bytes end too early, and FormatError for bytes that are no pickle.
    """
    machine = _Machine(data, where, allowed, outside, begin)
    try:
        return Pickle(machine.run(), machine.position)
    except (IndexError, struct.error, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{where}: malformed pickle at byte {machine.position} ({type(error).__name__}: {error})"
        ) from error


_MARK = object()


class _Machine:
    """``stack`` of values, ``memo`` of those that are used again."""

    def __init__(
        self,
        data: bytes,
        where: str,
        allowed: Callable[[Named], bool],
        outside: Callable[[Any], Any],
        begin: int,
    ) -> None:
        self.data, self.where, self.allowed, self.outside, self.position = data, where, allowed, outside, begin
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                value = self.stack.pop()
                if self.stack or value is _MARK:
                    raise FormatError(f"{self.where}: a pickle that leaves more than one value behind")
                return value
            step = _STEPS.get(code)
            if step is None:
                raise UnsafeFormatError(
                    f"{self.where}: the pickle holds the instruction {chr(code)!r} (byte {self.position - 1}), which "
                    "tensors do not need and which is not carried out; nothing was run. Is this a file of weights?"
                )
            step(self)

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0:
            raise FormatError(f"{self.where}: a negative length in the pickle at byte {self.position}")
        if end > len(self.data):
            raise CutOff(f"{self.where}: the pickle is cut off at byte {len(self.data)}; fetch the file again")
        part = self.data[self.position : end]
        self.position = end
        return part

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _LONGEST_NAME)
        if end < 0:
            kind = CutOff if len(self.data) - self.position < _LONGEST_NAME else FormatError
            raise kind(f"{self.where}: a name in the pickle at byte {self.position} does not end")
        text = str(self.data[self.position : end], "utf-8")
        self.position = end + 1
        return text

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self, length: int, encoding: str = "utf-8") -> None:
        self.stack.append(str(self.take(length), encoding))

    def named(self, module: str, name: str) -> None:
        found = Named(_MODULES.get(module, module), name)
        if not self.allowed(found):
            raise UnsafeFormatError(
                f"{self.where}: the pickle wants {found}, which is no part of plain tensors and could run code; it was "
                "not imported and nothing was run. Read such a file only where you trust who made it, and save its "
                "state_dict() alone"
            )
        self.stack.append(found)

    def since_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise FormatError(f"{self.where}: malformed pickle at byte {self.position}: no mark")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise FormatError(f"{self.where}: malformed pickle at byte {self.position}: a mark in place of a value")
        return value

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise FormatError(f"{self.where}: the pickle appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise FormatError(f"{self.where}: the pickle sets an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (key is None or type(key) in (str, int, float, bool)):
                raise FormatError(f"{self.where}: a dictionary in the pickle has a key of type {type(key).__name__}")
            target[key] = value

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Named or type(arguments) is not tuple:
            raise UnsafeFormatError(f"{self.where}: the pickle calls what is no function; nothing was run")
        self.stack.append(_plain(function, arguments))

    def build(self) -> None:
        """The state of an object: torch keeps nothing there that weights need."""
        self.pop()
        if type(self.stack[-1]) not in (dict, Call):
            raise UnsafeFormatError(f"{self.where}: the pickle gives a state to a {type(self.stack[-1]).__name__}")

    def long(self, length: int) -> None:
        if not 0 <= length <= _MOST_LONG:
            raise FormatError(f"{self.where}: an integer of {length} bytes in the pickle")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))


def _plain(function: Named, arguments: tuple[Any, ...]) -> Any:
    """Containers and their like as themselves, all else as a record."""
    if function == ("collections", "OrderedDict"):
        pairs = arguments[0] if len(arguments) == 1 else []  # Python 2 gives them here, Python 3 sets them afterwards
        if type(pairs) is list and all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            return {key: value for key, value in pairs if type(key) is str}
    if function == ("torch", "Size") and len(arguments) == 1 and type(arguments[0]) in (tuple, list):
        return tuple(arguments[0])
    return Call(function, arguments)


def _pop_mark(machine: _Machine) -> None:
    machine.since_mark()


_STEPS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    ord("("): lambda m: m.stack.append(_MARK),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): _pop_mark,
    ord("2"): lambda m: m.stack.append(m.stack[-1]),
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("J"): lambda m: m.stack.append(m.number("<i")),
    ord("K"): lambda m: m.stack.append(m.number("<B")),
    ord("M"): lambda m: m.stack.append(m.number("<H")),
    0x8A: lambda m: m.long(m.number("<B")),
    0x8B: lambda m: m.long(m.number("<i")),
    ord("G"): lambda m: m.stack.append(m.number(">d")),
    ord("X"): lambda m: m.text(m.number("<I")),
    0x8C: lambda m: m.text(m.number("<B")),
    0x8D: lambda m: m.text(m.number("<Q")),
    ord("U"): lambda m: m.text(m.number("<B"), "latin1"),
    ord("T"): lambda m: m.text(m.number("<i"), "latin1"),
    ord("]"): lambda m: m.stack.append([]),
    ord("}"): lambda m: m.stack.append({}),
    ord(")"): lambda m: m.stack.append(()),
    ord("t"): lambda m: m.stack.append(tuple(m.since_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("a"): lambda m: m.extend([m.pop()]),
    ord("e"): lambda m: m.extend(m.since_mark()),
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    ord("q"): lambda m: m.put(m.number("<B")),
    ord("r"): lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.stack.append(m.memo[m.number("<B")]),
    ord("j"): lambda m: m.stack.append(m.memo[m.number("<I")]),
    ord("c"): lambda m: m.named(m.line(), m.line()),
    0x93: lambda m: m.named(*_two_texts(m)),
    ord("R"): lambda m: m.reduce(),
    ord("b"): lambda m: m.build(),
    ord("Q"): lambda m: m.stack.append(m.outside(m.pop())),
}


def _two_texts(machine: _Machine) -> tuple[str, str]:
    name, module = machine.pop(), machine.pop()
    if type(name) is not str or type(module) is not str:
        raise FormatError(f"{machine.where}: malformed pickle at byte {machine.position}: a name that is no text")
    return module, name
