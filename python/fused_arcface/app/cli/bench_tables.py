"""The printed results of ``bench``."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Column, Table

from ..benchmark.cases import PASSES, Case
from ..benchmark.report import Measurement, Report, Skip
from .tables import digits, numbers, titled

_LOOK: dict[str, Any] = {"box": box.SIMPLE, "pad_edge": False}


def case_tables(report: Report, case: Case) -> list[Table]:
    """Make a table for each pass of one case, fastest first."""
    tables = []
    for pass_name in PASSES:
        found = [each for each in report.measurements if (each.case, each.pass_name) == (case, pass_name)]
        if not found:
            continue
        products = report.products_ms(case, pass_name)
        figures = numbers("ms", "p20–p80", "ps/logit", "÷ products", "of ceiling", "peak MiB", "error")
        table = titled(f"{case}, {pass_name}", Column("provider", no_wrap=True), *figures, **_LOOK)
        for each in sorted(found, key=lambda each: each.ms):
            table.add_row(*_cells(each, products, report.share_of_ceiling(each)), style="bold" if each.is_ours else "")
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


def ceilings(report: Report) -> str:
    """Describe the machine's measured rates."""
    found = [f"{dtype} product {rate / 1e9:,.0f}" for dtype, rate in report.machine["flops_per_second"].items()]
    fma = report.machine.get("fma_flops_per_second")
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
    figures = numbers("identities", "bytes each", "step ms", "", no_wrap=True)
    table = titled(title, "recipe", "centers", "momentum", *figures, **_LOOK)
    for row in sorted(rows, key=lambda row: -row["max_C"]):
        step = "" if row["step_ms"] is None else f"{row['step_ms']:.0f}"
        names = (f"{row['recipe']} ({row['backend']})", row["weight_dtype"], row["momentum_dtype"])
        table.add_row(*names, f"{row['max_C']:,}", f"{row['bytes_per_class']:,.0f}", step, row["how"])
    return table


def ranks_table(rows: list[dict[str, Any]]) -> Table:
    """Make a table of predicted and measured steps on several processes."""
    title = "A training step on several processes: the cost model beside what was measured"
    figures = numbers("ranks", "N", "identities", "predicted ms", "measured ms", "measured ÷ predicted")
    table = titled(title, *figures, "limited by", **_LOOK)
    for row in rows:
        predicted, measured = row["predicted_ms"], row["measured_ms"]
        times = (digits(predicted), digits(measured), f"{measured / predicted:.2f}")
        table.add_row(str(row["ranks"]), str(row["N"]), f"{row['C']:,}", *times, row["limit"])
    return table
