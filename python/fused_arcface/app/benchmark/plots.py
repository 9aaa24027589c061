"""Pictures of a run (time, memory, roofline), of the cost model and of capacities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ..drawing import WIDTH, Drawing, plain_ticks
from .cost_model import Device, ModeledStep
from .names import is_ours
from .report import Measurement, Report

# One strong color for ours. Color-blind readers can tell all these colors apart (Okabe and Ito's palette).
_OURS = "#d55e00"
_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#8c6d00", "#000000", "#777777", "#e69f00")
_MARKERS = "osv^D<>PX*"


def run_drawings(report: Report) -> list[Drawing]:
    """Return every picture that the run has measurements for."""
    by_classes, by_rows = _longest_series(report, "C"), _longest_series(report, "N")
    pictures = (
        ("time_by_classes", "Time of forward and backward pass, by the number of classes.", by_classes, "C", "ms"),
        ("memory_by_classes", "Peak memory, by the number of classes.", by_classes, "C", "peak_bytes"),
        ("time_by_rows", "Time of forward and backward pass, by the rows of a batch.", by_rows, "N", "ms"),
    )
    drawings = [
        Drawing(name, caption, partial(_lines, report=report, series=series, axis=axis, value=value))
        for name, caption, series, axis, value in pictures
        if any(value == "ms" or each.peak_bytes is not None for each in series)
    ]
    if any(each.is_ours for each in report.measurements) and "copy_bytes_per_second" in report.machine:
        caption = "Roofline: the rate of each pass, below the machine's measured ceilings."
        drawings.append(Drawing("roofline", caption, partial(_roofline, report=report)))
    return drawings


def _longest_series(report: Report, axis: str) -> list[Measurement]:
    """Return the longest series with gradients in which ``axis`` alone differs; [] if it has less than two cases."""
    series: dict[tuple[object, ...], list[Measurement]] = {}
    for each in report.measurements:
        if each.pass_name == "fwd+bwd":
            fixed = tuple(value for name, value in vars(each.case).items() if name != axis)
            series.setdefault(fixed, []).append(each)
    longest = max(series.values(), key=lambda found: len({each.case for each in found}), default=[])
    return longest if len({each.case for each in longest}) > 1 else []


def _styles(measurements: Iterable[Measurement]) -> dict[str, dict[str, Any]]:
    """Return a style for each label. Ours have one color, and the first of them, the default, is thick."""
    styles: dict[str, dict[str, Any]] = {}
    peers = 0
    for each in measurements:
        label = each.label
        if label in styles:
            continue
        if each.is_fused:
            variants = sum(style["color"] == _OURS for style in styles.values())
            width, line = (2.6, "-") if variants == 0 else (1.4, (":", "--", "-.")[variants % 3])
            styles[label] = {"color": _OURS, "lw": width, "ls": line, "zorder": 5}
        else:
            styles[label] = {"color": _COLORS[peers % len(_COLORS)], "lw": 1.4, "ls": "-" if peers < 8 else "--"}
            peers += 1
        styles[label] |= {"marker": _MARKERS[len(styles) % len(_MARKERS)], "ms": 5}
    return styles


def _lines(plt: Any, report: Report, series: Sequence[Measurement], axis: str, value: str) -> Any:
    """Draw a line for each provider: milliseconds, or peak memory in MiB, over C or N."""
    figure, axes = plt.subplots(figsize=(WIDTH, 5.4), layout="constrained")
    memory = value == "peak_bytes"
    for label, style in _styles(report.measurements).items():
        mine = (each for each in series if each.label == label and not (memory and each.peak_bytes is None))
        points = sorted(mine, key=lambda each: getattr(each.case, axis))
        if points:
            xs = [getattr(each.case, axis) for each in points]
            ys = [_mebibytes(each.peak_bytes or 0) if memory else each.ms for each in points]
            axes.plot(xs, ys, label=label, **style)
    case = series[0].case
    fixed = ", ".join(f"{name}={getattr(case, name):,}" for name in "NCD" if name != axis)
    axes.set(xscale="log", yscale="log", xlabel={"C": "classes C", "N": "rows N"}[axis])
    sizes = sorted({getattr(each.case, axis) for each in series})  # each has its tick, and nothing else has one
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    plain_ticks(axes.yaxis)
    axes.set_ylabel("MiB, at least 1" if memory else "forward + backward, ms")
    what = "Peak memory beyond inputs and gradients" if memory else "Time"
    figure.suptitle(f"{what}, {fixed}, {case.dtype}\n{_source(report.context)}", fontsize=9)
    axes.grid(True, which="both", alpha=0.2)
    # The legend has the order of the lines' right ends, from top to bottom.
    lines = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: -pair[0].get_ydata()[-1])
    figure.legend(*zip(*lines, strict=True), fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _source(context: Mapping[str, Any]) -> str:
    return f"{context['device']}, {context['commit']}"


def _mebibytes(peak_bytes: float) -> float:
    """Return MiB, at least one: a smaller number shows pages of libraries."""
    return max(peak_bytes / 2**20, 1.0)


def _traffic(each: Measurement) -> float:
    """Return the bytes that a pass must move: centers once in each direction, gradient once; S for bare products."""
    backward = each.pass_name == "fwd+bwd"
    logits = each.case.N * each.case.C * each.case.torch_dtype.itemsize if not each.is_ours else 0
    return (3 if backward else 1) * (each.case.weight_bytes + logits)


def _roofline(plt: Any, report: Report) -> Any:
    figure, axes = plt.subplots(figsize=(WIDTH, 5.6), layout="constrained")
    copy = report.machine["copy_bytes_per_second"]
    shown = [each for each in report.measurements if each.is_fused or each.provider == "products"]
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
    rate = f"copy, {copy / 1e9:,.0f} GB/s"
    axes.annotate(rate, (low, low * copy / 1e9), (4, 0), textcoords="offset points", va="top", fontsize=8)
    styles = _styles(report.measurements)
    seen: set[tuple[str, str]] = set()
    for each, x in zip(shown, xs_all, strict=True):
        label, filled = each.label, each.pass_name == "fwd+bwd"
        named = f"{label}, {each.pass_name}" if (label, each.pass_name) not in seen else None
        seen.add((label, each.pass_name))
        marker, color = styles[label]["marker"], styles[label]["color"]
        style = {"marker": marker, "ms": 6, "ls": "", "mec": color, "mfc": color if filled else "none"}
        axes.plot([x], [each.flops_per_second / 1e9], label=named, **style)
    axes.set(xscale="log", yscale="log", xlabel="flops for each byte that must be moved", ylabel="GFLOP/s")
    for ticked in (axes.xaxis, axes.yaxis):
        plain_ticks(ticked)
    figure.suptitle(f"Roofline, {_source(report.context)}", fontsize=9)
    axes.grid(True, which="both", alpha=0.2)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2, columnspacing=1, handletextpad=0.2)
    return figure


def capacity_drawing(rows: Sequence[dict[str, Any]]) -> Drawing:
    """Return the picture of each setup's largest number of identities."""
    caption = "Most identities with a training step that fits, by recipe and by the dtypes of centers and momentum."
    return Drawing("capacity", caption, partial(_capacity, rows=rows))


def _capacity(plt: Any, rows: Sequence[dict[str, Any]]) -> Any:
    ordered = sorted(rows, key=lambda row: row["max_C"])
    figure, axes = plt.subplots(figsize=(WIDTH, 0.45 * len(ordered) + 1.3), layout="constrained")
    labels = [f"{row['recipe']} ({row['backend']})\n{row['weight_dtype']} + {row['momentum_dtype']}" for row in ordered]
    colors = [_OURS if is_ours(row["recipe"]) else _COLORS[0] for row in ordered]
    bars = axes.barh(labels, [row["max_C"] / 1e6 for row in ordered], color=colors)
    texts = [f"{row['max_C'] / 1e6:.3g} M" + ("" if row["how"] == "measured" else " (extrapolated)") for row in ordered]
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.margins(x=0.3)
    axes.tick_params(labelsize=7.5)
    axes.set_xlabel("identities, millions")
    if rows:
        row = rows[0]
        budget = f"{row['budget_bytes'] / 2**30:.3g} GiB"
        title = f"A training step within {budget}, N={row['N']}, D={row['D']}\n{_source(row)}"
        figure.suptitle(title, fontsize=9)
    return figure


def cost_drawing(steps: Sequence[ModeledStep], device: Device, name: str) -> Drawing:
    """Return the picture of step time and memory over the number of devices.

    There is a line for each number of identities, and markers show the largest part of a step.
    """
    caption = "The cost model: a step of the head and the memory of a device, by the number of devices."
    return Drawing(name, caption, partial(_costs, steps=steps, device=device))


_LIMITS = {
    "arithmetic": "o",
    "memory traffic": "s",
    "network": "^",
    "latency": "D",
    "launches": "v",
    "does not fit": "x",
}


def _costs(plt: Any, steps: Sequence[ModeledStep], device: Device) -> Any:
    figure, (time, memory) = plt.subplots(2, 1, figsize=(WIDTH, 8), layout="constrained")
    for index, identities in enumerate(sorted({step.identities for step in steps})):
        mine = [step for step in steps if step.identities == identities]
        label, color = f"{identities:.0e} identities".replace("e+0", "e"), (*_COLORS[:3], _OURS)[index % 4]
        fitting = [step for step in mine if step.limit != "does not fit"]
        time.plot([s.devices for s in fitting], [s.seconds * 1e3 for s in fitting], color=color, label=label, lw=1.5)
        memory.plot([s.devices for s in mine], [s.memory_bytes / 2**30 for s in mine], color=color, lw=1.5)
        for step in mine:
            style = {"marker": _LIMITS[step.limit], "color": color, "ms": 7, "ls": ""}
            memory.plot([step.devices], [step.memory_bytes / 2**30], **style)
            if step in fitting:
                time.plot([step.devices], [step.seconds * 1e3], **style)
    held = device.memory_bytes / 2**30
    memory.axhline(held, color="#444444", lw=1)
    memory.annotate(device.name, (max(s.devices for s in steps), held * 1.15), fontsize=8, ha="right")
    for limit in dict.fromkeys(step.limit for step in steps):
        name = limit if limit == "does not fit" else f"limited by {limit}"
        time.plot([], [], marker=_LIMITS[limit], ls="", color="#444444", label=name)
    devices = sorted({step.devices for step in steps})
    for axes, label in ((time, "step of the head, ms"), (memory, "memory of a device, GiB")):
        axes.set(xscale="log", yscale="log", xlabel="devices", ylabel=label, title=label)
        axes.set_xticks(devices, [f"{count:,}" for count in devices])
        axes.set_xticks([], minor=True)
        plain_ticks(axes.yaxis)
        axes.grid(True, which="both", alpha=0.2)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    source = "measured rate of one device" if device.measured else "a model, not yet measured"
    figure.suptitle(f"{device.name}: {source}; 128 embeddings a device", fontsize=9)
    return figure
