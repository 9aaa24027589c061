"""Marks for torch.compile, without the import of torch's compiler, which takes seconds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_result(function: _Function) -> _Function:
    """Mark a function for torch.compile, which then takes its result for a constant and does not trace it.

    The same as ``torch.compiler.assume_constant_result``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: _Function) -> _Function:
    """Make torch.compile call a function between its graphs, as ``torch.compiler.disable`` does."""

    @functools.cache
    def disabled() -> Callable[..., Any]:
        return torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Until the compiler is imported, nothing is being compiled.
        chosen = disabled() if "torch._dynamo" in sys.modules else function
        return chosen(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(_Function, call)
