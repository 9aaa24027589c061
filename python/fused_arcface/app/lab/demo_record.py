"""The demo's numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from fused_arcface import __version__, backends
from fused_arcface.base.files import write_text
from fused_arcface.evaluation import Verification

from ..measure import machine
from .criteria import SCALE
from .demo import Demo, Result
from .problems import CURVE_BOUND, CURVE_STEPS, MARGIN, STEP_BOUND


def write_numbers(demo: Demo, path: Path) -> None:
    """Write everything that a run found but the ROC's points."""
    numbers = {
        "fused_arcface": __version__,
        "torch": torch.__version__,
        "device": machine.device_name(torch.device("cpu")),
        "date": machine.now(),
        "backend": backends.select("auto", torch.device("cpu")),
        "margin": repr(MARGIN),
        "scale": SCALE,
        "seeds": demo.plan.seeds,
        "bounds": {"step_relative": STEP_BOUND, "curve_absolute": CURVE_BOUND, "curve_steps": CURVE_STEPS},
        "broken": demo.broken(),
        "problems": {result.problem.name: _result(result) for result in demo.results},
        "head": [cost.as_json() for cost in demo.costs],
        "seconds": round(demo.seconds, 2),
    }
    write_text(path, json.dumps(numbers, indent=1) + "\n")


def _result(result: Result) -> dict[str, object]:
    return {
        "description": result.problem.describe,
        "recipe": asdict(result.problem.recipe),
        "embedding_dim": result.problem.embedding_dim,
        "identities": result.num_identities,
        "agreement": {
            "same_embeddings_worst_relative": result.agreement.worst(),
            "curves_greatest_difference": result.curve_difference,
        },
        "pixels_without_a_net": [
            {"seed": seed, "accuracy": found.accuracy, "tar_at_far": _rates(found)}
            for seed, found in zip(sorted({t.seed for t in result.trainings}), result.pixels, strict=True)
        ],
        "trainings": [
            {
                "criterion": training.criterion,
                "seed": training.seed,
                "accuracy": training.verification.accuracy,
                "accuracy_deviation_over_folds": training.verification.accuracy_deviation,
                "tar_at_far": _rates(training.verification),
                "head_milliseconds": training.head_milliseconds,
                "seconds": round(training.seconds, 3),
                "losses": training.losses,
            }
            for training in result.trainings
        ],
    }


def _rates(found: Verification) -> dict[str, float]:
    return {f"{far:g}": tar for far, tar in found.tar.items()}
