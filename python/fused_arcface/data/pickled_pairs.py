"""Verification sets as insightface ships them: ``lfw.bin`` and its like, a pickle of ``(encoded images, is same)``.

A pickle is a program; this one is run by an unpickler that knows the few names such a set is made of and refuses all
others, so that a file from anywhere may be opened.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .folders import DataError

# What the unpickler and numpy raise for bytes that are no pickle, or one cut short or changed.
_DAMAGED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)


class PickledPairs(NamedTuple):
    """P pairs."""

    images: list[bytes]
    """2·P encoded images: pair i is of images 2·i and 2·i + 1."""
    same: list[bool]
    """P: whether both show one person."""


def read_pickled_pairs(path: str | Path) -> PickledPairs:
    """Read a ``.bin`` verification set, of any pickle protocol, Python 2's too.

    Raises:
        DataError: a truncated file, one that names anything but bytes, lists, tuples, bools and numpy arrays (nothing
            of it is executed), or one that holds something else than pairs.
        OSError: the file cannot be opened.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "two.bin"
    >>> _ = file.write_bytes(pickle.dumps(([b"jpeg", b"jpeg"], [True])))
    >>> read_pickled_pairs(file).same
    [True]
    """
    path = Path(path)
    try:
        found = _Restricted(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except _Refused as refused:
        raise DataError(f"{path} is refused: {refused}; nothing of it was executed") from None
    except _DAMAGED as error:
        raise DataError(f"{path} is no pickle, or a damaged one: {error}") from None
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise DataError(f"{path} must hold (images, is same); it holds {type(found).__name__}")
    return _checked(path, *found)


def _checked(path: Path, images: Any, same: Any) -> PickledPairs:
    if not isinstance(images, (list, tuple, np.ndarray)) or not isinstance(same, (list, tuple, np.ndarray)):
        kinds = f"{type(images).__name__} and {type(same).__name__}"
        raise DataError(f"{path} must hold two lists, images and is same; it holds {kinds}")
    if len(images) != 2 * len(same) or len(same) == 0:
        raise DataError(f"{path} must hold two images a pair; it holds {len(images)} and {len(same)} pairs")
    encoded = []
    for index, image in enumerate(images):
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 1:
            image = image.tobytes()
        if not isinstance(image, bytes):
            raise DataError(f"{path}: image {index} must be bytes or a uint8 array; it is {type(image).__name__}")
        encoded.append(image)
    for index, flag in enumerate(same):
        if not isinstance(flag, (bool, np.bool_, int, np.integer)) or flag not in (0, 1):
            raise DataError(f"{path}: is same {index} must be a bool; it is {flag!r:.40}")
    return PickledPairs(encoded, [bool(flag) for flag in same])


class _Refused(Exception):
    """The pickle names something that no verification set needs."""


def _latin1(text: str, encoding: str) -> bytes:
    """``_codecs.encode`` as pickles of bytes by the old protocols call it, for that one codec."""
    if encoding not in ("latin1", b"latin1"):
        raise _Refused(f"it encodes by {encoding!r:.40}")
    return text.encode("latin1")


class _Array:
    """Stands for ``numpy.ndarray``, which a pickle may hand to ``_reconstruct`` and not call."""


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> Any:
    """numpy's ``_reconstruct``, whose array is filled by the pickle's next step."""
    if kind is not _Array or shape != (0,):
        raise _Refused("it makes an array in another way than numpy does")
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _from_buffer(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> Any:
    """numpy's ``_frombuffer``, of protocol 5."""
    return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _scalar(dtype: np.dtype[Any], data: bytes = b"") -> Any:
    """numpy's ``scalar``: a bool in a list of them."""
    return np.frombuffer(data, dtype=dtype)[0]


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): np.dtype,
    **{(module, "_reconstruct"): _empty_array for module in _NUMPY},
    **{(module, "_frombuffer"): _from_buffer for module in _NUMPY},
    **{(module, "scalar"): _scalar for module in _NUMPY},
    **{(builtins, "bytes"): bytes for builtins in ("builtins", "__builtin__")},
    **{(builtins, "bytearray"): bytearray for builtins in ("builtins", "__builtin__")},
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise _Refused(f"it names {module}.{name}, which no verification set needs") from None
