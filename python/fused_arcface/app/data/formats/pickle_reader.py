"""The table of pickled verification sets: what the machine of :mod:`fused_arcface.base.pickles` admits of them.

A set is made of lists, tuples, bytes, numbers and NumPy arrays. An array is an :class:`Array` of a shape, an element
type and bytes, each checked here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fused_arcface.base import pickles
from fused_arcface.base.pickles import Admitted, Damaged, Name, Refused


@dataclass(frozen=True, slots=True)
class Latin1:
    """Bytes that the pickle has as a text; a copy of them is made when they are used.

    A pickle may name one text any number of times.
    """

    text: str
    """Its characters are below 256."""

    def __len__(self) -> int:
        return len(self.text)

    def __bytes__(self) -> bytes:
        return self.text.encode("latin1")


@dataclass
class ElementType:
    """A NumPy dtype."""

    kind: str
    """``b``, ``i``, ``u`` or ``O``."""
    size: int
    """In bytes."""
    order: str
    """``<`` or ``>``; pickles set it after they have made the dtype."""

    @property
    def code(self) -> str:
        return f"{self.kind}{self.size}"


@dataclass
class Array:
    """A NumPy array whose content fits its shape; empty until the pickle fills it."""

    shape: tuple[int, ...] = (0,)
    element: ElementType = field(default_factory=lambda: ElementType("u", 1, "<"))
    content: bytes | Latin1 | list[Any] = b""
    """Elements in order: bytes, or objects if ``element.kind`` is ``O``."""

    def numbers(self) -> npt.NDArray[Any]:
        """Return the elements of an array of bools or integers, flat."""
        assert not isinstance(self.content, list)
        kind = "u" if self.element.kind == "b" else self.element.kind
        return np.frombuffer(bytes(self.content), dtype=f"{self.element.order}{kind}{self.element.size}")


def read_set(file: BinaryIO, size: int) -> Any:
    """Return the content of a pickle of ``size`` bytes.

    It is made of lists, tuples, bytes, :class:`Latin1`, str, bool, int, None and :class:`Array`.

    Raises:
        Refused: if it uses an instruction or a name that no verification set needs. Nothing of it is executed.
        Damaged: if it is not a pickle, is cut short, or contradicts itself.

    >>> import io, pickle
    >>> text = pickle.dumps(([b"jpeg"], [True]), 4)
    >>> read_set(io.BytesIO(text), len(text))
    ([b'jpeg'], [True])
    """
    try:
        return pickles.read_pickle(file, size, _ADMITTED)
    finally:
        _check_latin1.cache_clear()


# The functions below take the place of those that such pickles call.

_PIECE = 1 << 20  # characters that are checked at once


def _encode(text: Any, encoding: Any) -> Latin1:
    """Stand for ``_codecs.encode``: old protocols write bytes as this call."""
    if encoding not in ("latin1", b"latin1") or not isinstance(text, str):
        raise Refused("it encodes text otherwise than as latin1")
    _check_latin1(text)
    return Latin1(text)


@functools.cache  # a pickle may use one text 100,000 times
def _check_latin1(text: str) -> None:
    for start in range(0, len(text), _PIECE):
        text[start : start + _PIECE].encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    """Stand for ``bytes()``: old protocols write empty bytes as this call."""
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
        raise Damaged("an unknown byte order")
    element.order = ">" if order == ">" else "<"


def _reconstruct(kind: Any, shape: Any, code: Any) -> Array:
    """Stand for NumPy's ``_reconstruct``; the pickle then fills the array."""
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
        raise Damaged("an array has an invalid shape")
    # Fortran's order is another one, except for a single row or column.
    if fortran and len(shape) == 2 and 1 not in shape:
        raise Refused("it has a matrix in Fortran's order")
    size = math.prod(shape)
    if element.kind == "O":
        if not isinstance(content, list) or len(content) != size:
            raise Damaged(f"an array of shape {shape} has other content")
    elif not isinstance(content, bytes | Latin1) or len(content) != size * element.size:
        raise Damaged(f"an array of shape {shape} has other content")
    array.shape, array.element, array.content = shape, element, content


def _scalar(element: Any, content: Any) -> bool | int:
    """Stand for NumPy's ``scalar``: one number of a list of them."""
    if not isinstance(element, ElementType) or element.kind == "O":
        raise Refused("it has a number of an unknown type")
    if not isinstance(content, bytes | Latin1) or len(content) != element.size:
        raise Damaged("a number has other content")
    return int(Array((1,), element, content).numbers()[0])


_NDARRAY = Name("numpy", "ndarray")
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_CALLS: dict[Name, Callable[..., Any]] = {
    Name("_codecs", "encode"): _encode,
    Name("builtins", "bytes"): _bytes,
    Name("__builtin__", "bytes"): _bytes,
    Name("numpy", "dtype"): _dtype,
    **{Name(module, "_reconstruct"): _reconstruct for module in _MODULES},
    **{Name(module, "_frombuffer"): _from_buffer for module in _MODULES},
    **{Name(module, "scalar"): _scalar for module in _MODULES},
}


def _name(name: Name) -> Name:
    if name not in _CALLS and name != _NDARRAY:
        raise Refused(f"it names {name.module[:60]}.{name.name[:60]}, which no verification set needs")
    return name


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(function, Name) or function not in _CALLS:
        raise Refused("it calls something that is not a function of a verification set")
    return _CALLS[function](*arguments)


def _build(value: Any, state: Any) -> None:
    if isinstance(value, ElementType):
        _set_order(value, state)
    elif isinstance(value, Array):
        _fill(value, state)
    else:
        raise Refused("it sets attributes of something else than an array")


def _refuse(_: Any) -> Any:
    raise Refused("it refers to something outside of it")


_ADMITTED = Admitted(
    kind="verification set",
    instructions=pickles.VALUES | pickles.OLD_VALUES,
    name=_name,
    call=_call,
    build=_build,
    persistent=_refuse,
    most_instructions=1_500_000,  # a set of 10,000 pairs has 40,000 to 350,000; more would take seconds
    most_objects=300_000,
    most_int_bytes=8,
    room=48 << 20,
)
