"""The results of a training run and of a dry run, and the error of a training that cannot continue."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from .config import TrainConfig


class TrainingError(RuntimeError):
    """Raised on all ranks if a training cannot continue. The message says why and, if possible, how to resume."""


@dataclass(frozen=True)
class TrainingOutcome:
    """The end of a training."""

    step: int
    steps: int
    signal: signal.Signals | None = None
    """Signal that interrupted it."""
    metrics: dict[str, float] = field(default_factory=dict, compare=False)
    """Loss, accuracy and target_angle (degrees) of the last step; verification_accuracy and verification_eer, the
    accuracy and equal error rate of the last verification. Ranks other than the first have only those of the step."""


@dataclass(frozen=True)
class DryRun:
    """The first step of a training that writes nothing."""

    config: TrainConfig
    """Every option as it was resolved."""
    loss: float
    seconds: float
    """Time of the step, with the reading of its images."""
