"""Start-up: the package resolves its names lazily, and the command line shows its help without torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_arcface as fa
from fused_arcface.app.cli import run
from fused_arcface.app.measure.startup import BOUND, PARTS, measure

YARDSTICK = """
import time
start = time.process_time()
import asyncio, concurrent.futures, ctypes, email.message, http.server, logging.config, unittest.mock, xml.dom.minidom
print(time.process_time() - start)
"""
YARDSTICK_SECONDS = 0.065
"""Processor time of the yardstick on a machine that ``BOUND`` is for: a slower one may take longer for all."""


def slowness() -> float:
    """Return how much slower than that machine this one imports modules; 1 if it is not."""
    command = [sys.executable, "-c", YARDSTICK]
    took = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return max(1.0, took / YARDSTICK_SECONDS)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.slow
def test_a_start_is_quick(part: str) -> None:
    start = measure(part)
    heavy = {"matplotlib", "sklearn", "sympy", "torch._dynamo", "torch.distributed.checkpoint", "typer"}
    if part.startswith("fused-arcface"):
        heavy = heavy - {"typer"} | {"torch", "numpy"}
    assert heavy & start.modules == set()
    # The processor is slower while others use it, so a start that took long is measured again beside the yardstick.
    tries = [start.seconds]
    while tries[-1] > BOUND and len(tries) < 5:
        tries.append(measure(part).seconds / slowness())
    assert min(tries) <= BOUND, tries


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
