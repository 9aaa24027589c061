"""Pictures of a run: time and memory against C, time against N, the roofline; and of the cost model and of capacities.

matplotlib is asked for only here: the package's extra ``bench`` brings it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fused_arcface.base.extras import pyplot, save_figure

from .cost_model import Device, Step
from .report import Measurement, Report

# Ours in one strong color; peers apart from each other and from ours for color-blind eyes as well (Okabe and Ito's
# palette).
_OURS = "#d55e00"
_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#8c6d00", "#000000", "#777777", "#e69f00")
_MARKERS = "osv^D<>PX*"


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write every picture that the run has the measurements for; their paths.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    by_classes, by_rows = _longest_series(report, "C"), _longest_series(report, "N")
    pictures = (
        ("time_by_classes.png", by_classes, "C", "ms"),
        ("memory_by_classes.png", by_classes, "C", "peak_bytes"),
        ("time_by_rows.png", by_rows, "N", "ms"),
    )
    for name, series, axis, value in pictures:
        if any(value == "ms" or each.peak_bytes is not None for each in series):
            figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
            _lines(axes, report, series, axis, value)
            paths.append(_save(plt, figure, folder / name))
    if any(each.is_ours for each in report.measurements) and "copy_bytes_per_second" in report.machine:
        figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
        _roofline(axes, report)
        paths.append(_save(plt, figure, folder / "roofline.png"))
    return paths


def _save(plt: Any, figure: Any, path: Path) -> Path:
    save_figure(figure, path, dpi=130)
    plt.close(figure)
    return path


def _longest_series(report: Report, axis: str) -> list[Measurement]:
    """The measurements with gradients whose cases differ in ``axis`` alone, of the series with the most cases; [] below
    two."""
    series: dict[tuple[object, ...], list[Measurement]] = {}
    for each in report.measurements:
        if each.pass_name == "fwd+bwd":
            fixed = tuple(value for name, value in vars(each.case).items() if name != axis)
            series.setdefault(fixed, []).append(each)
    longest = max(series.values(), key=lambda found: len({each.case for each in found}), default=[])
    return longest if len({each.case for each in longest}) > 1 else []


def _label(each: Measurement) -> str:
    return f"{each.provider} ({each.backend})" if each.is_ours else each.provider


def _styles(measurements: Iterable[Measurement]) -> dict[str, dict[str, Any]]:
    """A style for each label; those of ours share a color, and only the default instruction set is drawn thick."""
    styles: dict[str, dict[str, Any]] = {}
    peers = 0
    for each in measurements:
        label = _label(each)
        if label in styles:
            continue
        if each.is_ours and each.backend != "torch":
            variants = sum(style["color"] == _OURS for style in styles.values())
            width, line = (2.6, "-") if variants == 0 else (1.4, (":", "--", "-.")[variants % 3])
            styles[label] = {"color": _OURS, "lw": width, "ls": line, "zorder": 5}
        else:
            styles[label] = {"color": _COLORS[peers % len(_COLORS)], "lw": 1.4, "ls": "-" if peers < 8 else "--"}
            peers += 1
        styles[label] |= {"marker": _MARKERS[len(styles) % len(_MARKERS)], "ms": 5}
    return styles


def _lines(axes: Any, report: Report, series: Sequence[Measurement], axis: str, value: str) -> None:
    """A line for each provider: milliseconds, or peak memory in MiB, over C or N; over C with the place where memory
    ends."""
    memory, limit = value == "peak_bytes", report.machine.get("memory_bytes")
    ended = False
    for label, style in _styles(report.measurements).items():
        mine = (each for each in series if _label(each) == label and not (memory and each.peak_bytes is None))
        points = sorted(mine, key=lambda each: getattr(each.case, axis))
        if not points:
            continue
        xs = [getattr(each.case, axis) for each in points]
        ys = [_mebibytes(each.peak_bytes or 0) if memory else each.ms for each in points]
        axes.plot(xs, ys, label=label, **style)
        end = _end_of_memory(points, limit) if axis == "C" and limit else None
        if end is not None and end[0] > xs[-1]:
            x, peak = end
            y = _mebibytes(peak) if memory else ys[-1] * x / xs[-1]
            axes.plot([xs[-1], x], [ys[-1], y], color=style["color"], lw=0.8, ls=":", zorder=1)
            axes.plot([x], [y], marker="x", ms=8, mew=2, color=style["color"], ls="", zorder=6)
            ended = True
    case = series[0].case
    fixed = ", ".join(f"{name}={getattr(case, name):,}" for name in "NCD" if name != axis)
    axes.set(xscale="log", yscale="log", xlabel={"C": "classes C", "N": "rows N"}[axis])
    if axis == "N":  # few and close together: each has its tick
        rows = sorted({each.case.N for each in series})
        axes.set_xticks(rows, [str(N) for N in rows])
        axes.set_xticks([], minor=True)
    axes.set_ylabel("peak memory beyond inputs and gradients, MiB (at least 1)" if memory else "forward + backward, ms")
    title = f"{fixed}, {case.dtype}"
    if ended:
        assert limit is not None
        title += f"; ×: centers, gradient and peak fill the {limit / 2**30:.0f} GiB that were free (extrapolated)"
    axes.set_title(f"{title}\n{report.context['device']}, {report.context['commit']}", fontsize=9)
    axes.grid(True, which="both", alpha=0.2)
    # In the order in which the lines end, from above, to be read across.
    lines = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: -pair[0].get_ydata()[-1])
    _legend(axes, *zip(*lines, strict=True))


def _legend(axes: Any, *handles_and_labels: Any) -> None:
    axes.legend(*handles_and_labels, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _mebibytes(peak_bytes: float) -> float:
    """At least one: below it the pages of libraries are what is seen."""
    return max(peak_bytes / 2**20, 1.0)


def _end_of_memory(points: Sequence[Measurement], limit: float) -> tuple[float, float] | None:
    """C at which class centers, their gradient and the peak come to ``limit`` bytes, and that peak: along the last two
    points."""
    measured = [each for each in points if each.peak_bytes is not None]
    if len(measured) < 2:
        return None
    before, last = measured[-2], measured[-1]
    C, peak = last.case.C, last.peak_bytes or 0
    slope = max(0.0, (peak - (before.peak_bytes or 0)) / (C - before.case.C))
    held = 2 * last.case.weight_bytes / C
    end = C + (limit - peak - held * C) / (slope + held)
    return end, peak + slope * (end - C)


def _traffic(each: Measurement) -> float:
    """Bytes that a pass must move: the centers once a pass, the gradient once; for bare products S as well."""
    backward = each.pass_name == "fwd+bwd"
    logits = each.case.N * each.case.C * each.case.torch_dtype.itemsize if not each.is_ours else 0
    return (3 if backward else 1) * (each.case.weight_bytes + logits)


def _roofline(axes: Any, report: Report) -> None:
    copy = report.machine["copy_bytes_per_second"]
    shown = [
        each
        for each in report.measurements
        if (each.is_ours and each.backend != "torch") or each.provider == "products"
    ]
    xs_all = [each.flops_per_second * each.ms * 1e-3 / _traffic(each) for each in shown]
    knees = [peak / copy for peak in report.machine["flops_per_second"].values()]
    low, high = min(*xs_all, *knees) / 2, max(*xs_all, *knees) * 2
    for dtype, peak in report.machine["flops_per_second"].items():
        knee = peak / copy
        axes.plot([low, knee, high], [low * copy / 1e9, peak / 1e9, peak / 1e9], color="#444444", lw=1.2)
        axes.annotate(
            f"{dtype} product, {peak / 1e9:,.0f} GFLOP/s", (high, peak / 1e9), ha="right", va="bottom", fontsize=8
        )
    fma = report.machine.get("fma_flops_per_second")
    if fma is not None:
        axes.axhline(fma / 1e9, color="#444444", lw=1.2, ls="--")
        axes.annotate(f"fp32 multiply-adds, {fma / 1e9:,.0f} GFLOP/s", (low, fma / 1e9), va="bottom", fontsize=8)
    axes.annotate(f" copy, {copy / 1e9:,.0f} GB/s", (low, low * copy / 1e9), va="top", fontsize=8)
    styles = _styles(report.measurements)
    seen: set[tuple[str, str]] = set()
    for each, x in zip(shown, xs_all, strict=True):
        label, filled = _label(each), each.pass_name == "fwd+bwd"
        named = f"{label}, {each.pass_name}" if (label, each.pass_name) not in seen else None
        seen.add((label, each.pass_name))
        style = {
            "marker": styles[label]["marker"],
            "ms": 6,
            "ls": "",
            "mfc": styles[label]["color"] if filled else "none",
        }
        axes.plot([x], [each.flops_per_second / 1e9], mec=styles[label]["color"], label=named, **style)
    axes.set(xscale="log", yscale="log", xlabel="flops for each byte that must be moved", ylabel="GFLOP/s")
    axes.set_title(f"Roofline, {report.context['device']}, {report.context['commit']}", fontsize=9)
    axes.grid(True, which="both", alpha=0.2)
    _legend(axes)


def write_capacity_plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """A bar for each recipe's largest number of identities."""
    plt = pyplot()
    ordered = sorted(rows, key=lambda row: row["max_C"])
    figure, axes = plt.subplots(figsize=(8.5, 0.42 * len(ordered) + 1.3), layout="constrained")
    labels = [f"{row['recipe']} ({row['backend']}), {row['weight_dtype']} + {row['momentum_dtype']}" for row in ordered]
    colors = [_OURS if row["recipe"].startswith("fused_arcface") else _COLORS[0] for row in ordered]
    bars = axes.barh(labels, [row["max_C"] / 1e6 for row in ordered], color=colors)
    texts = [
        f" {row['max_C'] / 1e6:.3g} M" + ("" if row["how"] == "measured" else " (extrapolated)") for row in ordered
    ]
    axes.bar_label(bars, texts, fontsize=8)
    axes.margins(x=0.15)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("identities, millions")
    if rows:
        row = rows[0]
        budget = f"{row['budget_bytes'] / 2**30:.3g} GiB"
        axes.set_title(
            f"A training step within {budget}, N={row['N']}, D={row['D']}; {row['device']}, {row['commit']}", fontsize=9
        )
    return _save(plt, figure, path)


def write_cost_plot(steps: Sequence[Step], device: Device, path: Path) -> Path:
    """Step time and memory against the number of devices, a line for each number of identities, a marker for what
    limits."""
    plt = pyplot()
    markers = {
        "arithmetic": "o",
        "memory traffic": "s",
        "network": "^",
        "latency": "D",
        "launches": "v",
        "does not fit": "x",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for index, identities in enumerate(sorted({step.identities for step in steps})):
        mine = [step for step in steps if step.identities == identities]
        label, color = f"{identities:.0e} identities".replace("e+0", "e"), (*_COLORS[:3], _OURS)[index % 4]
        fitting = [step for step in mine if step.limit != "does not fit"]
        left.plot([s.devices for s in fitting], [s.seconds * 1e3 for s in fitting], color=color, label=label, lw=1.5)
        right.plot([s.devices for s in mine], [s.memory_bytes / 2**30 for s in mine], color=color, label=label, lw=1.5)
        for step in mine:
            style = {"marker": markers[step.limit], "color": color, "ms": 7, "ls": ""}
            right.plot([step.devices], [step.memory_bytes / 2**30], **style)
            if step in fitting:
                left.plot([step.devices], [step.seconds * 1e3], **style)
    right.axhline(device.memory_bytes / 2**30, color="#444444", lw=1)
    right.annotate(f"{device.name}", (1, device.memory_bytes / 2**30 * 1.15), fontsize=8)
    for limit, marker in markers.items():
        right.plot([], [], marker=marker, ls="", color="#444444", label=limit)
    for axes, label in ((left, "step of the head, ms"), (right, "memory of a device, GiB")):
        axes.set(xscale="log", yscale="log", xlabel="devices", ylabel=label)
        axes.grid(True, which="both", alpha=0.2)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    source = "measured rate of one device" if device.measured else "a model, not yet measured"
    figure.suptitle(f"{device.name}: {source}; 128 embeddings a device", fontsize=10)
    return _save(plt, figure, path)
