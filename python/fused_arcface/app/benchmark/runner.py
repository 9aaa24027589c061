"""Run the benchmark: check every provider against the truth, time them in turn, and measure their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..measure import machine
from ..measure.child import Child, ChildFailed, out_of_memory
from ..measure.timing import time_interleaved
from . import memory
from .cases import PASSES, Case, Inputs, make_inputs
from .providers import Provider
from .report import Measurement, Report
from .truth import TOLERANCE, Formula, PassResult, error_of, truth


def tolerance(provider: Provider, case: Case) -> float:
    """Return the largest relative error at which a provider's result counts as right."""
    if provider.tolerance is not None and case.dtype == "bfloat16":
        return provider.tolerance
    if provider.tf32:
        return TOLERANCE["tf32"]
    computed_in = "float16" if provider.name.endswith("fp16") else case.dtype
    return max(TOLERANCE[dtype] for dtype in (computed_in, case.weight_dtype))


def run_benchmark(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    device: torch.device,
    *,
    seconds: float = 3.0,
    with_memory: bool = True,
    earlier: Report | None = None,
    progress: Callable[[str], None] = lambda text: None,
    on_case: Callable[[Report, Case], None] = lambda report, case: None,
) -> Report:
    """Measure each provider on each case, both passes.

    Args:
        cases: shapes; in a series that differs in C alone, C ascends.
        providers: the implementations to measure.
        device: the device to measure on.
        seconds: time that the samples of one case and pass should take together.
        with_memory: if true, measure peak memory as well, if the system reports it.
        earlier: an interrupted run to resume; its cases are not measured again.
        progress: called with a line before each step.
        on_case: called after each case with all that has been found so far.
    """
    report = earlier or Report(machine.context(device), [], [], {"flops_per_second": {}})
    report.machine["memory_bytes"] = memory.available_bytes(device)
    measured = {each.case for each in report.measurements}
    cases = [case for case in cases if case not in measured]
    providers = _usable(cases, providers, device, report)
    ceilings = list(dict.fromkeys(case.dtype for case in cases))
    if device.type == "cuda" and "float32" in ceilings:  # some providers compute fp32 in tf32 or fp16
        ceilings += ["tf32", *({"float16"} - {*ceilings})]
    for name in ceilings:
        if name not in report.machine["flops_per_second"]:
            progress(f"ceiling: square product in {name}")
            _add_ceiling(report, machine.measure_ceiling(device, name), name)
    if device.type == "cpu" and "fma_flops_per_second" not in report.machine:
        report.machine["fma_flops_per_second"] = machine.fma_flops_per_second()
    with_memory = with_memory and memory.can_measure(device)
    with Child() as child:
        for case in cases:
            progress(str(case))
            _measure_case(case, providers, device, seconds, child if with_memory else None, report, progress)
            memory.release(device)
            on_case(report, case)
    return report


def _usable(
    cases: Sequence[Case], providers: Sequence[Provider], device: torch.device, report: Report
) -> list[Provider]:
    """Return the providers, except those that the same reason excludes from every case."""
    usable = []
    for provider in providers:
        reasons = {provider.reason_against(case, device) for case in cases}
        reason = reasons.pop() if len(reasons) == 1 else None
        if reason is None:
            usable.append(provider)
        else:
            report.skip(provider, None, reason)
    return usable


def _add_ceiling(report: Report, ceiling: machine.Ceiling, name: str) -> None:
    dtype, provider = ("float32", "ceiling-tf32") if name == "tf32" else (name, "ceiling")
    case = Case(ceiling.size, ceiling.size, ceiling.size, dtype, dtype)
    report.machine["flops_per_second"][name] = ceiling.flops_per_second
    report.machine["copy_bytes_per_second"] = ceiling.copy_bytes_per_second
    report.measurements.append(
        Measurement(provider, ceiling.library, "fwd", case, ceiling.timing, ceiling.error, products=2)
    )


def _measure_case(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    seconds: float,
    child: Child | None,
    report: Report,
    progress: Callable[[str], None],
) -> None:
    named = {}
    for provider in providers:
        reason = provider.reason_against(case, device) or _lacks_memory(provider, case, report)
        if reason is not None:
            report.skip(provider, case, reason)
        else:
            named[str(provider)] = provider
    if not named:
        return

    def skip(name: str, reason: str) -> None:
        report.skip(named[name], case, reason)

    inputs = make_inputs(case, device)
    errors: dict[str, dict[str, float]] = {}
    rights: dict[Formula, PassResult] = {}
    # One formula after the other: the right result of each holds a (C, D) gradient.
    for name, provider in sorted(named.items(), key=lambda item: item[1].formula):
        progress(f"{case}: checking {name}")
        try:
            if provider.formula not in rights:
                rights = {provider.formula: truth(inputs, provider.formula)}
            found = _errors(provider, inputs, rights[provider.formula])
        except Exception as error:  # a provider that fails must not end the run; the report gives the reason
            skip(name, reason_of(error))
            memory.release(device)
            continue
        worst, allowed = np.max([*found.values()]), tolerance(provider, case)  # NaN if one of them is
        if worst <= allowed:
            errors[name] = found
        else:
            skip(name, f"wrong: relative error {worst:.1e}, {allowed:.0e} allowed")
    rights.clear()
    memory.release(device)

    peaks: dict[str, dict[str, int]] = {}
    for name in errors:
        if child is None:
            break
        progress(f"{case}: memory of {name}")
        try:
            peaks[name] = memory.peaks_of(named[name], case, device, child)
        except (MemoryError, ChildFailed, torch.OutOfMemoryError) as error:
            skip(name, f"memory not measured: {reason_of(error)}")
        memory.release(device)

    for pass_name, backward in PASSES.items():
        progress(f"{case}: {pass_name}, all in turn")
        runs = {name: named[name].timed(inputs, backward) for name in errors}
        timings = time_interleaved(runs, device, seconds, lambda name, error: skip(name, reason_of(error)))
        for name, timing in timings.items():
            provider, peak = named[name], peaks.get(name, {}).get(pass_name)
            measured = (pass_name, case, timing, errors[name][pass_name], provider.products[backward], peak)
            report.measurements.append(Measurement(provider.name, provider.backend, *measured))


def _errors(provider: Provider, inputs: Inputs, right: PassResult) -> dict[str, float]:
    with provider.settings():
        run = provider.open(inputs)
        return {name: error_of(run(backward), right) for name, backward in PASSES.items()}


def _lacks_memory(provider: Provider, case: Case, report: Report) -> str | None:
    """Return the reason why a case will not fit, or None.

    It is computed from the same provider's measured peak at fewer classes, which is linear in their number.
    """
    smaller = [
        each
        for each in report.measurements
        if (each.provider, each.backend, each.pass_name) == (provider.name, provider.backend, "fwd+bwd")
        and each.peak_bytes is not None
        and replace(each.case, C=case.C) == case
        and each.case.C < case.C
    ]
    peak = max((each.peak_bytes or 0) * case.C / each.case.C for each in smaller) if smaller else 0
    # Three tensors of the centers' size are added: centers, gradient, and the truth's gradient or another layout.
    needed, limit = peak + 3 * case.weight_bytes, report.machine["memory_bytes"]
    if needed > limit:
        return f"out of memory: {needed / 2**30:.1f} GiB needed, {limit / 2**30:.1f} GiB available"
    return None


def reason_of(error: BaseException) -> str:
    """Return the first line of an error as the reason for a skip."""
    first = str(error).strip().partition("\n")[0]
    return f"out of memory: {first}" if out_of_memory(error) else f"{type(error).__name__}: {first}"
