"""The report of a training run. It is made from the run's folder alone, so a resumed run writes the whole report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.table import Table

from fused_arcface.base.reading import DataError, open_regular

from ..drawing import COLORS, ONE, Drawing, panel
from ..thresholds import KeptThresholds, as_text, read_thresholds
from ..training.config import TrainConfig
from ..training.runs import RunFolder
from .digest import read_digest
from .document import Report, Section, about, table
from .evaluation import digest_sections

Floats = npt.NDArray[np.float64]

FIGURES = {
    "loss": ("loss", "Loss of each step."),
    "target_angle": ("angle, degrees", "Mean angle between an embedding and its class center."),
    "accuracy": ("accuracy on training images", "Share of the batch for which the own class center is the nearest."),
    "lr": ("learning rate", "Learning rate of the backbone."),
    "images_per_second": ("images per second", "Speed, with the reading of images."),
}
"""Figures of each step in the log: the label of its axis and its caption."""
_POINTS = 400
"""Most points of a curve; with more steps each is a mean over several."""


class Log(NamedTuple):
    """The log of a run."""

    steps: npt.NDArray[Any]
    """(S,) records of ``step``, ``epoch`` and :data:`FIGURES`, fp64 each."""
    verifications: list[dict[str, Any]]
    """``step``, ``verification_accuracy`` and ``tar_at_far``."""


def read_log(path: Path) -> Log:
    """Read a run's log; a line that was cut short is left out."""
    names = ("step", "epoch", *FIGURES)
    rows, verifications = [], []
    for values in _lines(path):
        if "verification_accuracy" in values:
            verifications.append(values)
        elif "loss" in values:
            rows.append(tuple(float(values[name]) for name in names))
    return Log(np.array(rows, dtype=[(name, np.float64) for name in names]), verifications)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open_regular(path) as file:
        for line in file:
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict):
                yield values


def training_report(folder: RunFolder) -> Report:
    """Return the report of a run, finished or not.

    Raises:
        RunError: if the folder is no run.
        DataError: if its log or another file is damaged, or the log has no step yet.
    """
    config = folder.read_config()
    log = read_log(folder.log)
    if not len(log.steps):
        raise DataError(f"{folder.log} has no step yet")
    step, epoch = int(log.steps["step"][-1]), int(log.steps["epoch"][-1])
    sections = [
        Section("Training", drawings=_training_drawings(log), tables=[_epochs(log)]),
        *_verification_sections(folder, log, step),
        _data(folder, config),
        *about(asdict(config)),
    ]
    summary = (
        f"{config.margin} with scale {config.scale:g}, backbone {config.backbone}, on {config.data}: "
        f"step {step:,}, epoch {epoch} of {config.epochs}."
    )
    return Report(f"Training run {folder.root.resolve().name}", summary, sections)


def _epochs(log: Log) -> Table:
    """Return a table with a row for each epoch; of many epochs, for some at even steps and the last."""
    columns = ("epoch", "steps", "loss", "angle", "accuracy", "images/s")
    epochs = np.unique(log.steps["epoch"])
    rows = []
    for epoch in epochs[np.unique(np.linspace(0, len(epochs) - 1, 30).round().astype(int))]:
        own = log.steps[log.steps["epoch"] == epoch]
        means = {name: float(own[name].mean()) for name in FIGURES}
        speed = len(own) / float((1 / own["images_per_second"]).sum())
        cells = f"{means['loss']:.3f}", f"{means['target_angle']:.1f}°", f"{means['accuracy']:.3f}", f"{speed:,.0f}"
        rows.append((f"{epoch:.0f}", f"{len(own):,}", *cells))
    return table(columns, rows, "Means over the steps of an epoch", words=())


def _training_drawings(log: Log) -> list[Drawing]:
    steps = log.steps["step"]
    several = "" if len(steps) <= _POINTS else " The line is a mean over several steps, the band their range."
    return [
        curve_drawing(name, caption if name == "lr" else caption + several, steps, log.steps[name], label)
        for name, (label, caption) in FIGURES.items()
    ]


def curve_drawing(name: str, caption: str, steps: Floats, values: Floats, label: str) -> Drawing:
    """Return the drawing of one figure over the steps; with many steps, means and ranges over some of them.

    A step whose figure is not finite, such as a skipped one, is left out.
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]

    def draw(plt: Any) -> Any:
        figure, axis = panel(plt, 2.9, label, xlabel="step", ylabel=label)
        parts = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps))) if len(steps) else []
        x, mean = (np.array([each[part].mean() for part in parts]) for each in (steps, values))
        if len(steps) > len(parts):
            low, high = (np.array([bound(values[part]) for part in parts]) for bound in (np.min, np.max))
            axis.fill_between(x, low, high, color=ONE, alpha=0.2, lw=0)
        axis.plot(x, mean, color=ONE, lw=1.3, marker="." if len(steps) == 1 else None)
        return figure

    return Drawing(name, caption, draw)


def _verification_sections(folder: RunFolder, log: Log, step: int) -> list[Section]:
    """Return the sections about the verifications, none if there was none.

    Files of a later step are left out: the run was continued from an earlier one.
    """
    sections = []
    if log.verifications:
        drawings = [_verifications_drawing(log.verifications)] if len(log.verifications) > 1 else []
        sections.append(Section("Verification", drawings=drawings, tables=[_verifications(log.verifications)]))
    thresholds = read_thresholds(folder.thresholds)
    if thresholds is not None and (thresholds.step or 0) <= step:
        sections.append(_thresholds(thresholds))
    digest = read_digest(folder.verification)
    if digest is not None and (digest.step or 0) <= step:
        for section in digest_sections(digest):
            text = f"Of the verification after step {digest.step:,} on {digest.data}. {section.text}"
            sections.append(replace(section, text=text))
    return sections


def _rates(verifications: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the accuracy and the true accept rates of each verification by name, NaN where there is none."""
    rates = {"accuracy": [each["verification_accuracy"] for each in verifications]}
    for far in verifications[-1]["tar_at_far"]:
        rates[f"TAR at FAR {far}"] = [each["tar_at_far"].get(far, math.nan) for each in verifications]
    return rates


def _verifications(found: Sequence[dict[str, Any]]) -> Table:
    last, rates = found[-30:], _rates(found[-30:])
    rows = [
        (f"{each['step']:,}", *(f"{rate:.4f}" for rate in row))
        for each, *row in zip(last, *rates.values(), strict=True)
    ]
    return table(("step", *rates), rows, "The last 30 verifications" if len(found) > 30 else "", words=())


def _verifications_drawing(found: Sequence[dict[str, Any]]) -> Drawing:
    def draw(plt: Any) -> Any:
        title = "verification of people not trained on"
        figure, axis = panel(plt, 3.4, title, xlabel="step", ylabel="rate", ylim=(0, 1.02))
        for (name, rates), color in zip(_rates(found).items(), ("black", *COLORS), strict=False):
            axis.plot([each["step"] for each in found], rates, "o-", ms=4, color=color, label=name)
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    return Drawing("verification", "Accuracy over folds, and true accept rates, at each verification.", draw)


def _thresholds(kept: KeptThresholds) -> Section:
    text = f"Cosines from which on two images count as one person, chosen on {kept.data}."
    columns = ("", "cosine >=", "accuracy", "FAR", "TAR")
    return Section("Thresholds", text, tables=[table(columns, as_text(kept.points))])


def _data(folder: RunFolder, config: TrainConfig) -> Section:
    known = folder.read_fingerprint()
    rows = [("trained on", config.data), ("verified on", config.verify_data or "–")]
    if known is not None:
        rows += [("images", f"{known.images:,}"), ("identities", f"{known.identities:,}")]
    rows.append(("size", f"{config.image_size} × {config.image_size}, {'gray' if config.channels == 1 else 'color'}"))
    return Section("Data", tables=[table(("", ""), rows, words=(0, 1))])
