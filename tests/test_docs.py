"""Documentation: each public function and module has an example, which pytest runs with the other doctests."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest
from torch import nn

import fused_arcface as fa

ROOT = Path(__file__).parents[1]
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


def test_no_argument_is_described_by_a_letter_alone() -> None:
    """Sphinx takes "D." for the beginning of a list, and shows nothing."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "python").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.fullmatch(r" +\w+: [A-Z]\.", line)
    ]
    assert found == []


def test_the_api_reference_is_complete() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    source = [page]
    runpy.run_path(str(ROOT / "docs" / "conf.py"))["_margins"](None, "api", source)
    listed = set(re.findall(r"^\.\. auto\w+:: fused_arcface\.([\w.]+)$", source[0], re.MULTILINE))
    modules = {name for name in fa.__all__ if inspect.ismodule(getattr(fa, name))}
    assert set(fa.__all__) - modules - listed == set()
    assert modules - {name.partition(".")[0] for name in listed} == set()
