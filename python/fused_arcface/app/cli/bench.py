"""The command ``bench``: throughput and memory of every backend and every peer on this machine."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .terminal import terminal

if TYPE_CHECKING:
    import torch

    from ..benchmark.cases import Case
    from ..benchmark.report import Measurement, Report, Skip


def bench(
    cases: Annotated[str, typer.Option(help="Shapes: quick, full, small or scaling.")] = "quick",
    providers: Annotated[
        str | None, typer.Option(help='Comma-separated names; "ours" stands for all of this package. All if not given.')
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Of this package's providers, only this backend's.")] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for the rows (CSV, JSON), written after each case, and the pictures.")
    ] = Path("runs/bench"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on a CPU; torch's own number if not given.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Spent on the samples of one case and pass.")] = 3.0,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --output, at the case it was at.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(help="GiB: search the most identities whose training step fits, in place of the cases."),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(help='"1,2,4": run the step on so many processes beside the cost model, in place of the cases.'),
    ] = None,
) -> None:
    """Measure throughput and memory of the head beside its peers; each result is checked against fp64 first.

    quick takes about a minute on two cores, full about six, scaling an hour. Exit status 1 if a result of this package
    is wrong or nothing could be measured.
    """
    import torch

    from fused_arcface.base.extras import MissingExtra

    from ..benchmark import plots
    from ..benchmark.cases import cases_named
    from ..benchmark.providers import select
    from ..benchmark.runner import run_benchmark

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda; got {device}", param_hint="--device")
    on = torch.device(device)
    if on.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("cuda was asked for; torch sees no GPU here", param_hint="--device")
    if threads is not None:
        torch.set_num_threads(threads)
    names = None if providers is None else [name.strip() for name in providers.split(",") if name.strip()]
    # Piped output is not wrapped to a terminal's width that nobody looks at.
    console = terminal() if terminal().is_terminal else terminal(width=140)
    try:
        shapes = cases_named(cases, on.type)
        chosen = select(names if budget is None else None, backend)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if budget is not None and not 0 < budget < math.inf:
        raise typer.BadParameter(f"must be > 0 and finite; got {budget}", param_hint="--budget")
    world_sizes = [] if ranks is None else [each.strip() for each in ranks.split(",")]
    if not all(each.isdecimal() and int(each) >= 1 for each in world_sizes):
        raise typer.BadParameter(f"must be numbers >= 1, comma-separated; got {ranks!r}", param_hint="--ranks")
    try:  # said before the minutes are spent, not after
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise typer.BadParameter(f"{output} cannot be written to: {error.strerror}", param_hint="--output") from None
    if world_sizes:
        _run_ranks(console, [*map(int, world_sizes)], output)
        return
    if budget is not None:
        _run_capacity(console, on, int(budget * 2**30), names, backend, output, resume)
        return
    earlier = _interrupted_run(output, on) if resume else None
    kept = False
    with _progress(console) as progress:
        task = progress.add_task("starting", total=None)

        def tell(case: str, step: str) -> None:
            progress.update(task, description=f"{case}  {step}")

        def on_case(found: Report, case: Case) -> None:
            nonlocal kept
            found.write(output)
            kept = True
            _print(console, _tables(found, case))

        try:
            report = run_benchmark(
                shapes,
                chosen,
                on,
                seconds=seconds,
                with_memory=with_memory,
                earlier=earlier,
                progress=tell,
                on_case=on_case,
            )
        except KeyboardInterrupt:
            progress.stop()
            where = (
                f"The cases above are in {output}; --resume goes on from there." if kept else "No case was complete."
            )
            console.print(f"Interrupted. {where}", markup=False)
            raise typer.Exit(130) from None
    _print(console, _skips(report.skips))
    written = report.write(output)
    try:
        written += plots.write_plots(report, output)
    except MissingExtra as missing:
        console.print(f"No pictures: {missing}", markup=False)
    console.print(f"{report.context['device']}, torch {report.context['torch']}; {_ceilings(report)}", highlight=False)
    _say_written(console, written)
    wrong = any(skip.reason.startswith("wrong") and skip.provider.startswith("fused_arcface") for skip in report.skips)
    if wrong or all(measurement.provider.startswith("ceiling") for measurement in report.measurements):
        raise typer.Exit(1)


def _interrupted_run(folder: Path, device: torch.device) -> Report:
    from ..benchmark.report import read_report
    from ..benchmark.runner import check_same_machine

    try:
        report = read_report(folder)
        check_same_machine(report, device)
    except FileNotFoundError:
        raise typer.BadParameter(f"{folder} holds no run to go on with", param_hint="--resume") from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--resume") from None
    return report


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console, transient=True
    )


def _print(console: Console, tables: list[Table]) -> None:
    for table in tables:
        console.print(table)


def _tables(report: Report, case: Case) -> list[Table]:
    """A table for each pass of one case, fastest first."""
    from ..benchmark.cases import PASSES

    tables = []
    for pass_name in PASSES:
        found = [each for each in report.measurements if (each.case, each.pass_name) == (case, pass_name)]
        if not found:
            continue
        products = report.products_ms(case, pass_name)
        table = _table(f"{case}, {pass_name}")
        table.add_column("provider", no_wrap=True)
        for column in ("ms", "p20–p80", "ps/logit", "÷ products", "of ceiling", "peak MiB", "error"):
            table.add_column(column, justify="right")
        for each in sorted(found, key=lambda each: each.ms):
            table.add_row(*_cells(each, products, report.share_of_ceiling(each)), style="bold" if each.is_ours else "")
        tables.append(table)
    return tables


def _cells(each: Measurement, products: float | None, share: float | None) -> list[str]:
    return [
        f"{each.provider} ({each.backend})" if each.is_ours else each.provider,
        _digits(each.ms),
        f"{_digits(each.timing.quantile(0.2))}–{_digits(each.timing.quantile(0.8))}",
        _digits(each.ps_per_logit),
        "" if products is None else f"{each.ms / products:.2f}",
        "" if share is None else f"{share:.0%}",
        "" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:,.1f}",
        f"{each.error:.0e}",
    ]


def _ceilings(report: Report) -> str:
    found = [f"{dtype} product {rate / 1e9:,.0f}" for dtype, rate in report.machine["flops_per_second"].items()]
    fma = report.machine.get("fma_flops_per_second")
    found += [] if fma is None else [f"fp32 multiply-adds in registers {fma / 1e9:,.0f}"]
    return f"GFLOP/s: {', '.join(found)}"


def _digits(value: float) -> str:
    """Three digits of a positive number, or its whole part.

    >>> _digits(1.2345), _digits(12345.6)
    ('1.23', '12346')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)


def _skips(skips: list[Skip]) -> list[Table]:
    """A table of who was not measured: a line for each reason, however many cases it holds for."""
    cases: dict[tuple[str, str], list[Case | None]] = {}
    for skip in skips:
        cases.setdefault((f"{skip.provider} ({skip.backend})", skip.reason), []).append(skip.case)
    if not cases:
        return []
    table = _table("Not measured")
    for column in ("provider", "cases", "reason"):
        table.add_column(column)
    for (provider, reason), where in cases.items():
        several = f"{len(where)} of them" if len(where) > 1 else str(where[0])
        table.add_row(provider, "all" if where[0] is None else several, reason)
    return [table]


def _run_capacity(
    console: Console,
    device: torch.device,
    budget_bytes: int,
    names: list[str] | None,
    backend: str | None,
    output: Path,
    resume: bool,
) -> None:
    from fused_arcface.base.extras import MissingExtra

    from ..benchmark import capacity, memory, plots

    memory.release(device)
    try:
        earlier = capacity.read(output, budget_bytes, device) if resume else []
        with _progress(console) as progress:
            task = progress.add_task("starting", total=None)
            rows, skips = capacity.run_capacity(
                device,
                budget_bytes,
                names=names,
                backend=backend,
                earlier=earlier,
                progress=lambda text: progress.update(task, description=text),
                on_row=lambda rows: capacity.write(output, rows),
            )
    except FileNotFoundError:
        raise typer.BadParameter(f"{output} holds no capacities to go on with", param_hint="--resume") from None
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    except KeyboardInterrupt:
        console.print(f"What was found is in {output}; --resume goes on from there.", markup=False)
        raise typer.Exit(130) from None
    _print(console, [_capacity_table(rows, budget_bytes), *_skips(skips)])
    if not rows:
        raise typer.Exit(1)
    written = capacity.write(output, rows)
    try:
        written.append(plots.write_capacity_plot(rows, output / "capacity.png"))
    except MissingExtra as missing:
        console.print(f"No picture: {missing}", markup=False)
    _say_written(console, written)


def _run_ranks(console: Console, world_sizes: list[int], output: Path) -> None:
    from ..benchmark import ranks

    with _progress(console) as progress:
        task = progress.add_task("starting", total=None)
        rows = ranks.run_ranks(world_sizes, lambda text: progress.update(task, description=text))
    table = _table("A training step on several processes: the cost model beside what was measured")
    for column in ("ranks", "N", "identities", "predicted ms", "measured ms", "measured ÷ predicted"):
        table.add_column(column, justify="right")
    table.add_column("limited by")
    for row in rows:
        predicted, measured = row["predicted_ms"], row["measured_ms"]
        figures = (_digits(predicted), _digits(measured), f"{measured / predicted:.2f}", row["limit"])
        table.add_row(str(row["ranks"]), str(row["N"]), f"{row['C']:,}", *figures)
    _print(console, [table])
    _say_written(console, ranks.write(output, rows))


def _say_written(console: Console, paths: list[Path]) -> None:
    console.print("written:", ", ".join(map(str, paths)), highlight=False, soft_wrap=True)


def _capacity_table(rows: list[dict[str, Any]], budget_bytes: int) -> Table:
    title = f"Most identities whose training step fits into {budget_bytes / 2**30:.3g} GiB"
    table = _table(title)
    for column in ("recipe", "centers", "momentum"):
        table.add_column(column)
    for column in ("identities", "bytes each", "step ms", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: -row["max_C"]):
        step = "" if row["step_ms"] is None else f"{row['step_ms']:.0f}"
        figures = (f"{row['max_C']:,}", f"{row['bytes_per_class']:,.0f}", step, row["how"])
        table.add_row(f"{row['recipe']} ({row['backend']})", row["weight_dtype"], row["momentum_dtype"], *figures)
    return table
