"""The runs of ``bench``, each with its tables, pictures and files: shapes, capacities, several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import typer
from rich.console import Console

from fused_arcface.base.extras import MissingExtra

from ..benchmark import memory
from ..benchmark.capacity import TrainingSetup, run_capacity
from ..benchmark.cases import Case
from ..benchmark.plots import capacity_drawing, run_drawings
from ..benchmark.ranks import run_ranks
from ..benchmark.report import Report, check_same, read_json, read_report, write_rows
from ..benchmark.stored_model import computed_rows
from ..drawing import Drawing, write_pictures
from ..measure import machine
from .bench_results import capacity_table, case_tables, ceilings, ranks_table, skip_tables
from .errors import WrongOption
from .progress import spinner


def run_cases(
    console: Console, output: Path, resume: bool, device: torch.device, run: Callable[..., Report]
) -> tuple[list[Path], bool]:
    """Time shapes; ``run`` is ``run_benchmark`` with what to measure.

    Returns:
        The files, and true if something was measured and every result of this package is right.
    """

    def on_case(found: Report, case: Case) -> None:
        found.write(output)
        console.print(*case_tables(found, case))

    earlier = None
    if resume:
        with _resuming(output, "run"):
            earlier = read_report(output)
            check_same(earlier.context, machine.context(device), "device", "torch", "commit")
    with _interruptible(console, output / "run.json") as tell:
        report = run(earlier=earlier, progress=tell, on_case=on_case)
    console.print(*skip_tables(report.skips))
    written = report.write(output) + _draw(console, run_drawings(report), output)
    console.print(f"{report.context['device']}, torch {report.context['torch']}; {ceilings(report)}", highlight=False)
    return written, report.has_measured() and not report.has_wrong_result_of_ours()


def run_capacities(
    console: Console, output: Path, resume: bool, device: torch.device, setups: Sequence[TrainingSetup], budget: int
) -> list[Path]:
    """Find the most identities that fit; return the files."""
    earlier = []
    if resume:
        here = {"budget_bytes": budget, **machine.context(device)}
        with _resuming(output, "capacities"):
            for row in read_json(output / "capacity.json"):
                check_same(row, here, "budget_bytes", "device", "torch")
                if row["how"] != "computed":
                    earlier.append(row)
    memory.release(device)
    with _interruptible(console, output / "capacity.json") as tell:
        try:
            on_row = partial(write_rows, output, "capacity")
            rows, skips = run_capacity(setups, device, budget, earlier=earlier, progress=tell, on_row=on_row)
        except RuntimeError as error:
            raise WrongOption(str(error)) from None
    if not rows:
        console.print(*skip_tables(skips))
        raise typer.Exit(1)
    every = [*rows, *computed_rows(device, budget, rows[0]["N"], rows[0]["D"], output)]
    console.print(capacity_table(every, budget), *skip_tables(skips))
    return write_rows(output, "capacity", every) + _draw(console, [capacity_drawing(rows)], output)


def run_processes(console: Console, output: Path, world_sizes: list[int]) -> list[Path]:
    """Run a training step on several processes beside the cost model; return the files."""
    with spinner(console) as tell:
        rows = run_ranks(world_sizes, tell)
    console.print(ranks_table(rows))
    return write_rows(output, "ranks", rows)


@contextmanager
def _resuming(folder: Path, what: str) -> Iterator[None]:
    """Turn the errors of reading an earlier run into those of ``--resume``."""
    try:
        yield
    except FileNotFoundError:
        raise WrongOption(f"--resume: {folder} holds no {what} to resume") from None
    except ValueError as error:
        raise WrongOption(f"--resume: {error}") from None


@contextmanager
def _interruptible(console: Console, file: Path) -> Iterator[Callable[[str], None]]:
    """Show a spinner; yield a function that sets its text. After Ctrl-C say if the block wrote results to resume."""
    before = file.stat().st_mtime_ns if file.exists() else None
    try:
        with spinner(console) as tell:
            yield tell
    except KeyboardInterrupt:
        where = (
            f"What was found is in {file.parent}; --resume continues after it."
            if file.exists() and file.stat().st_mtime_ns != before
            else "Nothing new was found."
        )
        console.print(f"Interrupted. {where}", markup=False)
        raise typer.Exit(130) from None


def _draw(console: Console, drawings: list[Drawing], output: Path) -> list[Path]:
    """Write pictures; without matplotlib there are none, and a line says so."""
    try:
        return write_pictures(drawings, output)
    except MissingExtra as missing:
        console.print(f"No pictures: {missing}", markup=False)
        return []
