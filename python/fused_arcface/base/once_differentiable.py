"""A decorator for the backward passes of this package's kernels, which have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


class _FirstDerivative(torch.autograd.Function):
    """Gradients that autograd connects to their inputs, so that it is an error to differentiate them."""

    @staticmethod
    def forward(ctx: Any, gradients: Callable[[], Gradients], *depends_on: Tensor | None) -> Gradients:
        return gradients()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise RuntimeError(
            "trying to differentiate twice a fused function, whose gradient has no derivative; "
            "fused_arcface.reference.margin_softmax_loss is twice differentiable"
        )


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make it an error to differentiate the result of a :class:`torch.autograd.Function`'s ``backward``.

    PyTorch's decorator of this name detaches the result from the inputs, so that ``.backward()`` alone meets its error:
    ``torch.autograd.grad`` calls the input unused, and ``torch.autograd.functional.hessian`` returns zeros.

    ``backward`` gets ``ctx.saved_tensors`` after ``ctx``: under ``torch.utils.checkpoint`` they can be asked for once.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *d_outputs: Tensor) -> Gradients:
        # A compiled graph refuses a second derivative by itself.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, ctx.saved_tensors, *d_outputs)
        saved = ctx.saved_tensors
        result: Gradients = _FirstDerivative.apply(lambda: backward(ctx, saved, *d_outputs), *saved, *d_outputs)
        return result

    return wrapper
