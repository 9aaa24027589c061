"""The report of ``bench``: the results in its folder, from this call and from earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..benchmark.plots import capacity_drawing, run_drawings
from ..benchmark.report import Report as Run
from ..benchmark.report import read_json, read_report
from ..report.document import Report, Section, about
from .bench_tables import capacity_table, case_tables, ceilings, ranks_table, skip_tables


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
