"""Measure the memory of a training step over millions of identities on one CPU, construction of the centers included.

    python bench/many_identities.py                                   a million classes; insightface's operations beside
    python bench/many_identities.py --classes 8000000 --kinds bfloat16/int8 --steps 1
    python bench/many_identities.py --output bench/results/cpu        also adds its rows to identities.csv and .json

Each kind of centers and momentum is measured in its own process. Its line has the seconds of construction and of the
last step, and the bytes of the process's peak beyond those before construction. Linux only.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fused_arcface as fa
from fused_arcface.app.benchmark import peers
from fused_arcface.app.benchmark.apart import measure_apart
from fused_arcface.app.benchmark.capacity import SGD
from fused_arcface.app.benchmark.memory import status_bytes
from fused_arcface.app.measure import machine


def exact_loss(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, margin: fa.ArcFace) -> float:
    """Return the loss in fp64, over chunks of so few classes that the peak does not show them."""
    unit, negatives = F.normalize(x.double()), torch.full((len(y),), -torch.inf, dtype=torch.float64)
    for start in range(0, len(weight), 1024):
        logits = 64 * unit @ F.normalize(weight[start : start + 1024].double()).T
        logits.masked_fill_(y[:, None] == torch.arange(start, start + logits.shape[1]), -torch.inf)
        negatives = torch.logaddexp(negatives, logits.logsumexp(1))
    cosine = (unit * F.normalize(weight[y].double())).sum(1)
    return float(F.softplus(negatives - 64 * margin(cosine), threshold=40).mean())


@torch.no_grad()
def run(kind: str, C: int, D: int, N: int, steps: int) -> dict[str, Any]:
    """Measure one kind: dtypes of centers and momentum such as ``"float32/int8"``, or ``"insightface"``."""
    torch.manual_seed(0)
    x, y = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
    before, start = status_bytes("VmRSS"), time.perf_counter()
    if kind == "insightface":
        margin = fa.ArcFace(boundary="none", gradient="straight_through")
        weight = torch.nn.Parameter(torch.normal(0, 0.01, (C, D)))
        optimizer = torch.optim.SGD([weight], **SGD)
        loss_of = lambda: peers.insightface(x, weight, y)  # noqa: E731
    else:
        margin = fa.ArcFace()
        dtype, momentum_dtype = (getattr(torch, name) for name in kind.split("/"))
        head = fa.PartialFC(D, C, dtype=dtype, center_optimizer=fa.CenterSGD(**SGD, momentum_dtype=momentum_dtype))
        weight, optimizer = head.weight, head.center_optimizer
        loss_of = lambda: head(x, y)  # noqa: E731
    construction = time.perf_counter() - start
    exact, losses = exact_loss(x, weight, y, margin), []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.enable_grad():
            loss = loss_of()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        losses.append(float(loss))
        del loss
    peak = status_bytes("VmHWM") - before
    weight_dtype, momentum_dtype = ("float32/float32" if kind == "insightface" else kind).split("/")
    return {
        "recipe": "insightface + SGD" if kind == "insightface" else "fused_arcface + CenterSGD",
        "weight_dtype": weight_dtype,
        "momentum_dtype": momentum_dtype,
        "N": N,
        "C": C,
        "D": D,
        "construction_s": round(construction, 2),
        "step_s": round(seconds, 2),
        "peak_bytes": peak,
        "bytes_per_element": round(peak / C / D, 3),
        "error": float(f"{abs(losses[0] - exact) / exact:.1e}"),
        **machine.context(torch.device("cpu")),
    }


def main() -> None:
    """Measure each kind in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000, help="number of class centers C; default %(default)s")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="the first one also meets fresh memory")
    parser.add_argument("--kinds", default="float32/float32,float32/int8,bfloat16/int8,insightface")
    parser.add_argument("--output", type=Path, help="folder of identities.csv and identities.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one, options.classes, options.dim, options.rows, options.steps)))
        return
    line = (
        "{recipe:25} {weight_dtype:>8} / {momentum_dtype:8} {C:>9} classes {bytes_per_element:6.2f} bytes an element, "
        "{construction_s} s construction, {step_s} s a step, error {error}"
    )
    measure_apart(options.kinds.split(","), line, options.output, "identities")


if __name__ == "__main__":
    main()
