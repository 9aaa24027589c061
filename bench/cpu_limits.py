"""Compare the CPU kernels with the limits of the processor and with the code that users would write instead.

    python bench/cpu_limits.py                        # everything, some two minutes on two quiet cores
    python bench/cpu_limits.py small                  # only that part: fp32, bf16 or small
    python bench/cpu_limits.py --before FOLDER        # beside the fp32 step of an earlier build (pip install --target)

Everything runs in turn in one process, and the least time of many runs is taken, so that a busy minute affects all
alike. An earlier build has its own process, which waits while the others run. Ratios are similar on other machines,
milliseconds are not. Each line ends with its limit; the exit status is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.app.benchmark import peers
from fused_arcface.app.benchmark.cases import BF16, HEADLINE, SMALL, Case, Inputs, make_inputs
from fused_arcface.app.benchmark.providers import HeadRun, select
from fused_arcface.app.measure import machine

Run = Callable[[], object]
MISSED: list[str] = []


def least(runs: dict[str, Run], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Return the least milliseconds of each run over ``rounds`` times ``repeats``, in turn after one run of each."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def step(loss: peers.Loss, inputs: Inputs) -> Run:
    """Return a run of a forward and a backward pass."""
    head = HeadRun(loss, inputs)
    return lambda: head(True)


def ours(inputs: Inputs) -> Run:
    """Return a run of this package's step."""
    return step(lambda x, w, y: fa.margin_softmax_loss(x, w, y, backend="cpu"), inputs)


def named(provider: str, inputs: Inputs) -> Run:
    """Return a run of a provider of the benchmark."""
    (found,) = select([provider], "cpu")
    return found.timed(inputs, backward=True)


def judge(name: str, value: float, limit: float, at_least: bool = False) -> None:
    """Print a figure beside its limit."""
    met = value >= limit if at_least else value <= limit
    print(
        f"  {name:<66}{value:6.2f}   {'>=' if at_least else '<='} {limit:.2f}   {'' if met else 'MISSED'}", flush=True
    )
    if not met:
        MISSED.append(name)


# A separate program: the earlier package may lack names that this script imports.
WORKER = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "ScikitBuild" not in type(each).__name__]  # an editable install
sys.path.insert(0, sys.argv[1])
import torch
import fused_arcface as fa
threads, N, C, D = map(int, sys.argv[2:])
torch.set_num_threads(threads)
x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
target = torch.randint(C, (N,))
print(fa.__file__, flush=True)
for _ in sys.stdin:
    x.grad = w.grad = None
    fa.margin_softmax_loss(x, w, target, backend="cpu").backward()
    x.grad = w.grad = None
    print("done", flush=True)
"""


@contextlib.contextmanager
def earlier(path: str, isa: str = "") -> Iterator[Run]:
    """Yield a function that runs the fp32 step of another build of this package in a separate process."""
    sizes = torch.get_num_threads(), HEADLINE.N, HEADLINE.C, HEADLINE.D
    command = [sys.executable, "-c", WORKER, path, *map(str, sizes)]
    environment = os.environ | ({"FUSED_ARCFACE_ISA": isa} if isa else {})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        print(f"earlier build: {process.stdout.readline().strip()} {isa}")

        def run() -> None:
            print("step", file=process.stdin, flush=True)
            process.stdout.readline()

        yield run


def flops(case: Case) -> float:
    """Return the floating-point operations of a step, 8NDC."""
    return 8.0 * case.N * case.C * case.D


def fp32(rounds: int, before: str | None) -> None:
    """Measure the fp32 step."""
    inputs = make_inputs(HEADLINE, "cpu")
    runs = {"ours": ours(inputs), "eager": step(peers.plain, inputs), "products": named("products", inputs)}
    if any(each.name == "fused_arcface-avx2" for each in select(["ours"], "cpu")):
        runs["avx2"] = named("fused_arcface-avx2", inputs)
    ceiling = max(machine.fma_flops_per_second() or 0 for _ in range(3))
    with contextlib.ExitStack() as builds:
        if before and "avx2" in runs:
            runs["earlier"] = builds.enter_context(earlier(before))
            runs["earlier avx2"] = builds.enter_context(earlier(before, "avx2"))
        ms = least(runs, rounds)
    ceiling = max(ceiling, *(machine.fma_flops_per_second() or 0 for _ in range(3)))
    print(f"{HEADLINE}: multiply-adds in registers {ceiling / 1e9:.0f} GFLOP/s; ms", _rounded(ms))
    judge("fp32: share of the multiply-adds in registers", flops(HEADLINE) / ms["ours"] * 1e3 / ceiling, 0.75, True)
    judge("fp32: of torch's three bare products", ms["ours"] / ms["products"], 0.60)
    judge("fp32: times as fast as the plain eager head", ms["eager"] / ms["ours"], 4.5, True)
    if "earlier" in runs:
        judge("fp32, FUSED_ARCFACE_ISA=avx2: of the earlier build's time", ms["avx2"] / ms["earlier avx2"], 1.03)
        judge("fp32: of the earlier build's time", ms["ours"] / ms["earlier"], 1.0)


def bf16(rounds: int, before: str | None) -> None:
    """Measure the bf16 step, and the fp32 step under autocast."""
    case = Case(HEADLINE.N, HEADLINE.C, HEADLINE.D, *BF16)
    inputs, mixed = make_inputs(case, "cpu"), make_inputs(HEADLINE, "cpu")

    def under_autocast(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fa.margin_softmax_loss(x, w, y, backend="cpu")

    runs = {
        "ours": ours(inputs),
        "ours, autocast": step(under_autocast, mixed),
        "products": named("products", inputs),
        "eager": step(peers.plain, inputs),
        "eager, autocast": step(peers.plain_under_autocast, mixed),
    }
    with contextlib.ExitStack() as builds:
        if before:
            runs["earlier"] = builds.enter_context(earlier(before))
        ms = least(runs, rounds)
    print(f"{case}: ms", _rounded(ms))
    for name in ("ours", "ours, autocast"):
        judge(f"{name} in bf16: of torch's three bare bf16 products", ms[name] / ms["products"], 1.5)
        judge(f"{name} in bf16: times as fast as eager in bf16", ms["eager"] / ms[name], 4.5, True)
        if before:
            judge(f"{name} in bf16: times as fast as the earlier fp32 step", ms["earlier"] / ms[name], 1.7, True)


def small(rounds: int, _: str | None = None) -> None:
    """Measure small problems beside a plain head."""
    for case in SMALL:
        inputs = make_inputs(case, "cpu")
        runs = {"ours": ours(inputs), "eager": step(peers.plain, inputs)}
        ms = least(runs, max(rounds, 5) * 8, repeats=5)
        limit = 0.6 if (case.N, case.C, case.D) == (128, 1000, 512) and torch.get_num_threads() > 1 else 1.05
        judge(f"{case}: {ms['ours']:.3f} ms of eager's {ms['eager']:.3f}", ms["ours"] / ms["eager"], limit)


def _rounded(ms: dict[str, float]) -> str:
    return ", ".join(f"{name} {each:.0f}" for name, each in ms.items())


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], "fp32", "bf16", "small"])
    parser.add_argument(
        "--before", help="a folder that an earlier build was installed into: pip install --target FOLDER"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    parts = options.parts or ["small", "fp32", "bf16"]
    print(f"{machine.device_name(torch.device('cpu'))}; {backends.load('cpu').isa()}; load {os.getloadavg()[0]:.1f}")
    for measure in (small, fp32, bf16):
        if measure.__name__ in parts:
            measure(options.rounds, options.before)
    sys.exit(1 if MISSED else 0)


if __name__ == "__main__":
    main()
