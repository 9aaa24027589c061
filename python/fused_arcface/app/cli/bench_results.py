"""The results of ``bench``: tables, and the report of a folder with the results of this call and of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from ..benchmark.cases import PASSES, Case
from ..benchmark.plots import capacity_drawing, run_drawings
from ..benchmark.report import Measurement, Skip, read_json, read_report
from ..benchmark.report import Report as Run
from ..report.document import Report, Section, about
from .tables import digits, numbers, titled

_LOOK: dict[str, Any] = {"box": box.SIMPLE, "pad_edge": False}


def case_tables(run: Run, case: Case) -> list[Table]:
    """Make a table for each pass of one case, fastest first."""
    tables = []
    for pass_name in PASSES:
        found = [each for each in run.measurements if (each.case, each.pass_name) == (case, pass_name)]
        if not found:
            continue
        products = next((each.ms for each in found if each.provider == "products"), None)
        columns = numbers("ms", "p20–p80", "ps/logit", "÷ products", "of ceiling", "peak MiB", "error")
        table = titled(f"{case}, {pass_name}", Column("provider", no_wrap=True), *columns, **_LOOK)
        for each in sorted(found, key=lambda each: each.ms):
            table.add_row(*_cells(each, products, run.share_of_ceiling(each)), style="bold" if each.is_ours else "")
        tables.append(table)
    return tables


def _cells(each: Measurement, products: float | None, share: float | None) -> list[str]:
    return [
        each.label,
        digits(each.ms),
        f"{digits(each.timing.quantile(0.2))}–{digits(each.timing.quantile(0.8))}",
        digits(each.ps_per_logit),
        "" if products is None else f"{each.ms / products:.2f}",
        "" if share is None else f"{share:.0%}",
        "" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:,.1f}",
        f"{each.error:.0e}",
    ]


def ceilings(run: Run) -> str:
    """Describe the machine's measured rates."""
    found = [f"{dtype} product {rate / 1e9:,.0f}" for dtype, rate in run.machine["flops_per_second"].items()]
    fma = run.machine.get("fma_flops_per_second")
    found += [] if fma is None else [f"fp32 multiply-adds in registers {fma / 1e9:,.0f}"]
    return f"GFLOP/s: {', '.join(found)}"


def skip_tables(skips: list[Skip]) -> list[Table]:
    """Make a table of the providers that were not measured: one line for each reason."""
    cases: dict[tuple[str, str], list[Case | None]] = {}
    for skip in skips:
        cases.setdefault((f"{skip.provider} ({skip.backend})", skip.reason), []).append(skip.case)
    if not cases:
        return []
    table = titled("Not measured", "provider", "cases", "reason", **_LOOK)
    for (provider, reason), where in cases.items():
        several = f"{len(where)} cases" if len(where) > 1 else str(where[0])
        table.add_row(provider, "all" if where[0] is None else several, reason)
    return [table]


def capacity_table(rows: list[dict[str, Any]], budget_bytes: int) -> Table:
    """Make a table of the most identities that fit, most first."""
    title = f"Most identities with a training step that fits into {budget_bytes / 2**30:.3g} GiB"
    columns = numbers("identities", "bytes each", "step ms", "", no_wrap=True)
    table = titled(title, "recipe", "centers", "momentum", *columns, **_LOOK)
    for row in sorted(rows, key=lambda row: -row["max_C"]):
        step = "" if row["step_ms"] is None else f"{row['step_ms']:.0f}"
        names = (f"{row['recipe']} ({row['backend']})", row["weight_dtype"], row["momentum_dtype"])
        table.add_row(*names, f"{row['max_C']:,}", f"{row['bytes_per_class']:,.0f}", step, row["how"])
    return table


def ranks_table(rows: list[dict[str, Any]]) -> Table:
    """Make a table of predicted and measured steps on several processes."""
    title = "A training step on several processes: the cost model beside what was measured"
    columns = numbers("ranks", "N", "identities", "predicted ms", "measured ms", "measured ÷ predicted")
    table = titled(title, *columns, "limited by", **_LOOK)
    for row in rows:
        predicted, measured = row["predicted_ms"], row["measured_ms"]
        times = (digits(predicted), digits(measured), f"{measured / predicted:.2f}")
        table.add_row(str(row["ranks"]), str(row["N"]), f"{row['C']:,}", *times, row["limit"])
    return table


def bench_report(folder: Path, options: Mapping[str, Any]) -> Report:
    """Return the report of a folder of ``bench``: ``rows.json`` and ``run.json``, ``capacity.json``, ``ranks.json``.

    Any of them may be missing.
    """
    sections = []
    if (folder / "run.json").is_file():
        sections += _run(read_report(folder))
    if capacities := _rows(folder / "capacity.json"):
        table = capacity_table(capacities, capacities[0]["budget_bytes"])
        sections.append(Section("Most identities", _source(capacities[0]), [capacity_drawing(capacities)], [table]))
    if ranks := _rows(folder / "ranks.json"):
        sections.append(Section("Several processes", _source(ranks[0]), tables=[ranks_table(ranks)]))
    summary = (
        "The head beside other libraries. Every result was compared with fp64 before it was timed; times are medians."
    )
    return Report("Benchmark", summary, [*sections, *about(options)])


def _run(run: Run) -> list[Section]:
    cases = dict.fromkeys(each.case for each in run.measurements if not each.provider.startswith("ceiling"))
    tables = [table for case in cases for table in case_tables(run, case)]
    words = (
        f"{_source(run.context)} {ceilings(run)}. p20–p80: range of the samples; ÷ products: beside the bare matrix "
        "products; of ceiling: share of the highest rate that the machine reached; peak: memory beyond inputs, class "
        "centers and gradients; error: largest relative one to fp64."
    )
    skipped = skip_tables(run.skips)
    return [
        Section("Pictures", drawings=run_drawings(run)),
        Section("Times", words, tables=tables),
        *([Section("Not measured", tables=skipped)] if skipped else []),
    ]


def _rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier call, none if there was none."""
    return read_json(file) if file.is_file() else []


def _source(measured: Mapping[str, Any]) -> str:
    """Return where and when figures were measured, given a row or a run's context."""
    return f"{measured['device']}; torch {measured['torch']}; commit {measured['commit']}, {measured['date'][:10]}."
