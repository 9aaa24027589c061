"""Notes of the package for torch.compile, torch.func and torch.jit.

Importing this does not import torch's compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch._compile import _disable_dynamo

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_result(function: _Function) -> _Function:
    """Mark a function for torch.compile, which then takes its result for a constant and does not trace it.

    The same as ``torch.compiler.assume_constant_result``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: _Function) -> _Function:
    """Make torch.compile call a function between its graphs, as ``torch.compiler.disable`` does.

    The compiler is imported in the first call, as it is by torch's optimizers.
    """
    return cast(_Function, _disable_dynamo(function))


def check_not_transformed(caller: str) -> None:
    """Check that no transform of torch.func is active.

    Raises:
        RuntimeError: if one is. The fused operations have derivatives for autograd alone.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{caller} cannot be transformed by torch.func (grad, vmap, jacrev, ...). Use backward() or "
            "torch.autograd.grad, with reduction='none' for one loss for each row; second derivatives come from "
            "torch.autograd.functional over fused_arcface.reference.margin_softmax_loss"
        )


class NotScriptable:
    """A module that torch.jit.script refuses with an error that names what works."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script: it is for training. Use torch.compile for "
            "it, and script, trace or export the backbone alone for deployment"
        )
