"""Start-up: the package resolves its names lazily, and the command line shows its help without torch."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import fused_arcface as fa
from fused_arcface.app.cli import run
from fused_arcface.app.measure.startup import BOUND, PARTS, measure


@pytest.mark.parametrize("part", PARTS)
def test_a_start_is_quick(part: str) -> None:
    start = measure(part)
    heavy = {"matplotlib", "sklearn", "sympy", "torch._dynamo", "torch.distributed.checkpoint", "typer"}
    if part.startswith("fused-arcface"):
        heavy = heavy - {"typer"} | {"torch", "numpy"}
    assert heavy & start.modules == set()
    # The processor is slower while others use it; imports and modules alone would not be worth a second try.
    assert min([start.seconds, *(measure(part).seconds for _ in range(2) if start.seconds > BOUND)]) <= BOUND


def test_the_benchmark_measures_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = dict(zip(PARTS, (0.01, 0.05, 0.2, 0.1), strict=True))
    monkeypatch.setattr("fused_arcface.app.measure.startup.fastest", times.__getitem__)
    assert run(["bench", "--cases", "start", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"{part} +{1e3 * seconds:.0f}\b", shown) for part, seconds in times.items())
    rows = json.loads((tmp_path / "start.json").read_text())["rows"]
    assert rows == [{"part": part, "ms": 1e3 * seconds} for part, seconds in times.items()]
    times[PARTS[2]] = 0.31
    assert run(["bench", "--cases", "start", "--output", str(tmp_path)]) == 1


def test_every_public_name_resolves() -> None:
    assert all(getattr(fa, name) is not None for name in fa.__all__)
    assert set(fa.__all__) <= set(dir(fa))
    with pytest.raises(AttributeError, match=r"^module 'fused_arcface' has no attribute 'ArcFase'$"):
        fa.ArcFase  # noqa: B018


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse(Path(fa.__file__).read_text(encoding="utf-8"))
    block = next(each for each in tree.body if isinstance(each, ast.If))
    imported = [alias.asname for each in block.body if isinstance(each, ast.ImportFrom) for alias in each.names]
    assert sorted(map(str, imported)) == fa.__all__


def test_a_star_import_brings_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from fused_arcface import *", names)
    assert names.keys() - {"__builtins__"} == set(fa.__all__) and names["ArcFace"] is fa.ArcFace


@pytest.mark.parametrize(("name", "module"), [("data", "app.data"), ("safetensors", "checkpoint.safetensors")])
def test_earlier_names_of_modules_still_work(name: str, module: str) -> None:
    assert getattr(fa, name).__name__ == f"fused_arcface.{module}"
