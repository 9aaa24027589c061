"""The examples, each in its quick form: it ends with a finite loss."""

from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
RANKS = ["ddp_partial_fc", "fsdp2_backbone"]
RUN_TO_THE_END = Path(__file__).parent / "support" / "run_to_the_end.py"
SINGLE = sorted({path.stem for path in EXAMPLES.glob("*.py")} - {*RANKS, "timm_backbone"})


def losses(text: str) -> list[float]:
    found = [float(value) for value in re.findall(r"loss ([\d.]+|nan|inf)", text)]
    assert found and all(math.isfinite(value) for value in found), text
    return found


def example(name: str, steps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[float]:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", str(steps)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes of the frameworks about small runs on a CPU
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return losses(capsys.readouterr().out)


@pytest.mark.parametrize("name", SINGLE)
def test_an_example_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "lightning_module":
        pytest.importorskip("lightning")
    if name == "accelerate_loop":
        pytest.importorskip("accelerate")
    example(name, 5, monkeypatch, capsys)


def test_the_plain_loop_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("plain_loop", 60, monkeypatch, capsys)
    assert found[-1] < 0.5 * found[0]


def test_new_identities_do_not_disturb_the_old(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fresh head has a loss above 4 here; one whose new centers begin at their images, none that high."""
    assert max(example("new_identities", 60, monkeypatch, capsys)) < 0.5


def test_timm_in_place_of_which_a_small_net_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create_model(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        assert name == "resnet18" and not pretrained and num_classes == 0
        net: Any = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 24))
        net.num_features = 24
        return net

    timm = types.ModuleType("timm")
    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert len(example("timm_backbone", 3, monkeypatch, capsys)) == 3


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.slow
def test_an_example_under_torchrun(name: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--local-addr", "127.0.0.1"]
    stay = ["--threads-stay"] if name == "fsdp2_backbone" else []
    command = [*torchrun, str(RUN_TO_THE_END), *stay, str(EXAMPLES / f"{name}.py"), "--steps", "3"]
    # The loopback interface: gloo would otherwise look the machine's name up, which a sandbox may not answer.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    losses(done.stdout)


def test_the_list_of_examples_is_complete() -> None:
    listed = set(re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.stem for path in EXAMPLES.glob("*.py")}
