"""The experiments' files: the demo's numbers, and a comparison's folder, which a later run resumes.

::

    OUTPUT/numbers.json     all that a demo found
    OUTPUT/plan.json        what is compared, and with which versions
    OUTPUT/rows/*.json      one file for each finished training
    OUTPUT/toy/*.npz        one file for each two-dimensional training: embeddings (M, 2), labels (M,)
    OUTPUT/rows.csv, summary.json, *.png    written when all trainings are there
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fused_arcface import __version__, backends
from fused_arcface.base.files import replacing
from fused_arcface.evaluation import Verification

from ..benchmark.report import read_json, write_csv, write_json
from ..measure import machine
from ..report.digest import HardPair, read_hardest
from .agreement import CURVE_BOUND, CURVE_STEPS, STEP_BOUND
from .criteria import MARGIN, SCALE, criteria
from .plans import Generated, Plan

if TYPE_CHECKING:
    from .demo import Demo, TaskResult

_CPU = torch.device("cpu")


class ComparisonError(ValueError):
    """Raised when a folder holds something else than this comparison's results."""


@dataclass(frozen=True)
class Row:
    """One training, and how well its net verifies and identifies unseen people."""

    criterion: str
    seed: int
    accuracy: float
    """Verification, mean over ten folds."""
    eer: float
    tar: dict[str, float]
    """True accept rate by false accept rate."""
    rank1: float
    """Identification rate with one image a person in the gallery."""
    rank5: float
    tpir: float
    """True positive identification rate at an FPIR of 0.1, with a fifth of the people not in the gallery."""
    seconds: float
    """Time of the training."""
    head_milliseconds: float
    """Median time of the loss's forward and backward pass."""
    peak_bytes: int | None
    """Resident memory that training steps need beyond the images and parameters; None where it cannot be measured."""
    first_loss: float
    last_loss: float
    roc: list[float]
    """True accept rates at :data:`ROC_FARS`."""
    same_angles: list[int]
    """Numbers of pairs of one person by the angle between their embeddings, from 0 to 180 degrees in even bins."""
    different_angles: list[int]
    """The same of pairs of two people."""
    distances: dict[str, dict[str, float]]
    """Accuracy, TAR at FAR 0.01 and rank 1 by distance, of embeddings as they are. Empty for most criteria."""
    losses: list[float] = field(default_factory=list)
    """Mean losses over :data:`LOSSES` even parts of the training, or of each step if there are fewer."""
    hardest: list[HardPair] = field(default_factory=list)
    """The hardest pairs of unseen people; empty for most criteria."""


Toy = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""Embeddings (M, 2) of a net with two dimensions, and labels (M,)."""

TAR_FARS = (1e-1, 1e-2, 1e-3)
ROC_FARS = tuple(np.logspace(-3, 0, 61).tolist())
LOSSES = 100


class Folder:
    """A comparison's folder, which is made for the first result.

    Raises:
        ComparisonError: if it holds another comparison's results.
    """

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root, self._plan = root, root / "plan.json"
        self._described = {"fused_arcface": __version__, "torch": torch.__version__, "plan": _described(plan)}
        if self._plan.exists() and not _holds(read_json(self._plan), json.loads(json.dumps(self._described))):
            raise ComparisonError(
                f"{root} holds another comparison (see {self._plan}): name another folder, or remove it first"
            )

    def row(self, criterion: str, seed: int) -> Row | None:
        """Return a finished training's row, or None."""
        file = self._row_file(criterion, seed)
        if not file.exists():
            return None
        values = read_json(file)
        return Row(**{**values, "hardest": read_hardest(values.get("hardest", []))})

    def add(self, row: Row) -> None:
        """Keep a row. A training that failed has losses that are not numbers."""
        file = self._made(self._row_file(row.criterion, row.seed))
        write_json(file, asdict(row), indent=None, allow_nan=True)

    def toy(self, criterion: str) -> Toy | None:
        """Return the training in two dimensions, or None."""
        file = self._toy_file(criterion)
        if not file.exists():
            return None
        with np.load(file) as stored:
            return stored["embeddings"], stored["labels"]

    def add_toy(self, criterion: str, toy: Toy) -> None:
        """Keep a training in two dimensions."""
        with replacing(self._made(self._toy_file(criterion))) as opened:
            np.savez(opened, embeddings=toy[0], labels=toy[1])

    def write_summary(self, rows: Mapping[str, Sequence[Row]], seconds: float) -> list[Path]:
        """Write rows.csv and summary.json of rows by criterion; return their paths."""
        flat = {criterion: [_flat(row) for row in own] for criterion, own in rows.items()}
        found = {criterion: {"source": criteria()[criterion].source, **_over(own)} for criterion, own in flat.items()}
        figures = {**_here(), "seconds": round(seconds, 1), "criteria": found}
        table = write_csv(self.root / "rows.csv", [row for own in flat.values() for row in own])
        return [table, write_json(self.root / "summary.json", figures, allow_nan=True)]

    def _row_file(self, criterion: str, seed: int) -> Path:
        return self.root / "rows" / f"{_slug(criterion)}-seed{seed}.json"

    def _toy_file(self, criterion: str) -> Path:
        return self.root / "toy" / f"{_slug(criterion)}.npz"

    def _made(self, file: Path) -> Path:
        """Return a file after its folder is made, and plan.json."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if not self._plan.exists():
            write_json(self._plan, self._described)
        return file


def _described(plan: Plan) -> dict[str, Any]:
    """Return the facts that decide a comparison's results, as plan.json has them."""
    (task,), toy = plan.tasks, plan.toy
    assert toy is not None and isinstance(toy.images, Generated)
    facts: dict[str, Any] = {"data": None, **asdict(task.images)}
    if "path" in facts:
        facts["data"] = facts.pop("path")
    return {
        "seeds": plan.seeds,
        "recipe": asdict(task.recipe),
        "toy": asdict(toy.recipe),
        "toy_identities": toy.images.identities,
        "toy_samples": toy.images.samples,
        "embedding_dim": task.embedding_dim,
        **facts,
    }


def _holds(stored: Any, facts: Any) -> bool:
    """Return whether ``stored`` agrees with all of ``facts``; earlier releases stored more."""
    if isinstance(stored, dict) and isinstance(facts, dict):
        return all(name in stored and _holds(stored[name], fact) for name, fact in facts.items())
    return bool(stored == facts)


def mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    """Return mean and population standard deviation."""
    return {"mean": statistics.fmean(values), "deviation": statistics.pstdev(values)}


def _over(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and deviation of every number in the flat rows of some seeds."""
    numbers = [name for name, value in rows[0].items() if name not in ("criterion", "seed") and value != ""]
    return {name: mean_and_deviation([float(row[name]) for row in rows]) for name in numbers}


def _flat(row: Row) -> dict[str, Any]:
    """Return a row without its curves, one level deep."""
    flat: dict[str, Any] = {}
    for name, value in vars(row).items():
        if name == "tar":
            flat |= {f"tar_at_far_{far}": rate for far, rate in value.items()}
        elif not isinstance(value, (list, dict)):
            flat[name] = "" if value is None else value
    return flat


def _slug(name: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", name).strip("-").lower()


def write_numbers(demo: Demo, folder: Path) -> Path:
    """Write everything that a demo found except the points of the ROC into numbers.json; return its path."""
    numbers = {
        "fused_arcface": __version__,
        "torch": torch.__version__,
        **_here(),
        "margin": repr(MARGIN),
        "scale": SCALE,
        "seeds": demo.plan.seeds,
        "bounds": {"step_relative": STEP_BOUND, "curve_absolute": CURVE_BOUND, "curve_steps": CURVE_STEPS},
        "broken": demo.broken(),
        "problems": {result.task.name: _task_result(result, demo.plan.seeds) for result in demo.results},
        "head": [asdict(cost) for cost in demo.costs],
        "seconds": round(demo.seconds, 2),
    }
    return write_json(folder / "numbers.json", numbers, allow_nan=True)


def _here() -> dict[str, str]:
    """Return device, date and the backend of the fused head."""
    return {"device": machine.device_name(_CPU), "date": machine.now(), "backend": backends.select("auto", _CPU)}


def _task_result(result: TaskResult, seeds: tuple[int, ...]) -> dict[str, object]:
    return {
        "description": result.task.images.describe(),
        "recipe": asdict(result.task.recipe),
        "embedding_dim": result.task.embedding_dim,
        "identities": result.num_identities,
        "agreement": {
            "same_embeddings_worst_relative": result.agreement.worst(),
            "curves_greatest_difference": result.agreement.curve_difference,
        },
        "pixels_without_a_net": [
            {"seed": seed, "accuracy": found.accuracy, "tar_at_far": _rates(found)}
            for seed, found in zip(seeds, result.pixels, strict=True)
        ],
        "trainings": [
            {
                "criterion": criterion,
                "seed": net.seed,
                "accuracy": net.verification.accuracy,
                "accuracy_deviation_over_folds": net.verification.accuracy_deviation,
                "tar_at_far": _rates(net.verification),
                "head_milliseconds": net.trained.head_milliseconds,
                "seconds": round(net.trained.seconds, 3),
                "losses": net.trained.losses,
            }
            for criterion, nets in result.nets.items()
            for net in nets
        ],
    }


def _rates(found: Verification) -> dict[str, float]:
    return {f"{far:g}": tar for far, tar in found.tar.items()}
