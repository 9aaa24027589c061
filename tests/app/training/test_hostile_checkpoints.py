"""A run whose checkpoint a stranger wrote, with right checksums: one named error, and never a traceback."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoint_loaders import refit_manifest
from support.training_runs import TINY, losses, run

from fused_arcface import checkpoint
from fused_arcface.app.cli import run as run_command

FUSED = TINY.replace({"epochs": 1, "margin": "AdaFace(0.4)"})
JOINT = FUSED.replace({"center_optimizer": "joint"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run(FUSED, root / "fused")
    run(JOINT, root / "joint")
    return root


MISSING = object()


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Return JSON with one place changed."""
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if new is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return value


def crafted(source: Path, output: Path, place: tuple[Any, ...], new: Any) -> Path:
    """Return a copy of a run whose newest checkpoint has another value in its .metadata, or in its manifest's head."""
    shutil.copytree(source, output)
    directory = checkpoint.latest(output / "checkpoints")
    assert directory is not None
    file = directory / ("manifest.json" if place[0] == "head" and len(place) == 2 else ".metadata")
    file.write_text(json.dumps(put(json.loads(file.read_bytes()), place, new)))
    refit_manifest(file)
    return output


HEAD, SGD = ("values", "head"), ("values", "optimizer")
STATE = (*SGD, "state", "$dict", 0)
RESUMED = [
    *((("values", "step"), value) for value in (None, "x", -1, 1.5, 10**30, True, MISSING)),
    *((("values", "updates"), value) for value in ("x", -1, [])),
    *(((*HEAD, "step"), value) for value in (None, -1, 2**63)),
    *(((*HEAD, "margin", "norm_mean"), value) for value in (None, "x", [], [1.0, 2.0])),
    *(((*HEAD, "optimizer"), value) for value in (None, [], {}, MISSING)),
    *(((*HEAD, "optimizer", "lr"), value) for value in ("x", -1, [], None, {"$float": "nan"}, {"$tensor": "no"})),
    *((("values", "backbone"), value) for value in (None, {}, [], {"conv.weight": 3})),
    *((SGD, value) for value in (None, [], {}, {"state": [], "param_groups": []})),
    *(((*SGD, "param_groups"), value) for value in (None, [], [{}], [{"params": "x"}])),
    *(((*STATE, 0), value) for value in (None, "x", -1, 10**6)),
    *(((*STATE, 1), value) for value in (None, [], 3)),
    *(((*STATE, 1, "momentum_buffer"), value) for value in ("x", -1, [], {"$tensor": "backbone.no"})),
]


@pytest.mark.parametrize("distance", [3, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["fused", pytest.param("joint", marks=pytest.mark.full)])
@pytest.mark.slow
def test_a_resumed_run(
    trained: Path, tmp_path: Path, name: str, distance: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = 0
    for number, (place, new) in enumerate(RESUMED[::distance]):
        if name == "joint" and place[:3] == (*HEAD, "optimizer"):
            continue  # there is none
        output = crafted(trained / name, tmp_path / str(number), place, new)
        assert run_command(["train", "--output", str(output), "--resume", "--epochs", "2"]) == 1, (place, new)
        said = capsys.readouterr().err
        assert said.startswith(str(output)) and "Traceback" not in said, (place, new, said)
        tried += 1
    assert tried >= 36 // distance


def test_the_options_of_the_optimizer_are_the_runs(trained: Path, tmp_path: Path) -> None:
    """Not those of the file, whatever they are."""
    place, wrong = (*SGD, "param_groups", 0), {"maximize": True, "nesterov": [], "foreach": 10**30, "weight_decay": "x"}
    directory = checkpoint.latest(trained / "fused" / "checkpoints")
    assert directory is not None
    group = json.loads((directory / ".metadata").read_bytes())["values"]["optimizer"]["param_groups"][0]
    del group["dampening"]
    output = crafted(trained / "fused", tmp_path / "run", place, group | wrong)
    shutil.copytree(trained / "fused", tmp_path / "whole")
    for each in (output, tmp_path / "whole"):
        assert run_command(["train", "--output", str(each), "--resume", "--epochs", "2"]) == 0
    assert losses(output) == losses(tmp_path / "whole")


CONVERTED = [
    (("tensors",), {}),
    (("head", "seed"), "x"),
    (("head", "sub_centers"), 0),
    ((*HEAD, "optimizer", "lr"), {"$tensor": "no"}),
    ((*HEAD, "step"), 2**63),
]


@pytest.mark.parametrize(("place", "new"), CONVERTED, ids=str)
def test_a_source_of_convert(
    trained: Path, tmp_path: Path, place: tuple[Any, ...], new: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    output = crafted(trained / "fused", tmp_path / "run", place, new)
    assert run_command(["convert", str(output), str(tmp_path / "x.safetensors")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(str(output)) and not (tmp_path / "x.safetensors").exists()


def test_a_checkpoint_without_a_seed_is_converted(trained: Path, tmp_path: Path) -> None:
    output = crafted(trained / "fused", tmp_path / "run", ("head", "seed"), MISSING)
    assert run_command(["convert", str(output), str(tmp_path / "x.safetensors")]) == 0
