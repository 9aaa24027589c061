"""Pickles of a known kind, read without running them.

A pickle is a program for a machine with a stack: it names functions, and Python's reader calls them. The machine here
calls nothing that a pickle names. :class:`Admitted` is the table of one kind of pickle: its instructions, its limits,
and what its names and calls become. Verification sets have one in
:mod:`fused_arcface.app.data.formats.pickle_reader`, checkpoints of format 1 in
:mod:`fused_arcface.checkpoint.version1`.

``Lib/pickletools.py`` of https://github.com/python/cpython describes every instruction.
"""

from __future__ import annotations

import codecs
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

_MOST_DIGITS = 20
_MOST_IN_KEY = 64
"""Values within a key; a key in a checkpoint is a name, a number or a pair of them."""
_MOST_WIDE = 1 << 16
"""Bytes of a text with characters beyond Latin-1: each of its characters takes up to four bytes of memory."""
_WIDE = re.compile(rb"[\xc4-\xff]")
_WIDE_ESCAPE = re.compile(rb"\\u(?!00)|\\U(?!000000)")


class Refused(Exception):
    """The pickle uses something that files of its kind do not need."""


class Damaged(Exception):
    """The bytes are not a pickle, or the pickle ends early or contradicts itself."""


@dataclass(frozen=True)
class Name:
    """The name of a function or class, as the pickle has it; never looked up."""

    module: str
    name: str


@dataclass(frozen=True)
class Admitted:
    """The table of one kind of pickle. Its functions raise :class:`Refused` or :class:`Damaged`."""

    kind: str
    """The kind of file, for messages: ``"verification set"``."""
    instructions: frozenset[bytes]
    name: Callable[[Name], Any]
    """Return the value of a name on the stack."""
    call: Callable[[Any, tuple[Any, ...]], Any]
    """Return the value of a call, given the value of its function and the arguments."""
    build: Callable[[Any, Any], None]
    """Set the state, the second argument, of a value."""
    persistent: Callable[[Any], Any]
    """Return the value of a reference to something outside of the pickle."""
    most_instructions: int
    most_objects: int
    """Number of lists, tuples, dicts, sets, calls and remembered values: each takes 50 to 300 bytes of memory, for one
    byte in the file."""
    most_int_bytes: int
    """Length of an integer."""
    room: int
    """Bytes of memory that all values together may take beyond the pickle's own size."""


def read_pickle(file: BinaryIO, size: int, admitted: Admitted) -> Any:
    """Return the content of a pickle of ``size`` bytes, as ``admitted`` makes it.

    Raises:
        Refused: if it uses an instruction or a name that is not admitted, or goes beyond the limits. Nothing of it is
            executed.
        Damaged: if it is not a pickle, is cut short, or contradicts itself.
    """
    machine = _Machine(file, size, admitted)
    try:
        return machine.run()
    except IndexError:
        raise Damaged("a value or a mark is missing") from None
    except (KeyError, TypeError, ValueError) as error:  # nothing was remembered there, a key that is a list
        raise Damaged(f"{str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


class _Machine:
    def __init__(self, file: BinaryIO, size: int, admitted: Admitted) -> None:
        self._file, self._left, self._admitted = file, size, admitted
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # for each open mark the values before it
        self._memo: dict[int, Any] = {}
        self._objects = 0
        self._room = size + admitted.room
        self._started = False

    def run(self) -> Any:
        admitted = self._admitted
        for _ in range(admitted.most_instructions):
            code = self._take(1)
            if code == b".":
                count = len(self._stack) + sum(len(each) + 1 for each in self._below)
                if count != 1:
                    raise Damaged(f"it ends with {count} values, not with one")
                return self._stack[0]
            if code not in admitted.instructions:
                if self._started:
                    raise Refused(f"it uses the instruction {code!r}, which no {admitted.kind} needs")
                raise Damaged(f"it begins with {code!r}")
            _INSTRUCTIONS[code](self)
            self._started = True
        raise Refused(f"it has more than {admitted.most_instructions} instructions")

    # Reading from the file.

    def _take(self, length: int) -> bytes:
        if length > self._left:
            raise Damaged(f"it ends {length - self._left} byte(s) early")
        self._left -= length
        found = self._file.read(length)
        if len(found) != length:
            raise Damaged("it became shorter while it was read")
        return found

    def _number(self, format: str) -> Any:
        return struct.unpack(format, self._take(struct.calcsize(format)))[0]

    def _line(self) -> bytes:
        found = self._file.readline(self._left)
        self._left -= len(found)
        if not found.endswith(b"\n"):
            raise Damaged("it ends within a line")
        return found[:-1]

    def _decimal(self, line: bytes) -> int:
        if not re.fullmatch(rb"-?[0-9]{1,%d}" % _MOST_DIGITS, line):
            raise Damaged(f"{line[:_MOST_DIGITS]!r} is not a number")
        return int(line)

    # Instructions. Each pops what it needs from the stack and pushes its result.

    def _push(self, value: Any) -> None:
        """Push a value that was made just now."""
        self._pay(value)
        self._stack.append(value)

    def _pay(self, value: Any) -> None:
        """Take the memory of a value from the room that is left."""
        self._room -= sys.getsizeof(value) + 24  # and its place in a list, which is copied while it grows
        if self._room < 0:
            raise Refused(f"its values take {self._admitted.room >> 20} MiB more than the pickle itself")

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []
        self._pay(self._stack)

    def _recall(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def _push_object(self, value: Any) -> None:
        self._count_object()
        self._push(value)

    def _count_object(self) -> None:
        self._objects += 1
        if self._objects > (most := self._admitted.most_objects):
            raise Refused(f"it has more than {most} lists, tuples, arrays and remembered values")

    def _to_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._below.pop()
        return found

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise Damaged("it appends to something else than a list")
        self._stack[-1].extend(values)

    def _tuple(self, count: int) -> None:
        values = [self._stack.pop() for _ in range(count)]
        self._push_object(tuple(reversed(values)))

    def _text_number(self) -> None:
        line = self._line()
        self._push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else self._decimal(line))

    def _text_long(self) -> None:
        self._push(self._decimal(self._line().removesuffix(b"L")))

    def _long(self, length: int) -> None:
        if length > self._admitted.most_int_bytes:
            raise Refused(f"it has a number of {length} bytes")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _quoted(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
            raise Damaged("a quoted string does not end")
        self._push(codecs.escape_decode(line[1:-1])[0])

    def _text(self, length: int) -> None:
        data = self._take(length)
        _check_width(data, _WIDE)
        self._push(data.decode("utf-8", "surrogatepass"))

    def _text_line(self) -> None:
        line = self._line()
        _check_width(line, _WIDE_ESCAPE)
        self._push(line.decode("raw-unicode-escape"))

    def _set_items(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict):
            raise Damaged("it sets items of something else than a dict")
        if len(values) % 2:
            raise Damaged("a key has no value")
        check_keys(values[0::2])
        self._stack[-1].update(zip(values[0::2], values[1::2], strict=True))

    def _frozen(self) -> None:
        values = self._to_mark()
        check_keys(values)
        self._push_object(frozenset(values))

    def _add_items(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], set):
            raise Damaged("it adds items to something else than a set")
        check_keys(values)
        self._stack[-1].update(values)

    def _stack_name(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise Damaged("a name is not text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        self._push_object(self._admitted.name(Name(module, name)))

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple):
            raise Refused("it calls a function with something else than a tuple")
        self._push_object(self._admitted.call(function, arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        self._admitted.build(self._stack[-1], state)

    def _remember(self, key: int) -> None:
        self._count_object()
        self._memo[key] = self._stack[-1]


_VALUES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: _check_protocol(m._number("<B")),
    b"\x95": lambda m: _check_frame(m._number("<Q"), m._left),
    b"(": _Machine._mark,
    b"]": lambda m: m._push_object([]),
    b")": lambda m: m._push(()),
    b"t": lambda m: m._push_object(tuple(m._to_mark())),
    b"a": lambda m: m._extend([m._stack.pop()]),
    b"e": lambda m: m._extend(m._to_mark()),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"N": lambda m: m._stack.append(None),
    b"\x88": lambda m: m._stack.append(True),
    b"\x89": lambda m: m._stack.append(False),
    b"J": lambda m: m._push(m._number("<i")),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"\x8a": lambda m: m._long(m._number("<B")),
    b"X": lambda m: m._text(m._number("<I")),
    b"\x8c": lambda m: m._text(m._number("<B")),
    b"\x8d": lambda m: m._text(m._number("<Q")),
    b"B": lambda m: m._push(m._take(m._number("<I"))),
    b"C": lambda m: m._push(m._take(m._number("<B"))),
    b"\x8e": lambda m: m._push(m._take(m._number("<Q"))),
    b"c": lambda m: m._name(m._line().decode("ascii"), m._line().decode("ascii")),
    b"\x93": _Machine._stack_name,
    b"R": _Machine._call,
    b"b": _Machine._build,
    b"q": lambda m: m._remember(m._number("<B")),
    b"r": lambda m: m._remember(m._number("<I")),
    b"\x94": lambda m: m._remember(len(m._memo)),
    b"h": lambda m: m._recall(m._number("<B")),
    b"j": lambda m: m._recall(m._number("<I")),
}
_OLD_VALUES: dict[bytes, Callable[[_Machine], None]] = {
    b"l": lambda m: m._push_object(m._to_mark()),
    b"I": _Machine._text_number,
    b"L": _Machine._text_long,
    b"\x8b": lambda m: m._long(m._number("<I")),
    b"S": _Machine._quoted,  # Python 2's str, which is bytes; so are T and U
    b"T": lambda m: m._push(m._take(m._number("<I"))),
    b"U": lambda m: m._push(m._take(m._number("<B"))),
    b"V": _Machine._text_line,
    b"\x96": lambda m: m._push(m._take(m._number("<Q"))),  # the buffer of an array
    b"p": lambda m: m._remember(m._decimal(m._line())),
    b"g": lambda m: m._recall(m._decimal(m._line())),
}
_OBJECTS: dict[bytes, Callable[[_Machine], None]] = {
    b"G": lambda m: m._push(m._number(">d")),
    b"}": lambda m: m._push_object({}),
    b"s": lambda m: m._set_items([m._stack.pop(), m._stack.pop()][::-1]),
    b"u": lambda m: m._set_items(m._to_mark()),
    b"\x8f": lambda m: m._push_object(set()),
    b"\x90": lambda m: m._add_items(m._to_mark()),
    b"\x91": _Machine._frozen,
    b"\x81": _Machine._call,
    b"Q": lambda m: m._push_object(m._admitted.persistent(m._stack.pop())),
}
_INSTRUCTIONS = _VALUES | _OLD_VALUES | _OBJECTS

VALUES = frozenset(_VALUES)
"""Instructions of protocols 2 to 5 for texts, bytes, integers, lists, tuples, names and calls."""
OLD_VALUES = frozenset(_OLD_VALUES)
"""Instructions of protocols 0 and 1 and of Python 2 for the same, and the buffers of protocol 5."""
OBJECTS = frozenset(_OBJECTS)
"""Instructions for floating-point numbers, dicts, sets, new objects and references to the outside."""


def _check_protocol(protocol: int) -> None:
    if protocol > 5:
        raise Damaged(f"it is of protocol {protocol}; there are 0 to 5")


def _check_width(data: bytes, wide: re.Pattern[bytes]) -> None:
    if len(data) > _MOST_WIDE and wide.search(data):
        raise Refused(f"it has a text of {len(data)} bytes with characters beyond Latin-1")


def check_keys(values: list[Any]) -> None:
    """Refuse a key that is a deep tuple: to take its hash, Python goes down all levels and may end the process."""
    for value in values:
        waiting, left = [value], _MOST_IN_KEY
        while waiting:
            each = waiting.pop()
            if isinstance(each, tuple):
                left -= 1 + len(each)
                if left < 0:
                    raise Refused("it has a key that is a deep or a large tuple")
                waiting.extend(each)


def _check_frame(length: int, left: int) -> None:
    if length > left:
        raise Damaged(f"it ends {length - left} byte(s) early")
