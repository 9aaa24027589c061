"""The command ``demo``: train, compare, verify; tables on the terminal, pictures and numbers in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import check_folder
from .progress import TrainingBar
from .terminal import terminal


def demo(
    output: Annotated[Path, "Folder for pictures and numbers. It is created if it does not exist."] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick"), "Run a few steps on tiny sets, only to see that the command works."
    ] = False,
) -> None:
    """Train with the fused head and with plain PyTorch, compare them, and verify unseen identities.

    Softmax, NormSoftmax and ArcFace are trained on generated identities and
    on handwritten digits, three times each. This takes about two minutes on
    two cores. The exit status is 1 if the two do not agree.
    """
    from fused_arcface.base.extras import pyplot, require

    # A missing library is named before the minutes are spent, not after.
    require("sklearn.metrics")
    pyplot()
    check_folder("--output", output)

    from ..drawing import write_pictures
    from ..lab import plans
    from ..lab.demo import run_demo
    from ..lab.demo_pictures import demo_drawings
    from ..lab.record import write_numbers
    from .lab_tables import print_demo, print_plan
    from .tables import say_written

    console = terminal()
    plan = plans.QUICK_DEMO if quick else plans.DEMO
    print_plan(console, plan)
    with TrainingBar(console) as progress:
        found = run_demo(plan, progress)
    print_demo(console, found)
    paths = [*write_pictures(demo_drawings(found), output), write_numbers(found, output)]
    say_written(console, output, paths, found.seconds)
    for broken in found.broken():
        terminal(stderr=True, soft_wrap=True).print(f"FAILED: {broken}", style="bold red", markup=False)
    if found.broken():
        raise typer.Exit(1)
