"""The command ``compare``: the field's losses on the same net, images and seeds; tables, pictures and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import WrongOption, check_folder
from .progress import TrainingBar
from .reporting import NAME, NoReport, ReportFile, ReportInOutput
from .terminal import terminal


def compare(
    output: Annotated[
        Path, "Folder for results. It is created if it does not exist; an interrupted run resumes from it."
    ] = Path("runs/compare"),
    data: Annotated[
        Path | None,
        "A folder with one subfolder of images for each identity, or a .rec file. Every image is made "
        "32 × 32 pixels and gray. Default: generated identities.",
    ] = None,
    criteria: Annotated[
        str,
        "Losses to compare, separated by semicolons, in any case: softmax; contrastive; contrastive, two "
        "views; triplet, semi-hard; triplet, batch-hard; center loss; NormSoftmax; SphereFace; CosFace; ArcFace; "
        "AdaFace. Default: all of them.",
    ] = "",
    seeds: Annotated[int, typer.Option(min=1), "Number of trainings of each loss."] = 3,
    steps: Annotated[int | None, typer.Option(min=2), "Steps of each training. Default: 300."] = None,
    batch_size: Annotated[int | None, typer.Option(min=8), "Images in each step. Default: 128."] = None,
    quick: Annotated[
        bool, typer.Option("--quick"), "Run a few steps on tiny sets, only to see that the command works."
    ] = False,
    report: ReportInOutput = None,
    no_report: NoReport = False,
) -> None:
    """Train a small net with each of many losses and evaluate it on unseen identities.

    The losses are softmax, contrastive (supervised and self-supervised),
    triplet, center loss, NormSoftmax, SphereFace, CosFace, ArcFace and
    AdaFace. The net takes gray images of 32 × 32 pixels, so the results
    rank losses but say little about a large net. This takes some minutes
    on two cores.
    """
    settings = dict(locals())
    from fused_arcface.base.extras import pyplot, require

    from ..drawing import write_pictures
    from ..lab.comparison import chosen_criteria, run_comparison
    from ..lab.comparison_pictures import comparison_drawings
    from ..lab.plans import comparison_plan
    from ..lab.record import Folder
    from ..report.comparison import comparison_report
    from .lab_tables import COLUMNS, comparison_gains, comparison_tables, print_comparison, print_plan
    from .tables import say_written

    # A missing library is named before the minutes are spent, not after.
    require("sklearn.metrics", "compare")
    require("pytorch_metric_learning.losses", "compare")
    pyplot()
    names = [name.strip() for name in criteria.split(";") if name.strip()]
    try:
        chosen = chosen_criteria(names)
    except ValueError as error:
        raise WrongOption(str(error)) from None
    check_folder("--output", output)
    page = ReportFile(report, no_report, output / NAME)
    plan = comparison_plan(quick, None if data is None else str(data), seeds, steps, batch_size)
    console = terminal()
    folder = Folder(output, plan)
    print_plan(console, plan)
    with TrainingBar(console) as progress:
        found = run_comparison(plan, folder, progress, chosen)
    written = write_pictures(comparison_drawings(found), output)
    written += folder.write_summary(found.rows, found.seconds)
    words = [COLUMNS, *comparison_gains(found)]
    written += page.write(lambda: comparison_report(found, comparison_tables(found), words, settings))
    print_comparison(console, found)
    say_written(console, output, written, found.seconds)
