"""Compare this machine's ratios with bench/baseline.json; exit status 1 if the package became slower or larger.

    python bench/check.py             compare
    python bench/check.py --update    record

A ratio is our time over the time of torch's bare matrix products of the same shape, timed in turn in the same minute,
or our peak memory over the N×C logits that are not stored. A library's products differ between kinds of processors, so
there is a baseline for each instruction set and number of threads.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from fused_arcface import backends
from fused_arcface.app.benchmark.cases import BF16, PASSES, Case
from fused_arcface.app.benchmark.providers import select
from fused_arcface.app.benchmark.report import Report
from fused_arcface.app.benchmark.runner import run_benchmark

BASELINE = Path(__file__).with_name("baseline.json")
CPU_CASES = (Case(128, 20_000), Case(32, 50_000))
CUDA_CASES = (Case(1024, 300_000, 512, *BF16), Case(1024, 300_000))
# Two idle runs on one machine differed by about half of this quarter.
TOLERANCE = {"time": 0.25, "memory": 0.10}
# A busy moment of the machine looks like a regression, so this many runs must agree on one.
RUNS = 3
# A share of the logits, for pages of libraries that a process may or may not have touched before.
SLACK = {"time": 0.0, "memory": 0.05}


def kind_of(device: torch.device) -> str:
    """Return the key of a baseline: the GPU's name, or the instruction set in use and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{backends.load('cpu').isa()}, {torch.get_num_threads()} threads"


def ratios_of(report: Report) -> dict[str, float]:
    """Return each of our measurements as a multiple of its yardstick, by name, "time …" and "memory …"."""
    products = {(each.case, each.pass_name): each for each in report.measurements if each.provider == "products"}
    ratios = {}
    for each in report.measurements:
        if not each.is_ours:
            continue
        name = f"{each.provider} ({each.backend}), {each.case}, {each.pass_name}"
        # The least of the samples is not changed by a busy moment.
        ratios[f"time of {name}"] = each.timing.least / products[each.case, each.pass_name].timing.least
        if each.peak_bytes is not None:
            ratios[f"memory of {name}"] = each.peak_bytes / (each.case.N * each.case.C * 4)
    return {name: round(ratio, 4) for name, ratio in ratios.items()}


def regressions(measured: dict[str, float], baseline: dict[str, float]) -> list[str]:
    """Return a line for each ratio that exceeds its baseline by more than the tolerance, and for each missing one."""
    lines = [f"{name}: no longer measured" for name in baseline if name not in measured]
    for name, ratio in measured.items():
        before, kind = baseline.get(name), name.split()[0]
        if before is not None and ratio > before * (1 + TOLERANCE[kind]) + SLACK[kind]:
            lines.append(f"{name}: {ratio:.3f} × its yardstick; it was {before:.3f}")
    return lines


def measure(device: torch.device) -> dict[str, float]:
    """Measure this machine's ratios.

    Raises:
        SystemExit: if a result is wrong.
    """
    providers = [each for each in select(["ours", "products"]) if each.is_fused or not each.is_ours]
    cases = CUDA_CASES if device.type == "cuda" else CPU_CASES
    report = run_benchmark(cases, providers, device, seconds=6.0)
    for skip in report.skips:
        if skip.reason.startswith("wrong"):
            raise SystemExit(f"{skip.provider} ({skip.backend}), {skip.case}: {skip.reason}")
    return ratios_of(report)


def main() -> int:
    """Compare or record; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="record this machine's ratios as its baseline")
    update = parser.parse_args().update
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    baseline = json.loads(BASELINE.read_text())
    kind = kind_of(device)
    if not update and kind not in baseline["ratios"]:
        known = "; ".join(baseline["ratios"]) or "none"
        print(f"No baseline for {kind} (there are: {known}). Record one with: python bench/check.py --update")
        return 1
    before = baseline["ratios"].get(kind, {})
    measured = measure(device)
    for run in range(2, RUNS + 1):
        if update or not regressions(measured, before):
            break
        print(f"Slower or larger than it was; measuring again ({run} of {RUNS})")
        again = measure(device)
        measured = {name: min(found[name] for found in (measured, again) if name in found) for name in measured | again}
    for name, ratio in measured.items():
        was = f"{before[name]:8.3f} before" if name in before else ""
        print(f"{ratio:8.3f} {was}  {name}")
    if update:
        baseline["ratios"][kind] = measured
        BASELINE.write_text(json.dumps(baseline, indent=1, ensure_ascii=False) + "\n")
        print(f"Recorded for {kind} in {BASELINE}")
        return 0
    found = regressions(measured, before)
    print("\n".join(["", *found]) if found else f"\nNo regression on {kind}; passes: {', '.join(PASSES)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
