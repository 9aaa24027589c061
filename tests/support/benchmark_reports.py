"""A report of a benchmark that nobody measured."""

from __future__ import annotations

import torch

from fused_arcface.app.benchmark.cases import PASSES, Case
from fused_arcface.app.benchmark.report import Measurement, Report, Skip
from fused_arcface.app.measure.timing import Timing

CPU = torch.device("cpu")
TINY = Case(6, 300, 16)
CAPACITY_FIELDS = (
    "recipe,backend,dtype,weight_dtype,momentum_dtype,N,D,budget_bytes,max_C,bytes_per_class,step_ms,how,"
    "device,torch,commit,date"
)
"""The columns of capacity.csv."""


def synthetic_report() -> Report:
    """Return three providers over a series of C and one of N; time and memory grow with the logits."""
    context = {"device": "a device", "torch": "2.0", "commit": "abc", "date": "2026-01-01T00:00:00+00:00"}
    machine = {"flops_per_second": {"float32": 1e11}, "copy_bytes_per_second": 1e12, "memory_bytes": 2**34}
    report = Report(context, [], [Skip("liger", "triton", TINY, "not installed")], machine)
    cases = [Case(64, c) for c in (1000, 10_000, 100_000)] + [Case(n, 10_000) for n in (16, 256)]
    for case in cases:
        for name, factor in (("fused_arcface", 1), ("eager", 4), ("products", 2)):
            for index, pass_name in enumerate(PASSES):
                ms = factor * (1 + index) * case.N * case.C * 1e-6
                timing, peak = Timing((ms, 1.1 * ms)), None if case.N == 16 else (factor - 1) * case.N * case.C * 4
                backend = "cpu" if factor == 1 else "torch"
                measurement = Measurement(name, backend, pass_name, case, timing, 1e-6, 2 + 4 * index, peak)
                report.measurements.append(measurement)
    return report
