"""What a comparison leaves in its folder, written as it goes, so that an interrupted one goes on where it was.

::

    OUTPUT/plan.json        what is compared, and with which versions
    OUTPUT/rows/*.json      a finished training each
    OUTPUT/toy/*.npz        a two-dimensional training each: embeddings (M, 2), labels (M,)
    OUTPUT/rows.csv, summary.json, *.png    once all are there
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fused_arcface import __version__, backends
from fused_arcface.base.files import replacing, write_text

from ..benchmark.report import write_csv
from ..measure import machine
from .criteria import criteria
from .plan import Plan


class ComparisonError(ValueError):
    """A folder holds something else than this comparison's results."""


@dataclass(frozen=True)
class Row:
    """One training, and what its net is worth on unseen people."""

    criterion: str
    seed: int
    accuracy: float
    """Of verification, mean over ten folds."""
    eer: float
    tar: dict[str, float]
    """True accept rate by false accept rate."""
    rank1: float
    """One image a person in the gallery."""
    rank5: float
    tpir: float
    """At an FPIR of 0.1, a fifth of the people not in the gallery."""
    seconds: float
    """Of the training."""
    head_milliseconds: float
    """Median of the loss's forward and backward pass."""
    peak_bytes: int | None
    """Resident memory that training steps need beyond the images and parameters; None where it cannot be measured."""
    first_loss: float
    last_loss: float
    roc: list[float]
    """True accept rates at :data:`ROC_FARS`."""
    same_angles: list[int]
    """Pairs of one person by the angle between their embeddings, from 0 to 180 degrees in even bins."""
    different_angles: list[int]
    """Pairs of two people, likewise."""
    distances: dict[str, dict[str, float]]
    """By distance, of the embeddings as the net gives them: accuracy, TAR at FAR 0.01, rank 1. Only of some."""


TAR_FARS = (1e-1, 1e-2, 1e-3)
ROC_FARS = tuple(np.logspace(-3, 0, 61).tolist())
ANGLE_BINS = 90


class Folder:
    """A comparison's folder.

    Raises:
        ComparisonError: it holds another comparison's results.
        OSError: it cannot be made.
    """

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root, self._rows, self._toys = root, root / "rows", root / "toy"
        for folder in (root, self._rows, self._toys):
            folder.mkdir(parents=True, exist_ok=True)
        described = {"fused_arcface": __version__, "torch": torch.__version__, "plan": asdict(plan)}
        text = json.dumps(described, indent=1) + "\n"
        file = root / "plan.json"
        if not file.exists():
            write_text(file, text)
        elif file.read_text(encoding="utf-8") != text:
            raise ComparisonError(
                f"{root} holds another comparison (see {file}): name another folder, or remove it first"
            )

    def row(self, criterion: str, seed: int) -> Row | None:
        """A finished training's row, if it is there."""
        file = self._row_file(criterion, seed)
        return Row(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def add(self, row: Row) -> None:
        write_text(self._row_file(row.criterion, row.seed), json.dumps(asdict(row)) + "\n")

    def toy(self, criterion: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None:
        """Embeddings (M, 2) and labels (M,), if they are there."""
        file = self._toy_file(criterion)
        if not file.exists():
            return None
        with np.load(file) as stored:
            return stored["embeddings"], stored["labels"]

    def add_toy(self, criterion: str, embeddings: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        file = self._toy_file(criterion)
        with replacing(file) as opened:
            np.savez(opened, embeddings=embeddings, labels=labels)

    def write_summary(self, rows: Sequence[Row], seconds: float) -> list[Path]:
        """rows.csv and summary.json."""
        table, summary = self.root / "rows.csv", self.root / "summary.json"
        flat = [_flat(row) for row in rows]
        write_csv(table, flat, list(flat[0]))
        cpu = torch.device("cpu")
        figures = {
            "device": machine.device_name(cpu),
            "date": machine.now(),
            "backend": backends.select("auto", cpu),
            "seconds": round(seconds, 1),
            "criteria": {name: {"source": criteria()[name].source, **found} for name, found in summaries(rows).items()},
        }
        write_text(summary, json.dumps(figures, indent=1) + "\n")
        return [table, summary]

    def _row_file(self, criterion: str, seed: int) -> Path:
        return self._rows / f"{_slug(criterion)}-seed{seed}.json"

    def _toy_file(self, criterion: str) -> Path:
        return self._toys / f"{_slug(criterion)}.npz"


def mean_and_deviation(values: Iterable[float]) -> dict[str, float]:
    """Mean and population deviation."""
    listed = list(values)
    return {
        "mean": statistics.fmean(listed),
        "deviation": statistics.pstdev(listed),
    }


def summaries(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By criterion, mean and deviation over the seeds of every number in the rows."""
    found: dict[str, dict[str, Any]] = {}
    for criterion in dict.fromkeys(row.criterion for row in rows):
        flat = [_flat(row) for row in rows if row.criterion == criterion]
        numbers = [name for name, value in flat[0].items() if name not in ("criterion", "seed") and value != ""]
        found[criterion] = {name: mean_and_deviation(float(each[name]) for each in flat) for name in numbers}
    return found


def _flat(row: Row) -> dict[str, Any]:
    """A row without its curves, one level deep."""
    flat: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if field.name == "tar":
            flat |= {f"tar_at_far_{far}": rate for far, rate in value.items()}
        elif field.name not in ("roc", "same_angles", "different_angles", "distances"):
            flat[field.name] = "" if value is None else value
    return flat


def _slug(name: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", name).strip("-").lower()
