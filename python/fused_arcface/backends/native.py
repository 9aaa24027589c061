"""The compiled module, which the backends ``cpu`` and ``cuda`` share.

Tensors and a step of the optimizer are passed to it as numbers, raw addresses among them (csrc/tuples.h).
An address is no reference: keep its tensor bound to a name until the kernel has read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.terms import CenterStep, RowGradients

_import_error = None
try:
    from .. import _native

    module = _native
except ImportError as error:  # unavailable() reports it: the package works without its compiled part
    _import_error = str(error)


# The numbers of csrc/arguments.h; in a dictionary, since a small problem needs a dozen of them in a step.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def unavailable() -> str | None:
    """Return why the compiled module cannot be imported, or None."""
    if _import_error is None:
        return None
    return f"the compiled module fused_arcface._native cannot be imported: {_import_error}"


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor's memory, 0 without a tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_code(dtype: torch.dtype) -> int:
    """Return the code of a dtype of embeddings and centers, as ``Dtype`` numbers it."""
    return _DTYPE_CODES[dtype]


def matrix(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    """Return a matrix (rows, columns) of any strides as ``MatrixTuple``."""
    return (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], *tensor.shape, *tensor.stride())


def row_gradients(gradients: RowGradients) -> tuple[float, int, int, int]:
    """Return the scale and the addresses of the rows' numbers, in the order that the kernels take them."""
    scale, lse, negative_coefficient, target_coefficient = gradients
    return float(scale), lse.data_ptr(), negative_coefficient.data_ptr(), target_coefficient.data_ptr()


def center_step(step: CenterStep, weight: Tensor) -> tuple[int, int, int, int, int, float, float, float, int, int, int]:
    """Return a step on the rows of weight (C, D) as ``CenterStepTuple``."""
    buffer, classes = step.momentum_buffer, step.classes
    types = {
        torch.float64: module.MOMENTUM_FLOAT64,
        torch.float32: module.MOMENTUM_FLOAT32,
        torch.bfloat16: module.MOMENTUM_BFLOAT16,
        torch.int8: module.MOMENTUM_INT8,
    }
    return (
        address(classes),
        weight.shape[0] if classes is None else classes.shape[0],
        module.NO_MOMENTUM if buffer is None else types[buffer.dtype],
        address(buffer),
        address(step.momentum_scale),
        step.lr,
        step.momentum,
        step.weight_decay,
        step.rounding_key % 2**64,
        step.class_start,
        address(step.row_ids),
    )
