"""The report of ``compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fused_arcface.base.text import counted

from ..lab.comparison import WITH_DISTANCES, Comparison
from ..lab.comparison_pictures import comparison_drawings
from .digest import as_comparisons
from .document import Report, Section, about, table


def comparison_report(
    found: Comparison, tables: Sequence[Table], words: Sequence[str], options: Mapping[str, Any]
) -> Report:
    """Return the report of a comparison.

    ``tables`` are those of the terminal, first that of the criteria; ``words`` are the sentences below it.
    """
    first, *others = tables
    (task,) = found.plan.tasks
    sections = [
        Section("Results", " ".join(words), tables=[first]),
        Section("Pictures", drawings=comparison_drawings(found)),
        *_hardest(found),
        Section("Losses", tables=[_losses(found)]),
        Section("Distances", tables=others),
        *about(options),
    ]
    summary = (
        f"One net trained with {len(found.rows)} losses from {counted(len(found.plan.seeds), 'seed')}: "
        f"{task.images.describe()}; {task.recipe.steps} steps of {task.recipe.batch_size} images."
    )
    return Report("Comparison of losses", summary, sections)


def _hardest(found: Comparison) -> list[Section]:
    text = (
        "Seed {}, people never seen in training: pairs of one person that look least alike to the net, then pairs of "
        "two people that look most alike."
    )
    first = {name: rows[0] for name in WITH_DISTANCES if (rows := found.rows.get(name))}
    return [
        Section(f"Hardest pairs, {name}", text.format(row.seed), comparisons=as_comparisons(row.hardest))
        for name, row in first.items()
        if row.hardest
    ]


def _losses(found: Comparison) -> Table:
    rows = [
        (row.criterion, str(row.seed), f"{row.first_loss:.3f}", f"{row.last_loss:.4f}", f"{row.seconds:.1f}")
        for of_criterion in found.rows.values()
        for row in of_criterion
    ]
    return table(("", "seed", "first loss", "last loss", "seconds"), rows)
