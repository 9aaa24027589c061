"""``demo``: train, compare, verify; tables on the terminal, pictures and numbers in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .progress import TrainingBar
from .tables import plain_table, spread
from .terminal import terminal

if TYPE_CHECKING:
    from ..lab.cost import Cost
    from ..lab.demo import Demo, Result, Training


def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures and numbers, made if it is missing.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps on tiny sets: shows that it works, no more.")
    ] = False,
) -> None:
    """Train with the fused and the reference head, compare them, and verify on identities never seen in training.

    Takes about two minutes on two cores. Exit status 1 if fused and reference do not agree.
    """
    from fused_arcface.base.extras import pyplot, require

    # What is missing is said before the minutes are spent, not after.
    require("sklearn.metrics")
    pyplot()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--output {output} cannot be made: {error.strerror}") from None

    import torch

    from fused_arcface import backends

    from ..lab.demo import run_demo
    from ..lab.demo_pictures import draw_pictures
    from ..lab.demo_record import write_numbers
    from ..lab.problems import FULL, QUICK

    console = terminal()
    plan = QUICK if quick else FULL
    backend = backends.select("auto", torch.device("cpu"))
    console.print(f"The fused head runs on the {backend} backend, {torch.get_num_threads()} threads.", highlight=False)
    for problem in plan.problems:
        console.print(f"[bold]{problem.name}[/]: {problem.describe}", highlight=False)
    with _Progress(console) as progress:
        found = run_demo(plan, progress)
    for result in found.results:
        _print_agreement(console, result)
        _print_verification(console, result)
    _print_costs(console, found)
    paths = draw_pictures(found, output)
    numbers = output / "numbers.json"
    write_numbers(found, numbers)
    names = ", ".join(path.name for path in (*paths, numbers))
    console.print(
        f"\nIn {found.seconds:.0f} s. Written to {output.resolve()}: {names}", highlight=False, soft_wrap=True
    )
    for broken in found.broken():
        terminal(stderr=True, soft_wrap=True).print(f"FAILED: {broken}", style="bold red", markup=False)
    if found.broken():
        raise typer.Exit(1)


class _Progress(TrainingBar):
    """See ``demo.experiment.Reporter``."""

    def __enter__(self) -> _Progress:
        super().__enter__()
        return self

    def trained(self, training: Training) -> None:
        name = f"{training.problem}, {training.criterion}, seed {training.seed}"
        losses = training.losses
        self.ended(name, losses[0], losses[-1], len(losses), training.seconds)


def _print_agreement(console: Console, result: Result) -> None:
    from ..lab.problems import CURVE_BOUND, CURVE_STEPS, STEP_BOUND

    table = plain_table(f"{result.problem.name}: fused and reference head", "worst", "bound")
    steps = len(result.agreement.errors["loss"])
    for quantity, worst in result.agreement.worst().items():
        table.add_row(f"{quantity}, relative, same embeddings, {steps} steps", f"{worst:.1e}", f"{STEP_BOUND:.0e}")
    shown = f"loss of two trainings, first {min(CURVE_STEPS, steps)} steps"
    table.add_row(shown, f"{result.curve_difference:.1e}", f"{CURVE_BOUND:.0e}")
    console.print(table)


def _print_verification(console: Console, result: Result) -> None:
    from ..lab.demo import ARCFACE, HEADS, SOFTMAX

    seeds = sorted({training.seed for training in result.trainings})
    rates = [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else []
    table = plain_table(
        f"{result.problem.name}: verification on unseen identities", "accuracy", "TAR at FAR 0.01", *rates
    )
    found = {"pixels, no net": result.pixels}
    found |= {criterion: [training.verification for training in result.of(criterion)] for criterion in HEADS}
    for name, verifications in found.items():
        tars = [each.tar[1e-2] for each in verifications]
        per_seed = [f"{tar:.3f}" for tar in tars] if rates else []
        table.add_row(name, spread([each.accuracy for each in verifications]), spread(tars), *per_seed)
    console.print(table)
    gains = [a.tar[1e-2] - b.tar[1e-2] for a, b in zip(found[ARCFACE], found[SOFTMAX], strict=True)]
    above = f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
    mean = sum(gains) / len(gains)
    console.print(f"ArcFace is above softmax in {above}, by {mean:+.3f} of TAR in the mean. {result.problem.remark}\n")


def _print_costs(console: Console, found: Demo) -> None:
    table = plain_table("the head: time and peak extra memory, forward and backward", *("fused", "reference") * 2)
    problems = []
    for cost in found.costs:
        times = (f"{cost.milliseconds[name]:.2f} ms" for name in ("fused", "reference"))
        table.add_row(str(cost.case), *times, *(_megabytes(cost, name) for name in ("fused", "reference")))
        problems += [cost.problem] if cost.problem else []
    console.print(table)
    console.print("Extra: beyond embeddings, class centers and their two gradients.")
    for problem in problems:
        console.print(problem, style="yellow", markup=False)


def _megabytes(cost: Cost, name: str) -> str:
    size = cost.peak_bytes[name]
    return "not measured" if size is None else f"{size / 1e6:.1f} MB"
