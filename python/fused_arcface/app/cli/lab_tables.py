"""The printed results of ``demo`` and ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table

from fused_arcface import backends
from fused_arcface.base.text import counted

from ..lab.agreement import CURVE_BOUND, CURVE_STEPS, STEP_BOUND
from ..lab.comparison import WITH_DISTANCES, Comparison
from ..lab.cost import HeadCost
from ..lab.criteria import ARCFACE, MARGINS, SOFTMAX
from ..lab.demo import PIXELS, Demo, TaskResult
from ..lab.plans import Plan
from .tables import digits, plain_table, spread


def print_plan(console: Console, plan: Plan) -> None:
    """Print what will be trained, on what, and how."""
    backend = backends.select("auto", torch.device("cpu"))
    text = f"The fused head runs on the {backend} backend. "
    text += f"Nets are trained on one thread, from {counted(len(plan.seeds), 'seed')}."
    for task in plan.tasks:
        recipe = task.recipe
        text += f"\n{task.name}: {task.images.describe()}; {recipe.steps} steps of {recipe.batch_size} images."
    console.print(text, highlight=False, markup=False)


def print_demo(console: Console, found: Demo) -> None:
    """Print agreement and verification of each task, then the costs of the head."""
    for result in found.results:
        _print_agreement(console, result)
        _print_verification(console, result, found.plan.seeds)
    _print_costs(console, found.costs)


def _print_agreement(console: Console, result: TaskResult) -> None:
    table = plain_table(f"{result.task.name}: fused and reference head", "worst", "bound")
    steps = len(result.agreement.errors["loss"])
    for quantity, worst in result.agreement.worst().items():
        table.add_row(f"{quantity}, relative, same embeddings, {steps} steps", f"{worst:.1e}", f"{STEP_BOUND:.0e}")
    shown = f"loss of two trainings, first {min(CURVE_STEPS, steps)} steps"
    table.add_row(shown, f"{result.agreement.curve_difference:.1e}", f"{CURVE_BOUND:.0e}")
    console.print(table)


def _print_verification(console: Console, result: TaskResult, seeds: Sequence[int]) -> None:
    rates = [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else []
    table = plain_table(f"{result.task.name}: verification of unseen identities", "accuracy", "TAR at FAR 0.01", *rates)
    tars = {}
    for name, verifications in result.verifications().items():
        tars[name] = [each.tar[1e-2] for each in verifications]
        per_seed = [f"{tar:.3f}" for tar in tars[name]] if rates else []
        table.add_row(name, spread([each.accuracy for each in verifications]), spread(tars[name]), *per_seed)
    console.print(table)
    for base in (SOFTMAX, PIXELS):
        console.print(_gain(ARCFACE, base, tars), highlight=False)
    console.print(*filter(None, [result.task.remark]), "", sep="\n", highlight=False)


def _gain(name: str, base: str, tars: dict[str, list[float]]) -> str:
    """Return a sentence: how often and by how much one TAR is above another."""
    gains = [a - b for a, b in zip(tars[name], tars[base], strict=True)]
    above, mean = sum(gain > 0 for gain in gains), fmean(gains)
    size = f"its mean TAR is {abs(mean):.3f} {'higher' if mean > 0 else 'lower'}"
    return f"{name} is above {base} in {above} of {counted(len(gains), 'seed')}; {size}."


def _print_costs(console: Console, costs: Sequence[HeadCost]) -> None:
    names = ("fused", "reference")
    columns = [f"{name}, {unit}" for unit in ("ms", "MB") for name in names]
    table = plain_table("the head: time and peak extra memory, forward and backward", *columns)
    for cost in costs:
        peaks = (cost.peak_bytes[name] for name in names)
        memory = ("-" if peak is None else f"{peak / 1e6:.1f}" for peak in peaks)
        table.add_row(str(cost.case), *(digits(cost.milliseconds[name]) for name in names), *memory)
    console.print(table)
    console.print(
        "ms: median of warm passes, both heads in turn. MB: peak beyond embeddings, class centers and their gradients.",
        highlight=False,
    )
    for cost in costs:
        if cost.problem:
            console.print(cost.problem, style="yellow", markup=False)


def print_comparison(console: Console, found: Comparison) -> None:
    """Print the table of the criteria, their gains over softmax, and the tables by distance."""
    criteria, *distances = comparison_tables(found)
    console.print(criteria)
    console.print(COLUMNS + "\n", highlight=False)
    for line in comparison_gains(found):
        console.print(line, highlight=False)
    for table in distances:
        console.print("", table)


COLUMNS = (
    "Verification: accuracy over 10 folds, TAR at FAR 0.01. Identification: rank 1,\n"
    "one image a person in the gallery. s: a training; ms: the loss's forward and\n"
    "backward pass; MB: peak of training steps beyond images, weights, optimizer."
)
"""The columns of the first of :func:`comparison_tables`, in words."""


def comparison_tables(found: Comparison) -> list[Table]:
    """Return the table of the criteria, then those by distance."""
    tables = [_criteria(found)]
    for name in WITH_DISTANCES:
        if rows := found.rows.get(name):
            table = plain_table(f"{name}: embeddings compared by distance", "accuracy", "TAR", "rank 1")
            for distance in rows[0].distances:
                figures = [row.distances[distance] for row in rows]
                cells = (spread([each[key] for each in figures]) for key in ("accuracy", "tar", "rank1"))
                table.add_row(distance, *cells)
            tables.append(table)
    return tables


def comparison_gains(found: Comparison) -> list[str]:
    """Return a line for each margin: how often and by how much it is above softmax."""
    tars = {name: [row.tar["0.01"] for row in rows] for name, rows in found.rows.items()}
    return [_gain(name, SOFTMAX, tars) for name in MARGINS if name in tars and SOFTMAX in tars]


def _criteria(found: Comparison) -> Table:
    seeds = len(found.plan.seeds)
    over = f", mean ± deviation over {seeds} seeds" if seeds > 1 else ""
    columns = ("accuracy", "TAR", "rank 1", "s", "ms", "MB")
    table = plain_table(f"people never seen in training{over}", *columns, room=1)
    for name, rows in found.rows.items():
        shares = zip(*((row.accuracy, row.tar["0.01"], row.rank1) for row in rows), strict=True)
        times = (fmean(row.seconds for row in rows), fmean(row.head_milliseconds for row in rows))
        memory = "-" if rows[0].peak_bytes is None else f"{rows[0].peak_bytes / 1e6:.0f}"
        table.add_row(name, *map(spread, shares), *(f"{each:.1f}" for each in times), memory)
    return table
