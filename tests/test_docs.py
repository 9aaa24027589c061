"""Documentation: each public function and module has an example, which pytest runs with the other doctests."""

from __future__ import annotations

import importlib
import inspect

import pytest
from torch import nn

PACKAGES = ("", ".reference", ".evaluation", ".app.data", ".compat.insightface")


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_and_modules_have_an_example(package: str) -> None:
    module = importlib.import_module(f"fused_arcface{package}")
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]
    public = {name: getattr(module, name) for name in names}
    callables = {
        name: value
        for name, value in public.items()
        if inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module))
    }
    assert callables
    assert [name for name, value in callables.items() if ">>>" not in (value.__doc__ or "")] == []
