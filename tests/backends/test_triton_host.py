"""The host's share of the Triton backend: launches and time, by Triton's own launcher over a driver that runs nothing.

The signatures, the shared memory and the grids are those of a real step on an H100; the driver checks their limits.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

from fused_arcface.backends.triton import configs

FOLDER = Path(__file__).parent.parent / "support" / "cuda_driver"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler to build the driver with"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The launches and times of the steps in support/cuda_driver/steps.py."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, FOLDER / "stub.c"], check=True)
    (folder / "libcuda.so").symlink_to(library)
    environment = os.environ | {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, FOLDER / "steps.py", library]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    result: dict[str, Any] = json.loads(child.stdout)
    print(f"\n{json.dumps(result, indent=1)}")
    return result


def _turns(budget: int, row_bytes: int) -> int:
    """Return the turns of a loop over 1 000 000 class centers."""
    return math.ceil(1_000_000 / (budget // row_bytes))


def test_launches_of_the_flash_passes(report: dict[str, Any]) -> None:
    """A turn fills the panel and runs one kernel; besides, each pass prepares its rows with two.

    The backward pass takes bf16 centers as they are stored: one launch for their norms, and one for all of them.
    """
    turns = _turns(configs.FLASH_PANEL.center_bytes, 2 * 512)
    copied, stored = report["flash, fp32 centers"], report["flash"]
    for each in (copied["forward"], copied["backward"], stored["forward"]):
        assert each["launches"] == 2 * turns + 2
    assert stored["backward"]["launches"] == 2 + 2
    assert {each["products"] for passes in (copied, stored) for each in passes.values()} == {0}


def test_launches_of_the_chunk_passes(report: dict[str, Any]) -> None:
    """fp32: a turn has two library products beside the kernels that fill the panel, exponentiate, and project."""
    forward, backward = report["chunks"]["forward"], report["chunks"]["backward"]
    turns = forward["products"] // 2
    assert turns == backward["products"] // 2 >= _turns(configs.CHUNKS.center_bytes, 4 * 512)
    assert forward["launches"] == 2 * turns + 2
    assert backward["launches"] == 3 * turns + 2


def test_launches_of_the_chunk_passes_over_stored_centers(report: dict[str, Any]) -> None:
    """bf16: a turn of the forward pass copies its centers; the backward pass takes all norms with one launch before."""
    forward, backward = report["chunks in bf16"]["forward"], report["chunks in bf16"]["backward"]
    turns = forward["products"]
    assert turns == backward["products"] >= _turns(configs.CHUNKS.center_bytes, 2 * 512)
    assert forward["launches"] == 2 * turns + 2
    assert backward["launches"] == 2 * turns + 1 + 2


def test_launches_of_a_training_step(report: dict[str, Any]) -> None:
    """PartialFC with CenterSGD. The plain permutation would take some 300 launches more."""
    assert report["all classes"]["torch"] + report["all classes"]["triton"] <= 76
    assert report["sampled"]["torch"] + report["sampled"]["triton"] <= 130


@pytest.mark.parametrize("algorithm", ["flash", "chunks"])
def test_a_new_batch_size_compiles_nothing(algorithm: str, report: dict[str, Any]) -> None:
    """All ranks would wait seconds for it. Odd sizes, one tile of rows, and fewer rows than a tile."""
    first, *others = report["compilations"][algorithm].items()
    assert first[0] == "1024" and first[1] > 0
    assert len(others) == 8 and set(dict(others).values()) == {0}, others


PRODUCT = 8.0
"""Microseconds of the host for a product of the library, which is counted and not called here."""
BARE = 4.0
"""Microseconds of a launch by Triton's own launcher on the host that the bounds are for. All times are scaled to it."""


@pytest.mark.parametrize(
    ("name", "N", "most", "others"),
    [
        ("flash, fp32 centers", 1024, 3.0, 2),
        ("chunks in bf16", 1024, 3.0, 3),
        ("chunks in bf16, N = 4096", 4096, 2.0, 3),
    ],
)
def test_host_time(name: str, N: int, most: float, others: int, report: dict[str, Any]) -> None:
    """At C = 1 000 000 and D = 512 a step takes the host at most ``most`` ps a logit, and a turn at most 20 µs.

    The host is one where a bare launch takes ``BARE`` µs, so that the bounds hold on a slower machine as well.
    A launch takes as long as one of the backward pass: the turns of the forward pass are like it, but some of torch's
    kernels follow, which run on the CPU here. ``others`` are launches beside the turns.
    """
    forward, backward = report[name]["forward"], report[name]["backward"]
    turns = (backward["launches"] - others) / 2
    taken = backward["microseconds"] * BARE / backward["a bare launch"]
    a_turn = taken / turns
    a_launch = taken / backward["launches"]
    microseconds = sum(a_launch * each["launches"] + PRODUCT * each["products"] for each in (forward, backward))
    a_logit = microseconds * 1e6 / (N * 1_000_000)
    print(f"\n{name}: {turns:.0f} turns, {a_turn:.0f} µs a turn and pass without products, {a_logit:.1f} ps a logit")
    assert a_turn < 20
    assert a_logit < most
