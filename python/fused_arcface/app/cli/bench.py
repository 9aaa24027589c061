"""The command ``bench``: throughput and memory of every backend and every peer on this machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .errors import WrongOption, check_folder
from .evaluation import write_json
from .progress import spinner
from .reporting import NAME, NoReport, ReportFile, ReportInOutput
from .tables import digits, plain_table, say_written
from .terminal import terminal

if TYPE_CHECKING:
    import torch

    from ..benchmark.cases import Case
    from ..benchmark.report import Report
    from ..drawing import Drawing


START = "start"
"""The value of ``--cases`` that measures no shapes, but the time that the package takes to start."""


def bench(
    cases: Annotated[
        str,
        "Set of shapes: quick, full, small or scaling. On two cores quick takes about one minute, full six "
        "minutes, scaling an hour. Or start, to measure what an import and --help cost.",
    ] = "quick",
    providers: Annotated[
        str | None, 'Implementations to measure, separated by commas; "ours" means all of this package. Default: all.'
    ] = None,
    backend: Annotated[
        str | None, "Measure this package with one backend only, for example cpu. Default: every backend."
    ] = None,
    output: Annotated[Path, "Folder for rows (CSV and JSON, written after each case) and pictures."] = Path(
        "runs/bench"
    ),
    device: Annotated[
        str | None, "Device to measure on: cpu or cuda. Default: cuda if there is a GPU, else cpu."
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1), "Number of CPU threads. Default: PyTorch's own number."] = None,
    seconds: Annotated[float, typer.Option(min=0.0), "Time in seconds for measuring one shape and pass."] = 3.0,
    with_memory: Annotated[
        bool, typer.Option("--memory/--no-memory"), "Measure peak memory as well (Linux or a GPU)."
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume"), "Resume the interrupted run in --output after its last complete case."
    ] = False,
    budget: Annotated[
        float | None,
        "Memory in GiB. Find the largest number of identities whose training step fits into it, instead of "
        "timing shapes.",
    ] = None,
    ranks: Annotated[
        str | None,
        'Numbers of processes, for example "1,2,4". Run a training step on each and compare it with the cost '
        "model, instead of timing shapes.",
    ] = None,
    report: ReportInOutput = None,
    no_report: NoReport = False,
) -> None:
    """Measure throughput and memory of the head beside other libraries.

    Each result is checked against fp64 before it is timed. The exit status
    is 1 if a result of this package is wrong or nothing could be measured.
    """
    settings = dict(locals())
    if cases == START:
        check_folder("--output", output)
        _run_start(terminal(), output)
        return
    import torch

    from ..benchmark.cases import cases_named
    from ..benchmark.providers import select
    from .bench_results import bench_report

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise WrongOption(f"--device must be cpu or cuda; got {device}")
    on = torch.device(device)
    if on.type == "cuda" and not torch.cuda.is_available():
        raise WrongOption("--device cuda needs a GPU, and torch sees none here")
    if threads is not None:
        torch.set_num_threads(threads)
    names = None if providers is None else [name.strip() for name in providers.split(",") if name.strip()]
    # Piped output is not wrapped to the width of a terminal.
    console = terminal() if terminal().is_terminal else terminal(width=140)
    try:
        shapes = cases_named(cases, on.type)
        chosen = select(names if budget is None else None, backend)
    except ValueError as error:
        raise WrongOption(str(error)) from None
    if budget is not None and not 0 < budget < math.inf:
        raise WrongOption(f"--budget must be > 0 and finite; got {budget}")
    if budget is not None and ranks is not None:
        raise WrongOption("--budget and --ranks can't be given together")
    world_sizes = [] if ranks is None else [each.strip() for each in ranks.split(",")]
    if not all(each.isdecimal() and int(each) >= 1 for each in world_sizes):
        raise WrongOption(f"--ranks must be numbers >= 1, comma-separated; got {ranks!r}")
    check_folder("--output", output)
    page = ReportFile(report, no_report, output / NAME)
    right = True
    if world_sizes:
        written = _run_ranks(console, [*map(int, world_sizes)], output)
    elif budget is not None:
        written = _run_capacity(console, output, on, int(budget * 2**30), resume, names=names, backend=backend)
    else:
        earlier = _interrupted_run(output, on) if resume else None
        how = {"seconds": seconds, "with_memory": with_memory, "earlier": earlier}
        written, right = _run_cases(console, output, shapes, chosen, on, **how)
    written += page.write(lambda: bench_report(output, settings))
    say_written(console, output, written)
    if not right:
        raise typer.Exit(1)


def _run_start(console: Console, output: Path) -> None:
    from ..measure.startup import BOUND, PARTS, fastest

    found: dict[str, float] = {}  # milliseconds
    with spinner(console) as tell:
        for part in PARTS:
            tell(part)
            found[part] = round(1e3 * fastest(part), 1)
    table = plain_table("processor time of a start", "ms")
    for part, milliseconds in found.items():
        table.add_row(part, digits(milliseconds))
    console.print(table)
    console.print("An import is measured beyond `import torch`.", highlight=False)
    write_json(output / "start.json", {"rows": [{"part": part, "ms": ms} for part, ms in found.items()]})
    say_written(console, output, [output / "start.json"])
    if max(found.values()) > 1e3 * BOUND:
        raise typer.Exit(1)


def _run_cases(console: Console, output: Path, *what: Any, **how: Any) -> tuple[list[Path], bool]:
    """Call ``run_benchmark`` with ``what`` and ``how``, print its results and write them.

    Returns:
        The files, and true if something was measured and every result of this package is right.
    """
    from ..benchmark.plots import run_drawings
    from ..benchmark.runner import run_benchmark
    from .bench_results import case_tables, ceilings, skip_tables

    kept: list[Case] = []

    def on_case(found: Report, case: Case) -> None:
        found.write(output)
        kept.append(case)
        console.print(*case_tables(found, case))

    try:
        with spinner(console) as tell:
            report = run_benchmark(*what, **how, progress=lambda case, step: tell(f"{case}  {step}"), on_case=on_case)
    except KeyboardInterrupt:
        where = f"The cases above are in {output}; --resume continues after them." if kept else "No case was complete."
        console.print(f"Interrupted. {where}", markup=False)
        raise typer.Exit(130) from None
    console.print(*skip_tables(report.skips))
    written = report.write(output) + _draw(console, run_drawings(report), output)
    console.print(f"{report.context['device']}, torch {report.context['torch']}; {ceilings(report)}", highlight=False)
    return written, report.has_measured() and not report.has_wrong_result_of_ours()


def _interrupted_run(folder: Path, device: torch.device) -> Report:
    from ..benchmark.report import read_report
    from ..benchmark.runner import check_same_machine

    try:
        report = read_report(folder)
        check_same_machine(report, device)
    except FileNotFoundError:
        raise WrongOption(f"--resume: {folder} holds no run to resume") from None
    except ValueError as error:
        raise WrongOption(f"--resume: {error}") from None
    return report


def _run_capacity(
    console: Console, output: Path, device: torch.device, budget_bytes: int, resume: bool, **how: Any
) -> list[Path]:
    """Call ``run_capacity`` with ``how``, print its results, write them and return the files."""
    from ..benchmark import capacity, memory
    from ..benchmark.plots import capacity_drawing
    from ..benchmark.stored_model import computed_rows
    from .bench_results import capacity_table, skip_tables

    memory.release(device)
    try:
        earlier = capacity.read(output, budget_bytes, device) if resume else []
        how["earlier"] = [row for row in earlier if row["how"] != "computed"]
        how["on_row"] = lambda rows: capacity.write(output, rows)
        with spinner(console) as tell:
            rows, skips = capacity.run_capacity(device, budget_bytes, **how, progress=tell)
    except FileNotFoundError:
        raise WrongOption(f"--resume: {output} holds no capacities to resume") from None
    except (ValueError, RuntimeError) as error:
        raise WrongOption(str(error)) from None
    except KeyboardInterrupt:
        console.print(f"Interrupted. What was found is in {output}; --resume continues after it.", markup=False)
        raise typer.Exit(130) from None
    if not rows:
        console.print(*skip_tables(skips))
        raise typer.Exit(1)
    every = [*rows, *computed_rows(device, budget_bytes, rows[0]["N"], rows[0]["D"], output)]
    console.print(capacity_table(every, budget_bytes), *skip_tables(skips))
    return capacity.write(output, every) + _draw(console, [capacity_drawing(rows)], output)


def _draw(console: Console, drawings: list[Drawing], output: Path) -> list[Path]:
    """Write pictures; without matplotlib there are none, and a line says so."""
    from fused_arcface.base.extras import MissingExtra

    from ..drawing import write_pictures

    try:
        return write_pictures(drawings, output)
    except MissingExtra as missing:
        console.print(f"No pictures: {missing}", markup=False)
        return []


def _run_ranks(console: Console, world_sizes: list[int], output: Path) -> list[Path]:
    from ..benchmark import ranks
    from .bench_results import ranks_table

    with spinner(console) as tell:
        rows = ranks.run_ranks(world_sizes, tell)
    console.print(ranks_table(rows))
    return ranks.write(output, rows)
