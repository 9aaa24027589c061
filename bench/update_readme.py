"""Put measured tables into README.md and bench/README.md, between their markers, from what lies under bench/results/.

    python bench/update_readme.py            write
    python bench/update_readme.py --check    exit status 1 if a file would change

A block reads ``<!-- bench: NAME FOLDER -->`` … ``<!-- /bench -->``, FOLDER one of bench/results/; the names:

    headline    forward + backward of the largest shape at which eager ran, a row for each provider
    shapes      milliseconds of every shape, forward + backward, a column for each of a few providers
    capacity    most identities within a memory budget
    pictures    the run's pictures
    model       the cost model of many devices (FOLDER: of a run whose rate to use, or "H200" for the modelled rate)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from fused_arcface.benchmark import cost_model, plots
from fused_arcface.benchmark.report import Measurement, Report, read_report

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
FILES = (BENCH.parent / "README.md", BENCH / "README.md")
_BLOCK = re.compile(r"(<!-- bench: (\w+) (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_PICTURES = ("time_by_classes.png", "memory_by_classes.png", "time_by_rows.png", "roofline.png", "capacity.png")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _provenance(report: Report) -> str:
    context = report.context
    return f"{context['device']}; torch {context['torch']}; commit {context['commit']}, {context['date'][:10]}."


def _fwd_bwd(report: Report) -> list[Measurement]:
    return [each for each in report.measurements if each.pass_name == "fwd+bwd"]


def headline(report: Report, folder: Path) -> str:
    ran = [each for each in _fwd_bwd(report) if each.provider == "eager"]
    case = max((each.case for each in ran), key=lambda case: case.N * case.C * case.D)
    found = sorted((each for each in _fwd_bwd(report) if each.case == case), key=lambda each: each.ms)
    ours = next(each for each in found if each.provider == "fused_arcface" and each.backend != "reference")
    heads = ["forward + backward", "ms", "ps per logit", "÷ ours", "flops ÷ ceiling", "peak extra memory, MiB", "error"]
    lines = [f"{case}. {_provenance(report)}", "", _row(heads), _row(["---"] + ["---:"] * 6)]
    ceilings = report.machine["flops_per_second"]
    for each in found:
        name = f"**{each.provider} ({each.backend})**" if each.is_ours else each.provider
        peak = "" if each.peak_bytes is None else _number(each.peak_bytes / 2**20)
        figures = [_number(each.ms), _number(each.ps_per_logit), f"{each.ms / ours.ms:.2f}"]
        lines.append(
            _row([name, *figures, f"{each.flops_per_second / ceilings[each.ceiling]:.0%}", peak, f"{each.error:.0e}"])
        )
    gflops = f"{ceilings[case.dtype] / 1e9:,.0f} GFLOP/s"
    lines += ["", f"Ceiling: the machine's fastest square {case.dtype} product, {gflops}. Error: relative, to fp64."]
    return "\n".join(lines)


def shapes(report: Report, folder: Path) -> str:
    columns = ("fused_arcface", "eager", "compiled", "insightface", "pytorch-metric-learning", "products")
    lines = [_provenance(report), "", _row(["ms", *columns]), _row(["---"] + ["---:"] * len(columns))]
    for case in dict.fromkeys(each.case for each in _fwd_bwd(report)):
        fastest: dict[str, float] = {}
        for each in _fwd_bwd(report):
            if each.case == case and not (each.provider == "fused_arcface" and each.backend == "reference"):
                fastest[each.provider] = min(each.ms, fastest.get(each.provider, each.ms))
        cells = [_number(fastest[name]) if name in fastest else "—" for name in columns]
        lines.append(_row([str(case), *cells]))
    return "\n".join(lines)


def capacity(folder: Path) -> str:
    rows = json.loads((folder / "capacity.json").read_text())
    first = rows[0]
    budget = f"{first['budget_bytes'] / 2**30:g} GiB"
    what = f"A training step (N={first['N']}, D={first['D']}, SGD with momentum) within {budget}"
    source = f"{first['device']}; torch {first['torch']}; commit {first['commit']}, {first['date'][:10]}."
    heads = ["head", "centres", "momentum", "most identities", "bytes for each", "step, ms", ""]
    lines = [f"{what}. {source}", "", _row(heads), _row(["---"] * 3 + ["---:"] * 3 + ["---"])]
    for row in sorted(rows, key=lambda row: -row["max_C"]):
        step = "—" if row["step_ms"] is None else _number(row["step_ms"])
        figures = [f"{row['max_C']:,}", _number(row["bytes_per_class"]), step, row["how"]]
        lines.append(
            _row([f"{row['recipe']} ({row['backend']})", row["weight_dtype"], row["momentum_dtype"], *figures])
        )
    return "\n".join(lines)


def pictures(folder: Path, file: Path) -> str:
    found = [folder / name for name in _PICTURES if (folder / name).exists()]
    return "\n\n".join(f"![{path.stem.replace('_', ' ')}]({os.path.relpath(path, file.parent)})" for path in found)


def model(name: str, file: Path, write: bool) -> str:
    device = cost_model.H200 if name == "H200" else cost_model.Device.from_report(RESULTS / name)
    parts = []
    for storage in (cost_model.FUSED_BF16_INT8, cost_model.SGD_FP32):
        parts.append(cost_model.table(cost_model.grid(device, storage=storage), device, storage))
    path = RESULTS / f"model_{name}.png"
    if write:
        plots.write_cost_plot(cost_model.grid(device), device, path)
    parts.append(f"![cost model]({os.path.relpath(path, file.parent)})")
    return "\n\n".join(parts)


def block(kind: str, name: str, file: Path, write: bool) -> str:
    """The Markdown of one block; a line that says so where nothing has been measured yet."""
    folder = RESULTS / name
    if kind == "model" and name == "H200":
        return model(name, file, write)
    needed = folder / ("capacity.json" if kind == "capacity" else "rows.json")
    if not needed.exists():
        return "Not yet measured."
    if kind in ("headline", "shapes"):
        report = read_report(folder)
        return headline(report, folder) if kind == "headline" else shapes(report, folder)
    if kind == "capacity":
        return capacity(folder)
    if kind == "pictures":
        return pictures(folder, file)
    if kind == "model":
        return model(name, file, write)
    raise ValueError(f"{file}: no such block: {kind}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if something would change")
    check = parser.parse_args().check
    stale = []
    for file in FILES:
        before = file.read_text()

        def fill(match: re.Match[str], file: Path = file) -> str:
            return f"{match[1]}{block(match[2], match[3], file, not check)}\n{match[4]}"

        after = _BLOCK.sub(fill, before)
        if after != before:
            stale.append(str(file))
            if not check:
                file.write_text(after)
    print(("out of date: " if check else "updated: ") + (", ".join(stale) or "nothing"))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
