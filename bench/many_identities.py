"""One training step over as many identities as fit: ``python bench/many_identities.py --classes 8000000``.

Prints construction and step time and the process's peak memory per weight element, for the fused head and, at no more
classes than ``--unfused``, for the operations of insightface's PartialFC_V2 with torch.optim.SGD. Linux only.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fused_arcface as fa


def fused(classes: int, dim: int, rows: int, dtype: torch.dtype, momentum: torch.dtype, rate: float) -> list[float]:
    """Seconds of construction and of each of two steps."""
    start = time.perf_counter()
    recipe = fa.CenterSGD(lr=0.1, weight_decay=5e-4, momentum_dtype=momentum)
    head = fa.PartialFC(dim, classes, dtype=dtype, sample_rate=rate, center_optimizer=recipe)
    times = [time.perf_counter() - start]
    x = torch.randn(rows, dim, requires_grad=True)
    for _ in range(2):
        start = time.perf_counter()
        head(x, torch.randint(0, classes, (rows,))).backward()
        times.append(time.perf_counter() - start)
    return times


def unfused(classes: int, dim: int, rows: int) -> list[float]:
    """The same with materialised logits, a dense gradient and torch.optim.SGD, as insightface's head does it."""
    start = time.perf_counter()
    weight = torch.nn.Parameter(torch.normal(0, 0.01, (classes, dim)))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=5e-4)
    times = [time.perf_counter() - start]
    x, y = torch.randn(rows, dim, requires_grad=True), torch.randint(0, classes, (rows,))
    every = torch.arange(rows)
    for _ in range(2):
        start = time.perf_counter()
        logits = F.linear(F.normalize(x), F.normalize(weight)).clamp(-1, 1)
        with torch.no_grad():
            shifted = logits.arccos()
            shifted[every, y] += 0.5
            shifted.cos_()
        loss = F.cross_entropy((logits + (shifted - logits).detach()) * 64, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--unfused", type=int, default=200_000, help="classes of the unfused head")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.0, help="sample_rate")
    parser.add_argument("--kinds", default="float32/float32,bfloat16/int8", help="centres/momentum, several")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        if options.one == "unfused":
            classes, times = options.unfused, unfused(options.unfused, options.dim, options.rows)
        else:
            dtype, momentum = (getattr(torch, name) for name in options.one.split("/"))
            classes = options.classes
            times = fused(classes, options.dim, options.rows, dtype, momentum, options.rate)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        seconds = " ".join(f"{each:.2f}" for each in times)
        print(
            f"{options.one:18} {classes:>10} classes  {peak / classes / options.dim:6.2f} bytes an element  "
            f"{peak / 2**30:6.2f} GiB  seconds: {seconds} (construction, steps)"
        )
        return
    for kind in [*options.kinds.split(","), "unfused"]:  # a process each: a peak is a process's
        done = subprocess.run([sys.executable, *sys.argv, "--one", kind], check=False)
        if done.returncode != 0:
            print(f"{kind:18} {'out of memory' if done.returncode == -9 else f'failed: {done.returncode}'}")


if __name__ == "__main__":
    main()
