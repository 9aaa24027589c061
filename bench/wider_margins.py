"""Time a step with each margin and option of the wider family beside ArcFace's, in turn, on the machine's CPU.

    python bench/wider_margins.py                             N = 256, D = 512, a hundred thousand class centers, fp32
    python bench/wider_margins.py --centers 20000 --seconds 20 --only "AdaCos()" "a learned scale"

Each row has the least and the median milliseconds of forward and backward, and the least over ArcFace's. For PartialFC
with CenterSGD it is the least over the row without the option. With three sub-centers there are a third of the classes
and as many rows of weight.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch

import fused_arcface as fa
from fused_arcface.app.measure.timing import Timed, time_interleaved

BASE, UPDATED = "ArcFace", "CenterSGD"


def variants(rows: int, centers: int) -> dict[str, dict[str, Any]]:
    """Return options of the loss, and the share of mixed labels, by name. Names with CenterSGD are for PartialFC."""
    return {
        BASE: {"margin": fa.ArcFace()},
        "AdaFace": {"margin": fa.AdaFace(0.4)},
        "MagFace": {"margin": fa.MagFace()},
        "ElasticFace": {"margin": fa.ElasticFace(0.5, 0.05)},
        "CurricularFace": {"margin": fa.CurricularFace(0.5)},
        "MVSoftmax": {"margin": fa.MVSoftmax(fa.ArcFace(), t=1.12)},
        "InterclassFilter": {"margin": fa.InterclassFilter(fa.ArcFace(), 0.4)},
        "InterTopK": {"margin": fa.InterTopK()},
        "UniFace": {"margin": fa.UniFace(bias=fa.UniFace.bias_for(centers))},
        "SphereFace2": {"margin": fa.SphereFace2()},
        "sub_centers=3": {"margin": fa.ArcFace(), "sub_centers": 3},
        "label_smoothing=0.1": {"margin": fa.ArcFace(), "label_smoothing": 0.1},
        "sample_weight": {"sample_weight": torch.rand(rows)},
        "ClassMargin": {"margin": fa.ClassMargin(torch.rand(centers), kind="arc")},
        "mixed labels": {"share": 0.3},
        "a learned scale": {"scale": torch.nn.Parameter(torch.tensor(64.0))},
        "AdaCos()": {"scale": fa.AdaCos()},
        "AdaCos(delayed=True)": {"scale": fa.AdaCos(delayed=True)},
        UPDATED: {},
        f"mixed, {UPDATED}": {"share": 0.3},
    }


def step(options: dict[str, Any], rows: int, centers: int, dim: int, updated: bool) -> Timed:
    """Make a step, forward and backward, of one variant on the CPU kernel."""
    generator = torch.Generator().manual_seed(0)
    classes = options.get("sub_centers", 1)
    x = torch.randn(rows, dim, generator=generator, requires_grad=True)
    w = torch.randn(centers // classes * classes, dim, generator=generator, requires_grad=True)
    y = torch.randint(0, centers // classes, (rows,), generator=generator)

    options = dict(options)
    share = options.pop("share", None)
    target = y if share is None else (y, y.roll(1), share)
    loss = functools.partial(fa.margin_softmax_loss, weight=w, backend="cpu", **options)
    if updated:
        loss = fa.PartialFC(dim, centers, center_optimizer=fa.CenterSGD(0.1), backend="cpu")

    def run() -> None:
        x.grad = w.grad = None
        loss(x, target=target).backward()

    return run


def main() -> None:
    """Print a row for each margin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="N")
    parser.add_argument("--centers", type=int, default=100_000, help="rows of weight")
    parser.add_argument("--dim", type=int, default=512, help="D")
    parser.add_argument("--seconds", type=float, default=30, help="for all samples together")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="the rows beside ArcFace and CenterSGD")
    given = parser.parse_args()
    sizes = given.rows, given.centers, given.dim
    chosen = variants(given.rows, given.centers)
    if given.only is not None:
        chosen = {name: options for name, options in chosen.items() if name in (BASE, UPDATED, *given.only)}
    runs = {name: step(options, *sizes, UPDATED in name) for name, options in chosen.items()}
    times = time_interleaved(runs, torch.device("cpu"), given.seconds)
    print(f"{'':20} {'least, ms':>10} {'median, ms':>11} {'÷ ' + BASE:>10}")
    for name, timing in times.items():
        base = times[UPDATED if UPDATED in name else BASE]
        print(f"{name:20} {timing.least:10.1f} {timing.median:11.1f} {timing.least / base.least:10.3f}")


if __name__ == "__main__":
    main()
