"""A small training run inside this process, told to stop by a signal at a step of the test's choice."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch

import fused_arcface as fa
from fused_arcface.app.nets.small import SmallNet
from fused_arcface.app.training import events
from fused_arcface.app.training.config import TrainConfig
from fused_arcface.app.training.events import Stepped
from fused_arcface.app.training.runs import RunFolder, load_backbone
from fused_arcface.app.training.trainer import TrainingOutcome, train

TINY = TrainConfig(
    data="identities:6x4", epochs=3, batch_size=8, image_size=16, workers=0, device="cpu", verify_every=9
)


def run(
    config: TrainConfig, output: Path, resume: bool = False, stop_at: int = 0, by: int = signal.SIGINT
) -> tuple[TrainingOutcome, list[events.Event]]:
    """Return a run's outcome and events; at step ``stop_at`` this process gets the signal ``by``."""
    heard: list[events.Event] = []

    def listen(event: events.Event) -> None:
        heard.append(event)
        if isinstance(event, Stepped) and event.step == stop_at - 1:
            os.kill(os.getpid(), by)

    return train(config, output, resume=resume, listener=listen), heard


def losses(output: Path) -> list[float]:
    """Return the losses of a run's log, and check that no step is missing or double."""
    steps = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    return [step["loss"] for step in steps]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's backbone."""
    return load_backbone(output)[0].state_dict()


def write_random_run(root: Path, image_size: int = 16) -> None:
    """Write a run as ``train`` leaves it, with one checkpoint of random weights."""
    folder = RunFolder(root)
    folder.root.mkdir()
    TrainConfig(data="identities", image_size=image_size, channels=1, embedding_dim=8).save(folder.config)
    torch.manual_seed(7)
    fa.checkpoint.save(folder.checkpoints, fa.PartialFC(8, 4), backbone=SmallNet(8))
