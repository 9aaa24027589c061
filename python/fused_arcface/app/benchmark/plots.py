"""Pictures of a run (time, memory, roofline), of the cost model and of capacities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ..drawing import COLORS, WIDTH, Drawing, panel, plain_ticks
from .cost_model import Device, ModeledStep
from .names import is_ours
from .report import Measurement, Report

# One strong color for ours, the others of the palette and a gray for peers.
_OURS = "#D55E00"
_PEERS = (*(color for color in COLORS if color != _OURS), "#777777")
_GRAY = "#444444"
_MARKERS = "osv^D<>PX*"
_BOTH_LOG = {"xscale": "log", "yscale": "log"}


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
            line = "-" if peers < len(_PEERS) else "--"
            styles[label] = {"color": _PEERS[peers % len(_PEERS)], "lw": 1.4, "ls": line}
            peers += 1
        styles[label] |= {"marker": _MARKERS[len(styles) % len(_MARKERS)], "ms": 5}
    return styles


def _lines(plt: Any, report: Report, series: Sequence[Measurement], axis: str, value: str) -> Any:
    """Draw a line for each provider: milliseconds, or peak memory in MiB, over C or N."""
    memory, case = value == "peak_bytes", series[0].case
    labels = {"C": "classes C", "N": "rows N"}[axis], "MiB, at least 1" if memory else "forward + backward, ms"
    figure, axes = panel(plt, 5.4, **_BOTH_LOG, xlabel=labels[0], ylabel=labels[1])
    for label, style in _styles(report.measurements).items():
        mine = (each for each in series if each.label == label and not (memory and each.peak_bytes is None))
        points = sorted(mine, key=lambda each: getattr(each.case, axis))
        if points:
            xs = [getattr(each.case, axis) for each in points]
            # At least one MiB: a smaller number shows pages of libraries.
            ys = [max((each.peak_bytes or 0) / 2**20, 1.0) if memory else each.ms for each in points]
            axes.plot(xs, ys, label=label, **style)
    _ticks(axes, [getattr(each.case, axis) for each in series])
    fixed = ", ".join(f"{name}={getattr(case, name):,}" for name in "NCD" if name != axis)
    what = "Peak memory beyond inputs and gradients" if memory else "Time"
    figure.suptitle(f"{what}, {fixed}, {case.dtype}\n{_source(report.context)}", fontsize=9)
    # The legend has the order of the lines' right ends, from top to bottom.
    lines = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: -pair[0].get_ydata()[-1])
    figure.legend(*zip(*lines, strict=True), fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _source(context: Mapping[str, Any]) -> str:
    return f"{context['device']}, {context['commit']}"


def _ticks(axes: Any, sizes: Iterable[int]) -> None:
    """Give each size a tick of the horizontal axis, and nothing else."""
    shown = sorted(set(sizes))
    axes.set_xticks(shown, [f"{size:,}" for size in shown])
    axes.set_xticks([], minor=True)
    plain_ticks(axes.yaxis)


def _traffic(each: Measurement) -> float:
    """Return the bytes that a pass must move: centers once in each direction, gradient once; S for bare products."""
    backward = each.pass_name == "fwd+bwd"
    logits = each.case.N * each.case.C * each.case.torch_dtype.itemsize if not each.is_ours else 0
    return (3 if backward else 1) * (each.case.weight_bytes + logits)


def _roofline(plt: Any, report: Report) -> Any:
    labels = {"xlabel": "flops for each byte that must be moved", "ylabel": "GFLOP/s"}
    figure, axes = panel(plt, 5.6, **_BOTH_LOG, **labels)
    copy = report.machine["copy_bytes_per_second"]
    shown = [each for each in report.measurements if each.is_fused or each.provider == "products"]
    xs_all = [each.flops_per_second * each.ms * 1e-3 / _traffic(each) for each in shown]
    peaks = report.machine["flops_per_second"]
    ends = [*xs_all, *(peak / copy for peak in peaks.values())]
    low, high = min(ends) / 2, max(ends) * 2
    for dtype, peak in peaks.items():
        top = peak / 1e9
        axes.plot([low, peak / copy, high], [low * copy / 1e9, top, top], color=_GRAY, lw=1.2)
        axes.annotate(f"{dtype} product, {top:,.0f} GFLOP/s", (high, top), ha="right", va="bottom", fontsize=8)
    fma = report.machine.get("fma_flops_per_second")
    if fma is not None:
        axes.axhline(fma / 1e9, color=_GRAY, lw=1.2, ls="--")
        axes.annotate(f"fp32 multiply-adds, {fma / 1e9:,.0f} GFLOP/s", (low, fma / 1e9), va="bottom", fontsize=8)
    rate = f"copy, {copy / 1e9:,.0f} GB/s"
    axes.annotate(rate, (low, low * copy / 1e9), (4, 0), textcoords="offset points", va="top", fontsize=8)
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for each, x in zip(shown, xs_all, strict=True):
        points.setdefault((each.label, each.pass_name), []).append((x, each.flops_per_second / 1e9))
    styles = _styles(report.measurements)
    for (label, pass_name), mine in points.items():
        color = styles[label]["color"]
        style = {"mec": color, "mfc": color if pass_name == "fwd+bwd" else "none", "marker": styles[label]["marker"]}
        axes.plot(*zip(*mine, strict=True), label=f"{label}, {pass_name}", ls="", ms=6, **style)
    for ticked in (axes.xaxis, axes.yaxis):
        plain_ticks(ticked)
    figure.suptitle(f"Roofline, {_source(report.context)}", fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2, columnspacing=1, handletextpad=0.2)
    return figure


def capacity_drawing(rows: Sequence[dict[str, Any]]) -> Drawing:
    """Return the picture of each setup's largest number of identities, given at least one row."""
    caption = "Most identities with a training step that fits, by recipe and by the dtypes of centers and momentum."
    return Drawing("capacity", caption, partial(_capacity, rows=rows))


def _capacity(plt: Any, rows: Sequence[dict[str, Any]]) -> Any:
    ordered = sorted(rows, key=lambda row: row["max_C"])
    figure, axes = plt.subplots(figsize=(WIDTH, 0.45 * len(ordered) + 1.3), layout="constrained")
    labels = [f"{row['recipe']} ({row['backend']})\n{row['weight_dtype']} + {row['momentum_dtype']}" for row in ordered]
    colors = [_OURS if is_ours(row["recipe"]) else _PEERS[0] for row in ordered]
    bars = axes.barh(labels, [row["max_C"] / 1e6 for row in ordered], color=colors)
    texts = [f"{row['max_C'] / 1e6:.3g} M" + ("" if row["how"] == "measured" else " (extrapolated)") for row in ordered]
    axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.margins(x=0.3)
    axes.tick_params(labelsize=7.5)
    axes.set_xlabel("identities, millions")
    budget = f"{rows[0]['budget_bytes'] / 2**30:.3g} GiB"
    title = f"A training step within {budget}, N={rows[0]['N']}, D={rows[0]['D']}\n{_source(rows[0])}"
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
        label, color = f"{identities:.0e} identities".replace("e+0", "e"), (*_PEERS[:3], _OURS)[index % 4]
        fitting = [step for step in mine if step.limit != "does not fit"]
        time.plot([s.devices for s in fitting], [s.seconds * 1e3 for s in fitting], color=color, label=label, lw=1.5)
        memory.plot([s.devices for s in mine], [s.memory_bytes / 2**30 for s in mine], color=color, lw=1.5)
        for step in mine:
            style = {"marker": _LIMITS[step.limit], "color": color, "ms": 7, "ls": ""}
            memory.plot([step.devices], [step.memory_bytes / 2**30], **style)
            if step in fitting:
                time.plot([step.devices], [step.seconds * 1e3], **style)
    held = device.memory_bytes / 2**30
    memory.axhline(held, color=_GRAY, lw=1)
    memory.annotate(device.name, (max(s.devices for s in steps), held * 1.15), fontsize=8, ha="right")
    for limit in dict.fromkeys(step.limit for step in steps):
        name = limit if limit == "does not fit" else f"limited by {limit}"
        time.plot([], [], marker=_LIMITS[limit], ls="", color=_GRAY, label=name)
    for axes, label in ((time, "step of the head, ms"), (memory, "memory of a device, GiB")):
        axes.set(**_BOTH_LOG, xlabel="devices", ylabel=label, title=label)
        _ticks(axes, [step.devices for step in steps])
        axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    source = "measured rate of one device" if device.measured else "a model, not yet measured"
    figure.suptitle(f"{device.name}: {source}; 128 embeddings a device", fontsize=9)
    return figure
