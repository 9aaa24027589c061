"""Put measured tables from bench/results/ into README.md, bench/README.md and a page of docs/, between their markers.

    python bench/update_readme.py            write
    python bench/update_readme.py --check    exit status 1 if a file would change

A block reads ``<!-- bench: NAME FOLDER -->`` … ``<!-- /bench -->``, FOLDER one of bench/results/; the names:

    figures     the three figures of the README: time, memory and identities, beside other heads
    providers   the largest shape at which eager ran: every provider, all backends and instruction sets of ours included
    shapes      milliseconds of every shape, forward + backward, a column for each of a few providers
    capacity    most identities within a memory budget
    gpu         the two sizes of the README on a GPU: backends of ours, plain PyTorch, insightface's operations
    gpu_cases   milliseconds of every case on a GPU, with those of the replay from a CUDA graph
    launches    every provider at N=256, C=10,000, where launching the kernels takes most of the time
    peers       every provider at N=1024, C=1,000,000
    training    loss curves of every backend beside three seeds of the reference
    pictures    the run's pictures
    ranks       the cost model beside multi-process runs
    model       the cost model of many devices (FOLDER: a run that gives the rate, or "H200" for the modeled rate)
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_arcface.app.benchmark import cost_model, plots
from fused_arcface.app.benchmark.cases import BF16, FP32, PASSES, Case
from fused_arcface.app.benchmark.names import is_ours, label
from fused_arcface.app.benchmark.report import Measurement, Report, read_json, read_report
from fused_arcface.app.drawing import write_pictures

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
FILES = (BENCH.parent / "README.md", BENCH / "README.md", BENCH.parent / "docs" / "performance.md")
_BLOCK = re.compile(r"(<!-- bench: (\w+) (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_PICTURES = ("time_by_classes.png", "memory_by_classes.png", "time_by_rows.png", "roofline.png", "capacity.png")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(heads: list[str], rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Return lines of Markdown; the columns ``left`` are text, the others numbers."""
    rule = ["---" if index in left else "---:" for index in range(len(heads))]
    return [_row(heads), _row(rule), *map(_row, rows)]


def _provenance(measured: dict[str, Any]) -> str:
    """Return the origin of a report, given its context or a row, which has the same."""
    return f"{measured['device']}; torch {measured['torch']}; commit {measured['commit']}, {measured['date'][:10]}."


def _fwd_bwd(report: Report) -> list[Measurement]:
    return [each for each in report.measurements if each.pass_name == "fwd+bwd"]


def _largest_case(report: Report) -> Case:
    """Return the largest problem that the plain PyTorch head was measured at."""
    cases = [each.case for each in report.measurements if each.provider == "eager"]
    return max(cases, key=lambda case: case.N * case.C * case.D)


def figures(folder: Path, file: Path) -> str:
    """Return a table of time, memory and identities: this package's head beside three others, and a picture."""
    report = read_report(folder)
    case = _largest_case(report)
    fastest: dict[str, Measurement] = {}
    for each in sorted(_fwd_bwd(report), key=lambda each: each.ms):
        if each.case == case:
            fastest.setdefault(each.provider, each)
    capacities: dict[str, int] = {}
    rows = read_json(folder / "capacity.json")
    for row in rows:
        name = row["recipe"].partition(" ")[0]
        capacities[name] = max(row["max_C"], capacities.get(name, 0))
    columns = ("fused_arcface", "insightface", "pytorch-metric-learning", "eager")
    peaks = {name: fastest[name].peak_bytes or math.nan for name in columns}
    budget = f"{rows[0]['budget_bytes'] / 2**30:g} GiB"
    table = [
        [f"time of a step, N={case.N}, C={case.C:,}", *(f"{_number(fastest[name].ms)} ms" for name in columns)],
        ["memory beside inputs and gradients", *(f"{_number(peaks[name] / 2**20)} MiB" for name in columns)],
        [f"identities that train within {budget}", *(f"{capacities[name] / 1e6:.1f} million" for name in columns)],
    ]
    heads = ["", "**fused_arcface**", "insightface", "pytorch-metric-learning", "plain PyTorch"]
    picture = os.path.relpath(folder / "memory_by_classes.png", file.parent)
    return "\n".join([*_table(heads, table), "", _provenance(report.context), "", f"![Memory by classes]({picture})"])


def providers(report: Report) -> str:
    """Return a row for each provider at the largest problem, fastest first."""
    case = _largest_case(report)
    found: dict[str, dict[tuple[str, str], Measurement]] = {name: {} for name in PASSES}
    for each in report.measurements:
        if each.case == case:
            found[each.pass_name][each.provider, each.backend] = each
    both = sorted(found["fwd+bwd"].values(), key=lambda each: each.ms)
    ours = next(each for each in both if each.is_ours)
    ours_forward = found["fwd"][ours.provider, ours.backend]
    heads = ["", "forward, ms", "÷ ours", "forward + backward, ms", "÷ ours"]
    heads += ["of ceiling", "peak extra memory, MiB", "error"]
    rows = []
    for each in both:
        forward = found["fwd"][each.provider, each.backend]
        name = each.label
        figures = [_number(forward.ms), f"{forward.ms / ours_forward.ms:.2f}", _number(each.ms)]
        share = report.share_of_ceiling(each)
        figures += [f"{each.ms / ours.ms:.2f}", "—" if share is None else f"{share:.0%}"]
        peak = "" if each.peak_bytes is None else _number(each.peak_bytes / 2**20)
        error = max(forward.error, each.error)
        rows.append([f"**{name}**" if each is ours else name, *figures, peak, f"{error:.0e}"])
    reached = f"a square {case.dtype} product {report.machine['flops_per_second'][case.dtype] / 1e9:,.0f} GFLOP/s"
    fma = report.machine.get("fma_flops_per_second")
    reached += "" if fma is None else f", multiply-adds in registers {fma / 1e9:,.0f}"
    note = (
        "Medians, all in turn. Peak: of forward + backward, beyond inputs, class centers and their gradients. "
        f"Error: largest relative one of loss and gradients, to fp64. The machine's ceilings: {reached}. "
        "linear_cross_entropy and the products have no margin: yardsticks."
    )
    return "\n".join([f"{case}. {_provenance(report.context)}", "", *_table(heads, rows), "", note])


def shapes(report: Report) -> str:
    """Return the milliseconds of every shape, a column for each of a few providers."""
    columns = ("fused_arcface", "eager", "compiled", "insightface", "pytorch-metric-learning", "products")
    rows = []
    for case in dict.fromkeys(each.case for each in _fwd_bwd(report)):
        fastest: dict[str, float] = {}
        for each in _fwd_bwd(report):
            if each.case == case and (each.is_fused or not each.is_ours):
                fastest[each.provider] = min(each.ms, fastest.get(each.provider, each.ms))
        rows.append([str(case), *(_number(fastest[name]) if name in fastest else "—" for name in columns)])
    return "\n".join(["Milliseconds, forward + backward.", "", *_table(["", *columns], rows)])


def capacity(folder: Path) -> str:
    """Return the most identities within a memory budget."""
    found = sorted(read_json(folder / "capacity.json"), key=lambda row: -row["max_C"])
    first = found[0]
    budget = f"{first['budget_bytes'] / 2**30:g} GiB"
    what = f"A training step (N={first['N']}, D={first['D']}, SGD with momentum) within {budget}"
    heads = ["head", "centers", "momentum", "most identities", "÷ best peer", "bytes for each", "step, ms", ""]
    peer = max((row["max_C"] for row in found if not is_ours(row["recipe"])), default=None)
    rows = []
    for row in found:
        step = "—" if row["step_ms"] is None else _number(row["step_ms"])
        ratio = "—" if peer is None else f"{row['max_C'] / peer:.2f}"
        name = label(row["recipe"], row["backend"])
        figures = [f"{row['max_C']:,}", ratio, _number(row["bytes_per_class"]), step, row["how"]]
        rows.append([name, row["weight_dtype"], row["momentum_dtype"], *figures])
    return "\n".join([f"{what}. {_provenance(first)}", "", *_table(heads, rows, left=(0, 1, 2, 7))])


Rows = list[dict[str, Any]]

# A column of the GPU's tables: its head, providers (the fastest is shown), backend, dtypes of rows and of centers.
# Before the kernels for Hopper were on by default, their rows had a separate name.
_CUDA = ("`cuda`", ("fused_arcface", "fused_arcface-hopper"), "cuda")
_TRITON = ("`triton`", ("fused_arcface",), "triton")
_EAGER = ("plain PyTorch", ("eager",), "torch")
_GPU_COLUMNS = (
    (*_CUDA, BF16),
    (*_TRITON, BF16),
    (*_EAGER, BF16),
    ("insightface, fp32", ("insightface",), "torch", FP32),
    ("TF32", ("insightface-tf32",), "torch", FP32),
    ("fp16", ("insightface-fp16",), "torch", FP32),
)

_GPU_NOTE = "In brackets: time for each logit. insightface takes fp32 embeddings and centers. —: not measured."


def _fastest(rows: Rows, case: Case, names: tuple[str, ...], backend: str) -> dict[str, Any] | None:
    """Return the row of a case and one of some providers with the least time of a forward and a backward pass."""
    found = [
        row
        for row in rows
        if row["pass"] == "fwd+bwd"
        and row["provider"] in names
        and row["backend"] == backend
        and all(row[name] == value for name, value in vars(case).items())
    ]
    return min(found, key=lambda row: float(row["ms"]), default=None)


def gpu(folder: Path) -> str:
    """Return a table of the README's two sizes: time, memory and identities, a column for each provider."""
    rows: Rows = read_json(folder / "rows.json")
    skips = read_json(folder / "run.json")["skips"]

    def cells(N: int, figure: Callable[[dict[str, Any]], str]) -> list[str]:
        found = []
        for _, names, backend, dtypes in _GPU_COLUMNS:
            case = Case(N, 1_000_000, 512, *dtypes)
            row = _fastest(rows, case, names, backend)
            own = [skip for skip in skips if skip["provider"] in names and skip["case"] == vars(case)]
            failed = any(skip["reason"].startswith("out of memory") for skip in own)
            found.append(figure(row) if row is not None else "out of memory" if failed else "—")
        return found

    def times(row: dict[str, Any]) -> str:
        return f"{_number(row['ms'])} ms ({_number(row['ps_per_logit'])} ps)"

    def mebibytes(row: dict[str, Any]) -> str:
        return "—" if row["peak_bytes"] is None else f"{_number(row['peak_bytes'] / 2**20)} MiB"

    table = [[f"time of a step, N={N:,}", *cells(N, times)] for N in (4096, 1024)]
    both = zip(cells(4096, mebibytes), cells(1024, mebibytes), strict=True)
    table.append(["memory beside inputs and gradients, N=4,096 / 1,024", *map(" / ".join, both)])
    origin = _provenance(rows[0])
    if (folder / "capacity.json").exists():
        found = read_json(folder / "capacity.json")
        table.append(_identities(found))
        if _provenance(found[0]) != origin:
            origin += f" Identities: {_provenance(found[0])}"
    heads = ["C=1,000,000, D=512, bf16", *(column[0] for column in _GPU_COLUMNS)]
    return "\n".join([*_table(heads, table), "", f"{_GPU_NOTE} {origin}"])


def _identities(found: Rows) -> list[str]:
    """Return the row of the most identities whose training step fits."""
    most = {}
    for row in sorted(found, key=lambda row: int(row["max_C"])):
        most[row["recipe"].partition(" ")[0], row["backend"]] = f"{row['max_C'] / 1e6:.1f} million"
    cells = [most.get((names[0], backend), "—") for _, names, backend, _ in _GPU_COLUMNS]
    return [f"most identities that train, N={found[0]['N']:,}", *cells]


def gpu_cases(folder: Path) -> str:
    """Return the milliseconds of every case: our backends, plain PyTorch and the bare products."""
    rows: Rows = read_json(folder / "rows.json")
    cases = [Case(row["N"], row["C"], row["D"], row["dtype"], row["weight_dtype"]) for row in rows]
    columns = (_CUDA, _TRITON, _EAGER, ("products", ("products",), "torch"))
    table = []
    for case in dict.fromkeys(cases):
        found = [_fastest(rows, case, names, backend) for _, names, backend in columns]
        if any(found):
            table.append([str(case), *("—" if row is None else _with_replay(row) for row in found)])
    lines = ["Milliseconds, forward + backward; in brackets replayed from a CUDA graph.", ""]
    return "\n".join([*lines, *_table(["", *(column[0] for column in columns)], table), "", _provenance(rows[0])])


def _with_replay(row: dict[str, Any]) -> str:
    replay = row["graph_ms"]
    return _number(row["ms"]) + ("" if replay is None else f" ({_number(replay)})")


ALL_OF = {
    "launches": Case(256, 10_000, 512, *BF16),
    "peers": Case(1024, 1_000_000, 512, *BF16),
}
"""The blocks that show every provider of one case."""


def all_of(folder: Path, case: Case) -> str:
    """Return a row for each provider of a case, fastest first, without variants of ours."""
    rows: Rows = read_json(folder / "rows.json")
    providers = dict.fromkeys((row["provider"], row["backend"]) for row in rows)
    ours = (*_CUDA[1], *_TRITON[1])
    found = [_fastest(rows, case, (name,), backend) for name, backend in providers if name in ours or not is_ours(name)]
    measured = sorted((row for row in found if row is not None), key=lambda row: float(row["ms"]))
    if not measured:
        return "Not yet measured."
    table = []
    for row in measured:
        replay = "—" if row["graph_ms"] is None else _number(row["graph_ms"])
        peak = "—" if row["peak_bytes"] is None else _number(row["peak_bytes"] / 2**20)
        figures = [_number(row["ms"]), replay, peak, f"{row['error']:.0e}"]
        table.append([label(row["provider"], row["backend"]), *figures])
    heads = ["forward + backward", "ms", "from a CUDA graph, ms", "peak extra memory, MiB", "error"]
    return "\n".join([f"{case}. {_provenance(measured[0])}", "", *_table(heads, table)])


def training(folder: Path, file: Path) -> str:
    """Return the comparison of loss curves, and its picture."""
    found = read_json(folder / "training.json")
    what = f"{found['steps']:,} steps, N={found['N']}, C={found['C']:,}, D={found['D']}, {found['dtype']}"
    heads = ["backend", "last loss", "largest distance ÷ spread", "within", "seconds"]
    rows = [
        [
            f"`{run['backend']}`",
            *("—" if run[name] is None else _number(run[name]) for name in ("last_loss", "distance")),
            "yes" if run["within"] else "no",
            _number(run["seconds"]),
        ]
        for run in found["runs"]
        if run["within"] is not None
    ]
    picture = os.path.relpath(folder / "training.png", file.parent)
    lines = [f"{what}. {_provenance(found)}", "", *_table(heads, rows, left=(0, 3)), "", f"![Loss curves]({picture})"]
    return "\n".join(lines)


def ranks(folder: Path) -> str:
    """Return the cost model beside runs on several processes."""
    found = read_json(folder / "ranks.json")
    heads = ["ranks", "N", "identities", "predicted, ms", "measured, ms", "measured ÷ predicted", "limited by"]
    rows = []
    for row in found:
        predicted, measured = row["predicted_ms"], row["measured_ms"]
        figures = [str(row["ranks"]), str(row["N"]), f"{row['C']:,}", _number(predicted), _number(measured)]
        rows.append([*figures, f"{measured / predicted:.2f}", row["limit"]])
    return "\n".join([_provenance(found[0]), "", *_table(heads, rows, left=(6,))])


def pictures(folder: Path, file: Path) -> str:
    """Return links to the run's pictures."""
    found = [folder / name for name in _PICTURES if (folder / name).exists()]
    return "\n\n".join(f"![{path.stem.replace('_', ' ')}]({os.path.relpath(path, file.parent)})" for path in found)


def model(name: str, file: Path, write: bool) -> str:
    """Return the cost model of many devices, and draw it if ``write``."""
    device = cost_model.H200 if name == "H200" else cost_model.Device.from_report(RESULTS / name)
    parts = [
        cost_model.table(cost_model.grid(device, storage=storage), device, storage)
        for storage in (cost_model.FUSED_BF16_INT8, cost_model.SGD_FP32)
    ]
    drawing = plots.cost_drawing(cost_model.grid(device), device, f"model_{name}")
    if write:
        write_pictures([drawing], RESULTS)
    parts.append(f"![cost model]({os.path.relpath(RESULTS / f'{drawing.name}.png', file.parent)})")
    return "\n\n".join(parts)


BLOCKS: dict[str, tuple[str, Callable[[Path, Path], str]]] = {
    "figures": ("rows.json", figures),
    "providers": ("rows.json", lambda folder, file: providers(read_report(folder))),
    "shapes": ("rows.json", lambda folder, file: shapes(read_report(folder))),
    "capacity": ("capacity.json", lambda folder, file: capacity(folder)),
    "gpu": ("rows.json", lambda folder, file: gpu(folder)),
    "gpu_cases": ("rows.json", lambda folder, file: gpu_cases(folder)),
    "launches": ("rows.json", lambda folder, file: all_of(folder, ALL_OF["launches"])),
    "peers": ("rows.json", lambda folder, file: all_of(folder, ALL_OF["peers"])),
    "training": ("training.json", training),
    "pictures": ("rows.json", pictures),
    "ranks": ("ranks.json", lambda folder, file: ranks(folder)),
}
"""The blocks but ``model``: the file of the results that each needs, and its text for a page."""


def block(kind: str, name: str, file: Path, write: bool) -> str:
    """Return the Markdown of one block; a line that says so if nothing has been measured yet."""
    folder = RESULTS / name
    if kind not in ("model", *BLOCKS):
        raise ValueError(f"{file}: no such block: {kind}")
    needed, text = BLOCKS.get(kind, ("rows.json", None))
    if not (folder / needed).exists() and (kind, name) != ("model", "H200"):
        return "Not yet measured."
    return model(name, file, write) if text is None else text(folder, file)


def main() -> int:
    """Write or check every block; return the exit status."""
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
