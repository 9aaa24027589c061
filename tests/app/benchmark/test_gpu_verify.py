"""The order, the limits and the results of bench/gpu_verify.sh, with stand-ins for torch, pip and the phases."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench"
pytestmark = pytest.mark.skipif(
    shutil.which("timeout") is None, reason="the script is for Linux: it needs timeout of the GNU core utilities"
)

TORCH = """
from types import SimpleNamespace
__version__ = "2.99"
version = SimpleNamespace(cuda="13.0")
cuda = SimpleNamespace(
    is_available=lambda: {available},
    get_device_properties=lambda index: SimpleNamespace(
        name="Some GPU 80GB", major=9, minor=0, multi_processor_count=132, total_memory=8 * 10**10
    ),
)
"""
# Notes each phase; fails or waits where told; has every package. Everything else is the real interpreter's, without
# what is installed there.
PYTHON = """#!/bin/sh
case "$*" in
  *"pip install"*)
    for target; do if [ "$last" = --target ]; then mkdir -p "$target/fused_arcface"; break; fi; last=$target; done
    touch "$target/fused_arcface/__init__.py"
    case "$*" in *.whl*) echo "wheels" >>"$SAID" ;; *) echo "build" >>"$SAID" ;; esac ;;
  bench/*)
    echo "$1 $FUSED_ARCFACE_COMMIT" >>"$SAID"
    case "$1" in "$FAILS") echo "no such luck"; exit 3 ;; "$WAITS") sleep 60 ;; esac ;;
  *find_spec*) exit 0 ;;
  *) exec "$REAL" -S "$@" ;;
esac
"""


class Script:
    """Runs of the script in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "torch").mkdir()
        self.make_torch(available=True)
        python = folder / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(python),
            "PYTHONPATH": str(folder),
            "REAL": sys.executable,
            "SAID": str(folder / "said"),
            "COMMIT": "abc123",
        }

    def make_torch(self, available: bool) -> None:
        (self.folder / "torch" / "__init__.py").write_text(TORCH.replace("{available}", str(available)))

    def start(self, **settings: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = ["bash", str(BENCH / "gpu_verify.sh"), str(self.out)]
        return subprocess.Popen(command, env={**self.environment, **settings}, stdout=pipe, stderr=pipe, text=True)

    def run(self, **settings: str) -> tuple[int, str, str]:
        process = self.start(**settings)
        said, wrong = process.communicate(timeout=60)
        return process.returncode, said, wrong

    @property
    def ran(self) -> list[str]:
        """What was run so far."""
        said = self.folder / "said"
        return said.read_text().splitlines() if said.exists() else []

    def outcomes(self) -> dict[str, str]:
        summary = json.loads((self.out / "summary.json").read_text())
        return {each["phase"]: each["outcome"] for each in summary["phases"]}


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


@pytest.mark.slow
def test_all_phases_run_in_order_of_their_value(script: Script) -> None:
    status, said, wrong = script.run()
    assert status == 0, said + wrong
    scripts = [line.split()[0].removeprefix("bench/") for line in script.ran]
    assert scripts == [
        "build",
        "gpu_benchmark.py",
        "parallel_tests.py",
        "gpu_training.py",
        "gpu_identities.py",
        "stored_identities.py",
        "parallel_tests.py",
    ]
    assert {line.split()[1] for line in script.ran if line != "build"} == {"abc123"}
    outcomes = script.outcomes()
    sanitizer = outcomes.pop("sanitizer", "")
    assert sanitizer.startswith("skipped: compute-sanitizer") or "sanitizer_hopper_memcheck" in outcomes
    ours = ["build", "benchmark", "tests_gpu", "training", "identities", "stored", "smoke"]
    assert [name for name in outcomes if not name.startswith("sanitizer")] == ours
    assert {outcomes[name] for name in ours} == {"ok"}
    summary = json.loads((script.out / "summary.json").read_text())
    assert (summary["device"], summary["commit"], summary["torch"]) == ("Some GPU 80GB", "abc123", "2.99")


@pytest.mark.slow
def test_a_phase_that_fails_does_not_stop_the_next(script: Script) -> None:
    status, said, _ = script.run(PHASES="training identities", FAILS="bench/gpu_training.py")
    assert status == 1
    assert script.outcomes() == {"build": "ok", "training": "failed with status 3", "identities": "ok"}
    assert "no such luck" in said and "no such luck" in (script.out / "logs" / "training.log").read_text()


@pytest.mark.full
def test_a_phase_that_is_late_is_stopped_and_what_is_left_is_named(script: Script) -> None:
    """It sleeps for nearly all of the ten seconds, so that a busy machine has five left for the phase."""
    settings = {"PHASES": "training benchmark identities", "BUDGET": "10"}
    assert script.run(WAITS="bench/gpu_benchmark.py", **settings)[0] == 1
    outcomes = script.outcomes()
    assert list(outcomes) == ["build", "training", "benchmark", "identities"]
    assert outcomes["training"] == "ok" and outcomes["benchmark"].startswith("ran out of its ")
    assert outcomes["identities"] == "skipped: the budget of 10 s is spent"


@pytest.mark.slow
def test_a_run_that_is_cut_short_keeps_what_was_done(script: Script) -> None:
    process = script.start(PHASES="training identities", WAITS="bench/gpu_identities.py")
    end = time.monotonic() + 30
    while not any("identities" in line for line in script.ran):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert script.outcomes() == {"build": "ok", "training": "ok"}


@pytest.mark.slow
def test_wheels_of_peers_are_installed_beside_the_build(script: Script) -> None:
    (script.folder / "wheels").mkdir()
    (script.folder / "wheels" / "liger_kernel-0.8.5-py3-none-any.whl").touch()
    assert script.run(PHASES="benchmark", WHEELS=str(script.folder / "wheels"))[0] == 0
    assert script.ran == ["build", "wheels", "bench/gpu_benchmark.py abc123"]


def test_an_unknown_phase_is_named_before_anything_runs(script: Script) -> None:
    status, _, wrong = script.run(PHASES="benchmark tset")
    assert status == 1 and wrong.startswith("gpu_verify.sh: PHASES must be among: benchmark tests training")
    assert wrong.endswith("got tset\n") and not script.out.exists()


def test_without_a_gpu_it_says_so(script: Script) -> None:
    script.make_torch(available=False)
    status, _, wrong = script.run()
    assert status == 1 and wrong == "gpu_verify.sh needs a GPU: torch sees no CUDA device\n"
    assert not script.out.exists()
