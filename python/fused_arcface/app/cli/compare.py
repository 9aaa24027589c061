"""``compare``: the field's losses on the same net, images and seeds; a table on the terminal, pictures and numbers in a
folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .progress import TrainingBar
from .tables import plain_table, spread
from .terminal import terminal

if TYPE_CHECKING:
    from ..lab.comparison import Comparison
    from ..lab.comparison_record import Row


def compare(
    output: Annotated[
        Path, typer.Option(help="Folder for results, made if it is missing; run again, it goes on where it stopped.")
    ] = Path("runs/compare"),
    data: Annotated[
        Path | None,
        typer.Option(help="A folder with a folder of images for each identity, or a .rec file; else generated ones."),
    ] = None,
    criteria: Annotated[
        str, typer.Option(help="Names from the table, with semicolons between; all of them by default.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    steps: Annotated[int | None, typer.Option(min=2, help="Of each training; 300 by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=8, help="Images of a step; 128 by default.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps on tiny sets: shows that it works, no more.")
    ] = False,
) -> None:
    """Train one net with every loss of the field and evaluate each on identities never seen in training.

    Softmax, contrastive (supervised and self-supervised), triplet, center
    loss, NormSoftmax, SphereFace, CosFace, ArcFace, AdaFace. Takes some
    minutes on two cores.
    """
    from dataclasses import replace

    from fused_arcface.base.extras import pyplot, require

    from ..lab.comparison import run_comparison
    from ..lab.comparison_pictures import draw_pictures
    from ..lab.comparison_record import Folder
    from ..lab.criteria import criteria as every
    from ..lab.plan import FULL, QUICK

    # What is missing is said before the minutes are spent, not after.
    require("sklearn.metrics", "compare")
    require("pytorch_metric_learning.losses", "compare")
    pyplot()
    spelled = {name.casefold(): name for name in every()}
    given = [name.strip() for name in criteria.split(";") if name.strip()]
    names = tuple(spelled.get(name.casefold(), name) for name in given)
    unknown = [name for name in names if name not in every()]
    if unknown:
        raise typer.BadParameter(f"--criteria must be among {'; '.join(every())}; got {'; '.join(unknown)}")
    plan = QUICK if quick else replace(FULL, seeds=tuple(range(seeds)))
    recipe = replace(plan.recipe, steps=steps or plan.recipe.steps, batch_size=batch_size or plan.recipe.batch_size)
    plan = replace(plan, recipe=recipe, data=None if data is None else str(data))
    console = terminal()
    try:
        with _Progress(console, plan.recipe.steps) as progress:
            found = run_comparison(plan, output, progress, names or None)
        written = [*draw_pictures(found, output), *Folder(output, plan).write_summary(found.rows, found.seconds)]
    except (ValueError, OSError) as wrong:
        terminal(stderr=True, soft_wrap=True).print(str(wrong), style="bold red", markup=False)
        raise typer.Exit(1) from wrong
    _print_criteria(console, found)
    _print_distances(console, found)
    listed = ", ".join(path.name for path in written)
    console.print(
        f"\nIn {found.seconds:.0f} s. Written to {output.resolve()}: {listed}", highlight=False, soft_wrap=True
    )


class _Progress(TrainingBar):
    """See ``comparison.experiment.Reporter``."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(console)
        self._steps = steps

    def __enter__(self) -> _Progress:
        super().__enter__()
        return self

    def finished(self, row: Row) -> None:
        self.ended(f"{row.criterion}, seed {row.seed}", row.first_loss, row.last_loss, self._steps, row.seconds)


def _print_criteria(console: Console, found: Comparison) -> None:
    from ..lab.criteria import MARGINS, SOFTMAX

    names = list(dict.fromkeys(row.criterion for row in found.rows))
    table = plain_table(
        f"people never seen in training: mean ± deviation over the seeds ({len(found.plan.seeds)})",
        "accuracy",
        "TAR",
        "rank 1",
        "s",
        "ms",
        "MB",
    )
    table.padding = (0, 1, 0, 0)
    for name in names:
        rows = found.of(name)
        table.add_row(
            name,
            spread([row.accuracy for row in rows]),
            spread([row.tar["0.01"] for row in rows]),
            spread([row.rank1 for row in rows]),
            f"{sum(row.seconds for row in rows) / len(rows):.1f}",
            f"{sum(row.head_milliseconds for row in rows) / len(rows):.1f}",
            "-" if rows[0].peak_bytes is None else f"{rows[0].peak_bytes / 1e6:.0f}",
        )
    console.print(table)
    console.print(
        "Verification: accuracy over 10 folds, TAR at FAR 0.01. Identification: rank 1,\n"
        "one image a person in the gallery. s: of a training; ms: of the loss's forward\n"
        "and backward pass; MB: peak of training steps beyond images, weights, optimizer.\n",
        highlight=False,
    )
    softmax = found.of(SOFTMAX)
    for name in MARGINS:
        gains = [a.tar["0.01"] - b.tar["0.01"] for a, b in zip(found.of(name), softmax, strict=False)]
        if gains:
            above = f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
            mean = sum(gains) / len(gains)
            console.print(f"{name} is above softmax in {above}, by {mean:+.3f} of TAR in the mean.", highlight=False)


def _print_distances(console: Console, found: Comparison) -> None:
    from ..lab.comparison import WITH_DISTANCES

    for name in WITH_DISTANCES:
        rows = found.of(name)
        if not rows:
            continue
        table = plain_table(f"\n{name}'s embeddings, as the net gives them, by distance", "accuracy", "TAR", "rank 1")
        for distance in rows[0].distances:
            figures = [row.distances[distance] for row in rows]
            table.add_row(distance, *(spread([each[key] for each in figures]) for key in ("accuracy", "tar", "rank1")))
        console.print(table)
