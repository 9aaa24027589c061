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
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fused_arcface.app.benchmark import cost_model, plots
from fused_arcface.app.benchmark.cases import BF16, FP32, PASSES, Case
from fused_arcface.app.benchmark.names import is_fused, is_ours, label
from fused_arcface.app.benchmark.report import Measurement, read_json, read_report
from fused_arcface.app.drawing import write_pictures

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
FILES = (BENCH.parent / "README.md", BENCH / "README.md", BENCH.parent / "docs" / "performance.md")
_BLOCK = re.compile(r"(<!-- bench: (\w+) (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_PICTURES = ("time_by_classes.png", "memory_by_classes.png", "time_by_rows.png", "roofline.png", "capacity.png")

Row = dict[str, Any]
"""A row of rows.json, or of another file of results."""


def _number(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(heads: list[str], rows: list[list[Any]], left: tuple[int, ...] = (0,)) -> str:
    """Return a table of Markdown. A cell is a text, a number or None; the columns ``left`` are text."""
    rule = ["---" if index in left else "---:" for index in range(len(heads))]
    cells = [[each if isinstance(each, str) else _number(each) for each in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *cells))


def _provenance(measured: dict[str, Any]) -> str:
    """Return the origin of a report, given its context or a row, which has the same."""
    return f"{measured['device']}; torch {measured['torch']}; commit {measured['commit']}, {measured['date'][:10]}."


def _mebibytes(peak_bytes: int | None) -> float | None:
    return None if peak_bytes is None else peak_bytes / 2**20


def _budget(row: Row) -> str:
    return f"{row['budget_bytes'] / 2**30:g} GiB"


def _case(row: Row) -> Case:
    return Case(row["N"], row["C"], row["D"], row["dtype"], row["weight_dtype"])


def _fastest(rows: list[Row], case: Case, names: tuple[str, ...], backend: str | None = None) -> Row | None:
    """Return the fastest row of a case among these providers, by the time of a forward and a backward pass."""
    found = [
        row
        for row in rows
        if row["pass"] == "fwd+bwd"
        and row["provider"] in names
        and backend in (None, row["backend"])
        and _case(row) == case
    ]
    return min(found, key=lambda row: float(row["ms"]), default=None)


def _largest_case(rows: list[Row]) -> Case:
    """Return the largest problem that the plain PyTorch head was measured at."""
    cases = [_case(row) for row in rows if row["provider"] == "eager"]
    return max(cases, key=lambda case: case.N * case.C * case.D)


Column = tuple[str, tuple[str, ...], "str | None"]
"""A column: its heading, its providers, and their backend or None for any. It shows the fastest provider."""


def _by_case(rows: list[Row], columns: list[Column], cell: Callable[[Row], Any]) -> str:
    """Return a table with a row for each case that one of the columns has."""
    table = []
    for case in dict.fromkeys(map(_case, rows)):
        found = [_fastest(rows, case, names, backend) for _, names, backend in columns]
        if any(found):
            table.append([str(case), *(row and cell(row) for row in found)])
    return _table(["", *(column[0] for column in columns)], table)


def figures(folder: Path) -> str:
    """Return a table of time, memory and identities: this package's head beside three others, and a picture."""
    rows, identities = read_json(folder / "rows.json"), read_json(folder / "capacity.json")
    case = _largest_case(rows)
    columns = ("fused_arcface", "insightface", "pytorch-metric-learning", "eager")
    fastest = [_fastest(rows, case, (name,)) for name in columns]
    most = [max(row["max_C"] for row in identities if row["recipe"].partition(" ")[0] == name) for name in columns]
    table = [
        [f"time of a step, N={case.N}, C={case.C:,}", *(f"{_number(row['ms'])} ms" for row in fastest)],
        ["memory beside inputs and gradients", *(f"{_number(_mebibytes(row['peak_bytes']))} MiB" for row in fastest)],
        [f"identities that train within {_budget(identities[0])}", *(f"{each / 1e6:.1f} million" for each in most)],
    ]
    heads = ["", "**fused_arcface**", "insightface", "pytorch-metric-learning", "plain PyTorch"]
    picture = f"![Memory by classes]({folder / 'memory_by_classes.png'})"
    return "\n\n".join([_table(heads, table), _provenance(rows[0]), picture])


def providers(folder: Path) -> str:
    """Return a row for each provider at the largest problem, fastest first."""
    report = read_report(folder)
    case = _largest_case(report.rows())
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
        forward, share = found["fwd"][each.provider, each.backend], report.share_of_ceiling(each)
        times = [forward.ms, f"{forward.ms / ours_forward.ms:.2f}", each.ms, f"{each.ms / ours.ms:.2f}"]
        error = max(forward.error, each.error)
        rest = [share and f"{share:.0%}", _mebibytes(each.peak_bytes), f"{error:.0e}"]
        rows.append([f"**{each.label}**" if each is ours else each.label, *times, *rest])
    reached = f"a square {case.dtype} product {report.machine['flops_per_second'][case.dtype] / 1e9:,.0f} GFLOP/s"
    fma = report.machine.get("fma_flops_per_second")
    reached += "" if fma is None else f", multiply-adds in registers {fma / 1e9:,.0f}"
    note = (
        "Medians, all in turn. Peak: of forward + backward, beyond inputs, class centers and their gradients. "
        f"Error: largest relative one of loss and gradients, to fp64. The machine's ceilings: {reached}. "
        "linear_cross_entropy and the products have no margin: yardsticks."
    )
    return "\n\n".join([f"{case}. {_provenance(report.context)}", _table(heads, rows), note])


def shapes(folder: Path) -> str:
    """Return the milliseconds of every shape, a column for each of a few providers."""
    names = ("fused_arcface", "eager", "compiled", "insightface", "pytorch-metric-learning", "products")
    rows = read_json(folder / "rows.json")
    rows = [row for row in rows if is_fused(row["provider"], row["backend"]) or not is_ours(row["provider"])]
    table = _by_case(rows, [(name, (name,), None) for name in names], lambda row: row["ms"])
    return f"Milliseconds, forward + backward.\n\n{table}"


def capacity(folder: Path) -> str:
    """Return the most identities within a memory budget."""
    found = sorted(read_json(folder / "capacity.json"), key=lambda row: -row["max_C"])
    first = found[0]
    what = f"A training step (N={first['N']}, D={first['D']}, SGD with momentum) within {_budget(first)}"
    heads = ["head", "centers", "momentum", "most identities", "÷ best peer", "bytes for each", "step, ms", ""]
    peer = max((row["max_C"] for row in found if not is_ours(row["recipe"])), default=None)
    rows = []
    for row in found:
        names = [label(row["recipe"], row["backend"]), row["weight_dtype"], row["momentum_dtype"]]
        ratio = peer and f"{row['max_C'] / peer:.2f}"
        rows.append([*names, f"{row['max_C']:,}", ratio, row["bytes_per_class"], row["step_ms"], row["how"]])
    return "\n\n".join([f"{what}. {_provenance(first)}", _table(heads, rows, left=(0, 1, 2, 7))])


# Columns of the GPU tables. _GPU_COLUMNS has the dtypes of embeddings and centers as well. Older results have a
# separate name for the rows of the kernels for Hopper, which were not on by default then.
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


def gpu(folder: Path) -> str:
    """Return a table of the README's two sizes: time, memory and identities, a column for each provider."""
    rows = read_json(folder / "rows.json")
    skips = read_json(folder / "run.json")["skips"]

    def cells(N: int, figure: Callable[[Row], str]) -> list[str]:
        found = []
        for _, names, backend, dtypes in _GPU_COLUMNS:
            case = Case(N, 1_000_000, 512, *dtypes)
            row = _fastest(rows, case, names, backend)
            own = [skip for skip in skips if skip["provider"] in names and skip["case"] == vars(case)]
            failed = any(skip["reason"].startswith("out of memory") for skip in own)
            found.append(figure(row) if row is not None else "out of memory" if failed else "—")
        return found

    def times(row: Row) -> str:
        return f"{_number(row['ms'])} ms ({_number(row['ps_per_logit'])} ps)"

    def memory(row: Row) -> str:
        return "—" if row["peak_bytes"] is None else f"{_number(_mebibytes(row['peak_bytes']))} MiB"

    table = [[f"time of a step, N={N:,}", *cells(N, times)] for N in (4096, 1024)]
    both = zip(cells(4096, memory), cells(1024, memory), strict=True)
    table.append(["memory beside inputs and gradients, N=4,096 / 1,024", *map(" / ".join, both)])
    origin = _provenance(rows[0])
    if (folder / "capacity.json").exists():
        found = read_json(folder / "capacity.json")
        table.append(_identities(found))
        if _provenance(found[0]) != origin:
            origin += f" Identities: {_provenance(found[0])}"
    heads = ["C=1,000,000, D=512, bf16", *(column[0] for column in _GPU_COLUMNS)]
    return "\n\n".join([_table(heads, table), f"{_GPU_NOTE} {origin}"])


def _identities(found: list[Row]) -> list[str]:
    """Return the row of the most identities whose training step fits."""
    most = {}
    for row in sorted(found, key=lambda row: int(row["max_C"])):
        most[row["recipe"].partition(" ")[0], row["backend"]] = f"{row['max_C'] / 1e6:.1f} million"
    cells = [most.get((names[0], backend), "—") for _, names, backend, _ in _GPU_COLUMNS]
    return [f"most identities that train, N={found[0]['N']:,}", *cells]


def gpu_cases(folder: Path) -> str:
    """Return the milliseconds of every case: our backends, plain PyTorch and the bare products."""
    rows = read_json(folder / "rows.json")

    def with_replay(row: Row) -> str:
        replay = row["graph_ms"]
        return _number(row["ms"]) + ("" if replay is None else f" ({_number(replay)})")

    table = _by_case(rows, [_CUDA, _TRITON, _EAGER, ("products", ("products",), "torch")], with_replay)
    note = "Milliseconds, forward + backward; in brackets replayed from a CUDA graph."
    return "\n\n".join([note, table, _provenance(rows[0])])


ALL_OF = {
    "launches": Case(256, 10_000, 512, *BF16),
    "peers": Case(1024, 1_000_000, 512, *BF16),
}
"""The blocks that show every provider of one case."""


def all_of(folder: Path, case: Case) -> str:
    """Return a row for each provider of a case, fastest first, without variants of ours."""
    rows = read_json(folder / "rows.json")
    providers = dict.fromkeys((row["provider"], row["backend"]) for row in rows)
    ours = (*_CUDA[1], *_TRITON[1])
    found = [_fastest(rows, case, (name,), backend) for name, backend in providers if name in ours or not is_ours(name)]
    measured = sorted((row for row in found if row is not None), key=lambda row: float(row["ms"]))
    if not measured:
        return "Not yet measured."
    table = []
    for row in measured:
        figures = [row["ms"], row["graph_ms"], _mebibytes(row["peak_bytes"]), f"{row['error']:.0e}"]
        table.append([label(row["provider"], row["backend"]), *figures])
    heads = ["forward + backward", "ms", "from a CUDA graph, ms", "peak extra memory, MiB", "error"]
    return "\n\n".join([f"{case}. {_provenance(measured[0])}", _table(heads, table)])


def training(folder: Path) -> str:
    """Return the comparison of loss curves, and its picture."""
    found = read_json(folder / "training.json")
    what = f"{found['steps']:,} steps, N={found['N']}, C={found['C']:,}, D={found['D']}, {found['dtype']}"
    heads = ["backend", "last loss", "largest distance ÷ spread", "within", "seconds"]
    rows = [
        [f"`{run['backend']}`", run["last_loss"], run["distance"], "yes" if run["within"] else "no", run["seconds"]]
        for run in found["runs"]
        if run["within"] is not None
    ]
    picture = f"![Loss curves]({folder / 'training.png'})"
    return "\n\n".join([f"{what}. {_provenance(found)}", _table(heads, rows, left=(0, 3)), picture])


def ranks(folder: Path) -> str:
    """Return the cost model beside runs on several processes."""
    found = read_json(folder / "ranks.json")
    heads = ["ranks", "N", "identities", "predicted, ms", "measured, ms", "measured ÷ predicted", "limited by"]
    rows = []
    for row in found:
        predicted, measured = row["predicted_ms"], row["measured_ms"]
        sizes = [str(row["ranks"]), str(row["N"]), f"{row['C']:,}"]
        rows.append([*sizes, predicted, measured, f"{measured / predicted:.2f}", row["limit"]])
    return "\n\n".join([_provenance(found[0]), _table(heads, rows, left=(6,))])


def pictures(folder: Path) -> str:
    """Return links to the run's pictures."""
    found = [folder / name for name in _PICTURES if (folder / name).exists()]
    return "\n\n".join(f"![{path.stem.replace('_', ' ')}]({path})" for path in found)


def model(name: str, write: bool) -> str:
    """Return the cost model of many devices, and draw it if ``write``."""
    device = cost_model.H200 if name == "H200" else cost_model.Device.from_report(RESULTS / name)
    parts = [
        cost_model.table(cost_model.grid(device, storage=storage), device, storage)
        for storage in (cost_model.FUSED_BF16_INT8, cost_model.SGD_FP32)
    ]
    drawing = plots.cost_drawing(cost_model.grid(device), device, f"model_{name}")
    if write:
        write_pictures([drawing], RESULTS)
    return "\n\n".join([*parts, f"![cost model]({RESULTS / f'{drawing.name}.png'})"])


BLOCKS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "figures": ("rows.json", figures),
    "providers": ("rows.json", providers),
    "shapes": ("rows.json", shapes),
    "capacity": ("capacity.json", capacity),
    "gpu": ("rows.json", gpu),
    "gpu_cases": ("rows.json", gpu_cases),
    **{name: ("rows.json", partial(all_of, case=case)) for name, case in ALL_OF.items()},
    "training": ("training.json", training),
    "pictures": ("rows.json", pictures),
    "ranks": ("ranks.json", ranks),
}
"""All blocks except ``model``: the file of results, and a function that returns the text."""


def block(kind: str, name: str, file: Path, write: bool) -> str:
    """Return the Markdown of one block; a line that says so if nothing has been measured yet."""
    folder = RESULTS / name
    if kind not in ("model", *BLOCKS):
        raise ValueError(f"{file}: no such block: {kind}")
    needed, text = BLOCKS.get(kind, ("rows.json", None))
    if not (folder / needed).exists() and (kind, name) != ("model", "H200"):
        return "Not yet measured."
    found = model(name, write) if text is None else text(folder)
    return found.replace(str(RESULTS), os.path.relpath(RESULTS, file.parent))


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
