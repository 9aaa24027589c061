"""Events of a training, and the listeners that write them into the run's folder: a log, and TensorBoard.

The terminal's listener is ``cli.training_progress``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fused_arcface.base.extras import MissingExtra, require
from fused_arcface.base.files import write_bytes
from fused_arcface.evaluation.verification import Verification


@dataclass(frozen=True)
class Began:
    """Training begins after step ``step`` of ``steps``."""

    step: int
    steps: int
    images: int
    identities: int
    parameters: int
    """Parameters of the backbone."""
    device: str
    image: tuple[int, int, int]
    """(channels, size, size)"""
    batch_size: int
    """Images of a step, over all ranks."""
    scale: float
    """Scale of the logits."""
    memory: int
    """Bytes on this rank of weights, gradients and optimizer states, without activations."""


@dataclass(frozen=True)
class Stepped:
    """A step was made."""

    step: int
    """From 1."""
    epoch: int
    """From 1."""
    loss: float
    """Mean over the joint batch."""
    target_angle: float
    """Mean angle in degrees between an embedding and its class center."""
    accuracy: float
    """Share of the joint batch for which the nearest class center in use is that of the own class."""
    lr: float
    """Learning rate of the backbone."""
    images_per_second: float
    """Over all ranks, with the time for reading, net, head and optimizer."""
    head_share: float
    """Share of the head in the step's time, on this rank."""


@dataclass(frozen=True)
class Verified:
    """The net was verified."""

    step: int
    epoch: int
    found: Verification
    best: bool = False
    """Its accuracy is the highest until now; the net was kept."""


@dataclass(frozen=True)
class Checkpointed:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class Noted:
    """Text for the user, about a problem in the data for example."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The training has ended; no event follows."""


Event = Began | Stepped | Verified | Checkpointed | Noted | Ended
Listener = Callable[[Event], None]
"""Called with each event on the first rank, and only with notes on the others."""


class LogFile:
    """Writes a line of JSON for each step after ``step``, and for each verification.

    A crashed run repeats the steps after its last checkpoint; their lines are replaced.
    """

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        write_bytes(path, b"".join(line + b"\n" for line in lines if _step_of(line) <= step))
        # A line at a time, so that it can be followed.
        self._file = path.open("a", buffering=1, encoding="ascii", newline="\n")

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self._write(asdict(event))
        elif isinstance(event, Verified):
            tar = {f"{far:g}": rate for far, rate in event.found.tar.items()}
            self._write({"step": event.step, "verification_accuracy": event.found.accuracy, "tar_at_far": tar})

    def _write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self._file.close()


def was_verified(log: Path, step: int) -> bool:
    """Return whether a log has a verification after ``step`` steps."""
    lines = log.read_bytes().split(b"\n") if log.exists() else []
    return any(b'"verification_accuracy"' in line and _step_of(line) == step for line in lines)


def _step_of(line: bytes) -> float:
    """Return the step of a line; infinity if it is no line of a log, or was cut short."""
    try:
        return int(json.loads(line)["step"])
    except Exception:  # another program's line may raise any error
        return float("inf")


class TensorBoard:
    """Writes scalars of each step after ``step``, and of each verification, for TensorBoard."""

    def __init__(self, folder: Path, step: int) -> None:
        library = require("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = library.SummaryWriter(str(folder), purge_step=step + 1)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            for name in ("loss", "target_angle", "accuracy", "lr", "images_per_second", "head_share"):
                self._writer.add_scalar(f"train/{name}", getattr(event, name), event.step)
        elif isinstance(event, Verified):
            self._writer.add_scalar("verification/accuracy", event.found.accuracy, event.step)
            for far, rate in event.found.tar.items():
                self._writer.add_scalar(f"verification/tar_at_far_{far:g}", rate, event.step)

    def close(self) -> None:
        self._writer.close()


LogFiles = list[LogFile | TensorBoard]


def open_log(log: Path, tensorboard: Path, step: int) -> LogFiles:
    """Open the log of a run that continues after ``step``, and TensorBoard's if that is installed."""
    try:
        require("tensorboard", "tensorboard")
    except MissingExtra:
        return [LogFile(log, step)]
    return [LogFile(log, step), TensorBoard(tensorboard, step)]
