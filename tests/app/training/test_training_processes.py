"""``train`` in processes of its own, one or two ranks: interrupted from outside, resumed on as many or on others."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.image_files import write_folder
from support.training_runs import TINY, losses, run

from fused_arcface.app.data import ImageSpec, read_folder, read_image
from fused_arcface.app.nets.small import embed
from fused_arcface.app.training.config import TrainConfig
from fused_arcface.app.training.runs import load_backbone
from fused_arcface.evaluation import verify

pytestmark = pytest.mark.distributed


def start(arguments: list[str], ranks: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
    """The command in processes of its own, which torchrun starts again so many times."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(ranks),
        "--max-restarts",
        str(restarts),
    ]
    launcher = torchrun if ranks > 1 else []
    # The loopback interface: gloo would otherwise look the machine's name up, which a sandbox may not answer.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "fused_arcface", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_steps(output: Path, process: subprocess.Popen[str], steps: int) -> None:
    log, deadline = output / "log.jsonl", time.monotonic() + 240
    while not (log.exists() and log.read_text().count('"loss"') >= steps):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def test_end_to_end_on_files_with_ctrl_c_and_two_ranks(tmp_path: Path) -> None:
    """Images of several sizes and modes; a run in two micro-batches, interrupted by SIGINT, goes on with two ranks of
    one micro-batch each, which makes the loss curve of one that was not interrupted; what it learned is recognized."""
    root = write_folder(tmp_path / "faces", 12, 5)
    write_folder(tmp_path / "unseen", 12, 5, first=100)
    options = {"data": str(root), "epochs": 30, "batch_size": 20, "accumulation": 2, "workers": 0, "device": "cpu"}
    config = TrainConfig().replace(options | {"verify_data": str(tmp_path / "unseen"), "verify_every": 30})
    run(config, tmp_path / "whole")
    whole = losses(tmp_path / "whole")
    assert len(whole) == 90

    config.replace({"workers": 2}).save(tmp_path / "options.toml")
    output = tmp_path / "parts"
    process = start(["--config", str(tmp_path / "options.toml"), "--output", str(output)])
    wait_for_steps(output, process, 7)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 130 and f"fused-arcface train --output {shlex.quote(str(output))} --resume" in error
    stopped = len(losses(output))
    assert 7 <= stopped < 90 and f"Saved after step {stopped} of 90" in error

    process = start(["--output", str(output), "--resume", "--accumulation", "1", "--workers", "0"], ranks=2)
    shown, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert f"resumed after step {stopped} of 90" in shown and shown.count("epoch  30/30") == 1
    assert losses(output) == pytest.approx(whole, rel=2e-3)

    net, spec = load_backbone(output)
    assert spec == ImageSpec(36, 3)  # the median side, and color
    unseen = read_folder(tmp_path / "unseen")
    images = torch.stack([read_image(path, spec) for path, _ in unseen.files])
    labels = torch.tensor([identity for _, identity in unseen.files])
    assert verify(embed(net, images), labels).accuracy > 0.65  # chance is 0.5


@pytest.mark.full
def test_two_ranks_are_interrupted_together_and_resumed_on_two_and_on_one(tmp_path: Path) -> None:
    """On two ranks the losses are those of two that were not interrupted, to the bit. On one, whose sums are rounded in
    another order, they part slowly: by 1e-7 at first, tenfold in about ten steps."""
    config = TINY.replace({"epochs": 40, "batch_size": 12, "sample_rate": 0.7})
    config.save(tmp_path / "options.toml")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for output in (whole, parts):
        process = start(["--config", str(tmp_path / "options.toml"), "--output", str(output)], ranks=2)
        if output == parts:
            wait_for_steps(output, process, 5)
            process.send_signal(signal.SIGTERM)  # torchrun hands it on
        process.communicate(timeout=240)
    stopped = len(losses(parts))
    assert 5 <= stopped < 70
    shutil.copytree(parts, tmp_path / "on_one")
    process = start(["--output", str(parts), "--resume"], ranks=2)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert losses(parts) == losses(whole)
    _, heard = run(config.replace({"accumulation": 2}), tmp_path / "on_one", resume=True)
    assert heard[0].step == stopped
    assert losses(tmp_path / "on_one")[: stopped + 10] == pytest.approx(losses(whole)[: stopped + 10], rel=1e-4)


@pytest.mark.full
def test_torchrun_restarts_a_fresh_run_whose_rank_was_killed(tmp_path: Path) -> None:
    config = TINY.replace({"epochs": 30, "batch_size": 12, "save_every": 1})
    config.save(tmp_path / "options.toml")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["--config", str(tmp_path / "options.toml"), "--resume", "auto"]
    assert start([*arguments, "--output", str(whole)], ranks=2).wait(240) == 0
    process = start([*arguments, "--output", str(parts)], ranks=2, restarts=1)
    wait_for_steps(parts, process, 5)
    owner = int(re.match(r"process (\d+) on", (parts / "run.lock").read_text())[1])  # the first rank
    os.kill(owner, signal.SIGKILL)
    shown, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert "resumed after step" in shown
    assert losses(parts) == losses(whole)
