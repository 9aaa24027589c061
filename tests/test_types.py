"""A user's script under mypy --strict and basedpyright: no error, and an error where the script is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fused_arcface as fa

# An editable installation is found by an import hook, which checkers do not run.
PACKAGE = Path(fa.__file__).parents[1]
SCRIPT = Path(__file__).parent / "data" / "typed" / "user_script.py"
WRONG = """
import torch
import fused_arcface as fa

x = torch.zeros(2, 4)
head = fa.MarginHead(4, 3)
head(x, x).correct
fa.margin_softmax_loss(x, x, x, reduction="average")
fa.ArcFase()
"""


def mypy(*paths: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(PACKAGE)})
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert lines, done.stdout + done.stderr
    return {path.name: sum(path.name in line.partition(":")[0] for line in lines) for path in paths}


def basedpyright(*paths: Path) -> dict[str, int]:
    project = paths[-1].parent / "pyrightconfig.json"
    project.write_text(json.dumps({"include": list(map(str, paths)), "extraPaths": [str(PACKAGE)]}))
    options = ["--outputjson", "--pythonpath", sys.executable, "--project", str(project)]
    done = subprocess.run([sys.executable, "-m", "basedpyright", *options], capture_output=True, text=True)
    assert done.stdout, done.stderr
    errors = [each for each in json.loads(done.stdout)["generalDiagnostics"] if each["severity"] == "error"]
    return {path.name: sum(Path(each["file"]).name == path.name for each in errors) for path in paths}


@pytest.mark.parametrize("checker", [pytest.param(mypy, marks=pytest.mark.full), basedpyright])
@pytest.mark.slow
def test_a_users_script_type_checks(checker: Callable[..., dict[str, int]], tmp_path: Path) -> None:
    """``make lint`` runs mypy on the right script as well."""
    if importlib.util.find_spec(checker.__name__) is None:
        pytest.skip(f"{checker.__name__} is not installed: it comes with the extra dev")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    found = checker(SCRIPT, wrong)
    assert found[SCRIPT.name] == 0 and found[wrong.name] >= 3
