"""The dtypes that the package works with: the one table of them, and the dtype that sums are kept in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DType(NamedTuple):
    """The name of a dtype in files, and the tensors that may have it."""

    safetensors: str
    """Name in the header of a safetensors file."""
    embeddings: bool = False
    """If true, embeddings may have it."""
    weight: bool = False
    """If true, class centers may have it."""
    updated: bool = False
    """If true, an optimizer of the class centers, such as CenterSGD, updates class centers of it."""
    momentum: bool = False
    """If true, CenterSGD keeps momentum in it."""


DTYPES = {
    torch.float32: DType("F32", embeddings=True, weight=True, updated=True, momentum=True),
    torch.float64: DType("F64", embeddings=True, weight=True, updated=True, momentum=True),
    torch.bfloat16: DType("BF16", embeddings=True, weight=True, updated=True, momentum=True),
    torch.float16: DType("F16", embeddings=True, weight=True),
    torch.int8: DType("I8", momentum=True),
    torch.int64: DType("I64"),
}

FLOAT_DTYPES = tuple(dtype for dtype, of in DTYPES.items() if of.embeddings)
"""The dtypes of embeddings. A position in it is the code that ranks send each other."""
WEIGHT_DTYPES = tuple(dtype for dtype, of in DTYPES.items() if of.weight)
CENTER_DTYPES = tuple(dtype for dtype, of in DTYPES.items() if of.updated)
MOMENTUM_DTYPES = tuple(dtype for dtype, of in DTYPES.items() if of.momentum)
INTEGER_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
)
"""The dtypes of labels."""


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Return the dtypes' names as a list for error messages.

    >>> names((torch.float32, torch.int8))
    'float32, int8'
    """
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def compute_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that sums are kept in: fp64 if either input is, else fp32."""
    return torch.float64 if torch.float64 in (embeddings.dtype, weight.dtype) else torch.float32
