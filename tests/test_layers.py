"""The boundary contract of docs/architecture.md: each layer imports only the layers below it.

The same for the tests: one imports the package and tests/support, and no other test.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fused_arcface as fa

PACKAGE = Path(fa.__file__).parent

BELOW = {
    "base": (),
    "margins": ("base",),
    "parallel": ("base",),
    "store": ("base", "parallel"),
    "engine": ("base", "margins", "parallel", "backends"),
    "backends": ("base", "margins", "engine"),
    "heads": ("base", "margins", "parallel", "store", "engine", "backends"),
    "reference": ("base", "margins"),
    "checkpoint": ("base", "margins", "parallel", "store", "engine", "backends", "heads"),
    "compat": ("base", "margins", "parallel", "engine", "backends", "heads"),
    "evaluation": ("base", "margins", "parallel", "engine", "backends", "heads"),
}
"""Each layer and the layers that it may import. The applications, ``app``, may import all of them."""

HEADS = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "reference"}
"""The modules at the top of the package that form one layer."""


def layer_of(module: str) -> str:
    """Return the layer of a module, named relative to the package; "" for the package itself."""
    first = module.partition(".")[0]
    return "heads" if first in HEADS else first


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules of this package that a file imports, relative to the package, inside functions too."""
    here = list(path.relative_to(PACKAGE).with_suffix("").parts)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["fused_arcface", *here[: len(here) - node.level + 1]] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "fused_arcface":
                yield name.partition(".")[2]


FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")  # the package names its public parts
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_layer_imports_only_the_layers_below_it(path: Path) -> None:
    own = layer_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    if own == "app":
        return
    public = {"", "__version__", "_native"}
    layers = {layer_of(name) for name in imports_of(path)} - public - {own}
    assert layers <= set(BELOW[own]), f"{own} may import {', '.join(BELOW[own]) or 'nothing'}; got {sorted(layers)}"


@pytest.mark.slow
def test_only_the_registry_imports_a_backend() -> None:
    backends = {path.stem for path in (PACKAGE / "backends").iterdir()} - {"__init__", "registry", "__pycache__"}
    found = [
        (path.relative_to(PACKAGE), name)
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] != "backends"
        for name in imports_of(path)
        if name.startswith("backends.") and name.split(".")[1] in backends
    ]
    assert found == []


def test_every_layer_is_named_by_its_folder() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == (BELOW.keys() - {"heads", "reference"}) | {"app"}


TESTS = Path(__file__).parent


def _imported_from_tests(path: Path) -> set[str]:
    """Return the names of test files that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {each.stem for each in TESTS.rglob("test_*.py")}
    return {part for name in names for part in name.split(".")} & files


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_imports_another(path: Path) -> None:
    assert _imported_from_tests(path) == set(), "move what they share into tests/support"


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their names alone, and so do the ranks that a test starts."""
    names = [path.stem for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_a_folder_of_tests_is_a_folder_of_the_package() -> None:
    ours = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    theirs = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert ours <= theirs
