"""Reads the few things that a pickled verification set is made of, without running the pickle.

A pickle is a program for a machine with a stack. :func:`read_pickle` knows the instructions that lists, tuples, bytes,
numbers and NumPy arrays are written with. It calls nothing that the pickle names: a name is a name, an array is an
:class:`Array` of a shape, an element type and bytes, each checked here. https://github.com/python/cpython, file
``Lib/pickletools.py``, describes every instruction.
"""

from __future__ import annotations

import codecs
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

_MOST_INSTRUCTIONS = 1_500_000
"""A set of 10,000 pairs has 40,000 to 350,000; more would take seconds."""
_MOST_OBJECTS = 300_000
"""Lists, tuples, arrays and remembered values: each takes 50 to 200 bytes of memory, for one byte in the file."""
_MOST_DIGITS = 20


class Refused(Exception):
    """The pickle uses something that no verification set needs."""


class Damaged(Exception):
    """The bytes are no pickle, or the pickle ends early or contradicts itself."""


class Name(NamedTuple):
    """The name of a function or class, as the pickle has it; never looked up."""

    module: str
    name: str


@dataclass
class ElementType:
    """A NumPy dtype."""

    kind: str
    """``b``, ``i``, ``u`` or ``O``."""
    size: int
    """In bytes."""
    order: str
    """``<`` or ``>``; pickles set it after they have made the dtype."""


@dataclass
class Array:
    """A NumPy array whose content fits its shape; empty until the pickle fills it."""

    shape: tuple[int, ...] = (0,)
    element: ElementType = field(default_factory=lambda: ElementType("u", 1, "<"))
    content: bytes | list[Any] = b""
    """Elements in order: bytes, or objects if ``element.kind`` is ``O``."""

    def numbers(self) -> npt.NDArray[Any]:
        """Return the elements of an array of bools or integers, flat."""
        assert isinstance(self.content, bytes) and self.element.kind != "O"
        kind = "u" if self.element.kind == "b" else self.element.kind
        return np.frombuffer(self.content, dtype=f"{self.element.order}{kind}{self.element.size}")


class _Mark:
    """Lies on the stack where a list or tuple begins."""


_MARK = _Mark()


def read_pickle(file: BinaryIO, size: int) -> Any:
    """Return what a pickle of ``size`` bytes holds: lists, tuples, bytes, str, bool, int, None and :class:`Array`.

    Raises:
        Refused: it uses an instruction or a name that no verification set needs. Nothing of it is executed.
        Damaged: it is no pickle, cut short, or contradicts itself.

    >>> import io, pickle
    >>> text = pickle.dumps(([b"jpeg"], [True]), 2)
    >>> read_pickle(io.BytesIO(text), len(text))
    ([b'jpeg'], [True])
    """
    machine = _Machine(file, size)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, ValueError) as error:  # a stack too short, a number that is none
        raise Damaged(f"{str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


class _Machine:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._objects = 0
        self._started = False

    def run(self) -> Any:
        for _ in range(_MOST_INSTRUCTIONS):
            code = self._take(1)
            if code == b".":
                if len(self._stack) != 1:
                    raise Damaged(f"it ends with {len(self._stack)} values, not with one")
                return self._stack[0]
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                if self._started:
                    raise Refused(f"it uses the instruction {code!r}, which no verification set needs")
                raise Damaged(f"it begins with {code!r}")
            instruction(self)
            self._started = True
        raise Refused(f"it has more than {_MOST_INSTRUCTIONS} instructions")

    # What the file has.

    def _take(self, length: int) -> bytes:
        if length > self._left:
            raise Damaged(f"it ends {length - self._left} byte(s) early")
        self._left -= length
        found = self._file.read(length)
        if len(found) != length:
            raise Damaged("it became shorter while it was read")
        return found

    def _number(self, format: str) -> int:
        found: int = struct.unpack(format, self._take(struct.calcsize(format)))[0]
        return found

    def _line(self) -> bytes:
        found = self._file.readline(self._left)
        self._left -= len(found)
        if not found.endswith(b"\n"):
            raise Damaged("it ends within a line")
        return found[:-1]

    def _decimal(self, line: bytes) -> int:
        if not re.fullmatch(rb"-?[0-9]{1,%d}" % _MOST_DIGITS, line):
            raise Damaged(f"{line[:_MOST_DIGITS]!r} is no number")
        return int(line)

    # Instructions. Each pops what it needs from the stack and pushes its result.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise Damaged("a value is missing")
        return value

    def _push_object(self, value: Any) -> None:
        self._count_object()
        self._push(value)

    def _count_object(self) -> None:
        self._objects += 1
        if self._objects > _MOST_OBJECTS:
            raise Refused(f"it has more than {_MOST_OBJECTS} lists, tuples, arrays and remembered values")

    def _to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Damaged("a mark is missing")
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise Damaged("it appends to something else than a list")
        self._stack[-1].extend(values)

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push_object(tuple(reversed(values)))

    def _text_number(self) -> None:
        line = self._line()
        self._push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else self._decimal(line))

    def _text_long(self) -> None:
        self._push(self._decimal(self._line().removesuffix(b"L")))

    def _long(self, length: int) -> None:
        if length > 8:
            raise Refused(f"it has a number of {length} bytes")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _quoted(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
            raise Damaged("a quoted string does not end")
        self._push(codecs.escape_decode(line[1:-1])[0])

    def _text(self, length: int) -> None:
        self._push(self._take(length).decode("utf-8", "surrogatepass"))

    def _stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise Damaged("a name is no text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        if (module, name) not in _CALLS and (module, name) != _NDARRAY:
            raise Refused(f"it names {module[:60]}.{name[:60]}, which no verification set needs")
        self._push(Name(module, name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple) or function not in _CALLS:
            raise Refused("it calls something that is no function of a verification set")
        self._push_object(_CALLS[function](*arguments))

    def _build(self) -> None:
        state, value = self._pop(), self._stack[-1]
        if isinstance(value, ElementType):
            _set_order(value, state)
        elif isinstance(value, Array):
            _fill(value, state)
        else:
            raise Refused("it sets attributes of something else than an array")

    def _remember(self, key: int) -> None:
        if self._stack[-1] is _MARK:
            raise Damaged("a value is missing")
        self._count_object()
        self._memo[key] = self._stack[-1]


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: _check_protocol(m._number("<B")),
    b"\x95": lambda m: _check_frame(m._number("<Q"), m._left),
    b"(": lambda m: m._push(_MARK),
    b"]": lambda m: m._push_object([]),
    b")": lambda m: m._push(()),
    b"l": lambda m: m._push_object(m._to_mark()),
    b"t": lambda m: m._push_object(tuple(m._to_mark())),
    b"a": lambda m: m._extend([m._pop()]),
    b"e": lambda m: m._extend(m._to_mark()),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"I": _Machine._text_number,
    b"L": _Machine._text_long,
    b"J": lambda m: m._push(m._number("<i")),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"\x8a": lambda m: m._long(m._number("<B")),
    b"\x8b": lambda m: m._long(m._number("<I")),
    b"S": _Machine._quoted,  # Python 2's str, which is bytes; so are T and U
    b"T": lambda m: m._push(m._take(m._number("<I"))),
    b"U": lambda m: m._push(m._take(m._number("<B"))),
    b"V": lambda m: m._push(m._line().decode("raw-unicode-escape")),
    b"X": lambda m: m._text(m._number("<I")),
    b"\x8c": lambda m: m._text(m._number("<B")),
    b"\x8d": lambda m: m._text(m._number("<Q")),
    b"B": lambda m: m._push(m._take(m._number("<I"))),
    b"C": lambda m: m._push(m._take(m._number("<B"))),
    b"\x8e": lambda m: m._push(m._take(m._number("<Q"))),
    b"\x96": lambda m: m._push(m._take(m._number("<Q"))),  # the buffer of an array
    b"c": lambda m: m._name(m._line().decode("ascii"), m._line().decode("ascii")),
    b"\x93": _Machine._stack_name,
    b"R": _Machine._reduce,
    b"b": _Machine._build,
    b"p": lambda m: m._remember(m._decimal(m._line())),
    b"q": lambda m: m._remember(m._number("<B")),
    b"r": lambda m: m._remember(m._number("<I")),
    b"\x94": lambda m: m._remember(len(m._memo)),
    b"g": lambda m: m._push(m._memo[m._decimal(m._line())]),
    b"h": lambda m: m._push(m._memo[m._number("<B")]),
    b"j": lambda m: m._push(m._memo[m._number("<I")]),
}


def _check_protocol(protocol: int) -> None:
    if protocol > 5:
        raise Damaged(f"it is of protocol {protocol}; there are 0 to 5")


def _check_frame(length: int, left: int) -> None:
    if length > left:
        raise Damaged(f"it ends {length - left} byte(s) early")


# What stands for the functions that such pickles call.


def _encode(text: Any, encoding: Any) -> bytes:
    """Stand for ``_codecs.encode``, which bytes are written with in old protocols."""
    if encoding not in ("latin1", b"latin1") or not isinstance(text, str):
        raise Refused("it encodes text otherwise than as latin1")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    """Stand for ``bytes()``, which empty bytes are written with in old protocols."""
    if arguments:
        raise Refused("it makes bytes in another way than pickle does")
    return b""


def _dtype(code: Any, *flags: Any) -> ElementType:
    """Stand for ``numpy.dtype(code, align, copy)``."""
    code = code.decode("latin1") if isinstance(code, bytes) else code
    found = re.fullmatch(r"[|<>=]?(b1|[iu][1248]|O8?)", code) if isinstance(code, str) else None
    if found is None or len(flags) > 2:
        raise Refused("it has an array of something else than bools, integers or objects")
    return ElementType(found[1][0], int(found[1][1:] or 8), ">" if code[0] == ">" else "<")


def _set_order(element: ElementType, state: Any) -> None:
    """Set a dtype's byte order, all that ``dtype.__setstate__`` does for these types."""
    if not isinstance(state, tuple) or not 5 <= len(state) <= 9 or any(state[2:5]):
        raise Refused("it has an array of something else than bools, integers or objects")
    order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
    if order not in ("<", ">", "|", "="):
        raise Damaged("a byte order is none")
    element.order = ">" if order == ">" else "<"


def _reconstruct(kind: Any, shape: Any, code: Any) -> Array:
    """Stand for NumPy's ``_reconstruct``, whose array the pickle fills by its next step."""
    if kind != _NDARRAY or shape != (0,):
        raise Refused("it makes an array in another way than NumPy does")
    return Array()


def _fill(array: Array, state: Any) -> None:
    """Set an array as ``ndarray.__setstate__(version, shape, dtype, is Fortran, content)`` does."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise Refused("it fills an array in another way than NumPy does")
    _, shape, element, fortran, content = state
    _set(array, content, element, shape, bool(fortran))


def _from_buffer(content: Any, element: Any, shape: Any, order: Any) -> Array:
    """Stand for NumPy's ``_frombuffer``, of protocol 5."""
    array = Array()
    _set(array, content, element, shape, order == "F")
    return array


def _set(array: Array, content: Any, element: Any, shape: Any, fortran: bool) -> None:
    if not isinstance(element, ElementType) or not isinstance(shape, tuple) or len(shape) > 2:
        raise Refused("it has an array of more than two dimensions or of an unknown type")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise Damaged("an array's shape is none")
    # A matrix in Fortran's order has its elements in another order; of a single row or column it is the same.
    if fortran and len(shape) == 2 and 1 not in shape:
        raise Refused("it has a matrix in Fortran's order")
    size = math.prod(shape)
    if element.kind == "O":
        if not isinstance(content, list) or len(content) != size:
            raise Damaged(f"an array of shape {shape} has other content")
    elif not isinstance(content, bytes) or len(content) != size * element.size:
        raise Damaged(f"an array of shape {shape} has other content")
    array.shape, array.element, array.content = shape, element, content


def _scalar(element: Any, content: Any) -> bool | int:
    """Stand for NumPy's ``scalar``: one number of a list of them."""
    if not isinstance(element, ElementType) or element.kind == "O":
        raise Refused("it has a number of an unknown type")
    if not isinstance(content, bytes) or len(content) != element.size:
        raise Damaged("a number has other content")
    return int(Array((1,), element, content).numbers()[0])


_NDARRAY = ("numpy", "ndarray")
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    ("numpy", "dtype"): _dtype,
    **{(module, "_reconstruct"): _reconstruct for module in _MODULES},
    **{(module, "_frombuffer"): _from_buffer for module in _MODULES},
    **{(module, "scalar"): _scalar for module in _MODULES},
}
