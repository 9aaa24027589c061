"""The command ``bench``: throughput and memory of every backend and every peer on this machine."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import WrongOption, check_folder
from .evaluation import write_json
from .progress import spinner
from .reporting import NAME, NoReport, ReportFile, ReportInOutput
from .tables import digits, plain_table, say_written
from .terminal import terminal

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

    from ..benchmark.capacity import all_setups
    from ..benchmark.cases import cases_named
    from ..benchmark.names import chosen
    from ..benchmark.providers import all_providers
    from ..benchmark.runner import run_benchmark
    from .bench_results import bench_report
    from .bench_runs import run_capacities, run_cases, run_processes

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
        implementations = chosen(all_providers(), names, backend) if budget is None else ()
        setups = () if budget is None else chosen(all_setups(), names, backend)
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
        written = run_processes(console, output, [*map(int, world_sizes)])
    elif budget is not None:
        written = run_capacities(console, output, resume, on, setups, int(budget * 2**30))
    else:
        run = partial(run_benchmark, shapes, implementations, on, seconds=seconds, with_memory=with_memory)
        written, right = run_cases(console, output, resume, on, run)
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
