"""Train every backend on the same batches, and compare its loss curve with three seeds of the reference.

    python bench/gpu_training.py FOLDER                      2,000 steps, N=512, C=100,000, D=512, bf16; on a GPU
    python bench/gpu_training.py FOLDER --device cpu --classes 300 --rows 32 --dim 32 --steps 60

A small net is trained with ``PartialFC``: bf16 embeddings, bf16 centers, updated in the backward pass by ``CenterSGD``.
The reference is the backend ``torch``. A seed decides the initial values of net and centers, and the batches. Every
other backend is trained with the first seed, so it has the same batches as the reference.

A curve is the mean loss of each of 20 windows of steps. The spread of a window is the largest difference between the
reference's seeds, in this window or in one beside it. A backend agrees if its distance to the reference of the same
seed is at most the spread in every window. The exit status is 1 if a backend does not agree or fails, or if three seeds
did not fit into --seconds.

FOLDER gets training.csv (a row for each step) and training.json after each run, and training.png at the end.

Estimate for an H100, not measured. The reference takes four products in fp32, 4 x 2NDC / 50 TFLOP/s = 4 ms, and about
40 passes over N x C or C x D elements of 4 to 8 bytes, some 35 GB at 3 TB/s = 12 ms: 16 ms a step, 32 s a run, 96 s for
three seeds. The fused backends are bound by the host, 3 to 5 ms a step: 16 s for both. Kernels are compiled in 15 s.
Together about 130 s.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.app.benchmark.capacity import SGD
from fused_arcface.app.benchmark.report import write_csv, write_json
from fused_arcface.app.drawing import COLORS, Drawing, write_pictures
from fused_arcface.app.measure import machine
from fused_arcface.base.extras import MissingExtra

REFERENCE = "torch"
SEEDS = (0, 1, 2)
WINDOWS = 20
_LATENT, _HIDDEN, _NOISE = 128, 512, 0.5


@dataclass(frozen=True)
class Run:
    """One training run."""

    backend: str
    seed: int
    losses: list[float]
    """The loss of each step."""
    seconds: float

    @property
    def curve(self) -> list[float]:
        """The mean loss of each window of steps."""
        parts = torch.tensor(self.losses, dtype=torch.float64).tensor_split(min(WINDOWS, len(self.losses)))
        return [float(part.mean()) for part in parts]


def train(backend: str, seed: int, options: argparse.Namespace, device: torch.device) -> Run:
    """Train one backend. With the same seed every backend has the same initial values and batches."""
    N, C, D = options.rows, options.classes, options.dim
    people = torch.randn(C, _LATENT, device=device, generator=torch.Generator(device).manual_seed(12345))
    batches = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(_LATENT, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, D)).to(device)
    centers = fa.CenterSGD(**SGD)
    head = fa.PartialFC(D, C, center_optimizer=centers, backend=backend, seed=seed, device=device, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    losses = torch.empty(options.steps, device=device)  # read at the end, so that no step waits for the GPU
    start = time.perf_counter()
    for step in range(options.steps):
        target = torch.randint(C, (N,), device=device, generator=batches)
        noise = torch.randn(N, _LATENT, device=device, generator=batches)
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = net(people[target] + _NOISE * noise)
        loss: Tensor = head(embeddings, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
    return Run(backend, seed, losses.tolist(), time.perf_counter() - start)


def spread(references: list[Run]) -> list[float]:
    """Return the largest difference between the curves of the seeds, in each window or in one beside it."""
    widths = [max(values) - min(values) for values in zip(*(run.curve for run in references), strict=True)]
    return [max(widths[max(0, index - 1) : index + 2]) for index in range(len(widths))]


def distance(run: Run, references: list[Run]) -> float:
    """Return the largest distance of a curve to the reference of the same seed, in units of the spread.

    It is infinite if a loss is not finite.
    """
    if not all(math.isfinite(loss) for each in (run, *references) for loss in each.curve):
        return math.inf
    (same,) = (other for other in references if other.seed == run.seed)
    apart = [abs(mine - theirs) for mine, theirs in zip(run.curve, same.curve, strict=True)]
    return max(each / max(width, 1e-12) for each, width in zip(apart, spread(references), strict=True))


def summary(runs: list[Run], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what training.json holds.

    ``within`` is None for the reference, and for all as long as not all of its seeds have been trained.
    """
    references = [run for run in runs if run.backend == REFERENCE]
    decided = len(references) == len(SEEDS)
    rows = []
    for run in runs:
        apart = distance(run, references) if decided and run.backend != REFERENCE else None
        rows.append(
            {
                "backend": run.backend,
                "seed": run.seed,
                "first_loss": _number(run.curve[0]),
                "last_loss": _number(run.curve[-1]),
                "curve": [_number(each) for each in run.curve],
                "distance": None if apart is None else _number(apart),
                "within": None if apart is None else apart <= 1,
                "seconds": round(run.seconds, 2),
            }
        )
    sizes = {"steps": options.steps, "N": options.rows, "C": options.classes, "D": options.dim, "dtype": "bfloat16"}
    return {**sizes, "seeds": len(references), **machine.context(device), "runs": rows}


def _number(value: float) -> float | None:
    """Return a rounded number, or None if it is not finite: JSON has no such numbers."""
    return round(value, 4) if math.isfinite(value) else None


def drawing(runs: list[Run], steps: int) -> Drawing:
    """Return the picture of all curves: the reference's seeds in gray, the others in colors."""

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
        colors = iter(COLORS)
        for run in runs:
            is_reference = run.backend == REFERENCE
            style = {"color": "0.6", "linewidth": 3} if is_reference else {"color": next(colors), "linewidth": 1.2}
            at = [(index + 0.5) * steps / len(run.curve) for index in range(len(run.curve))]
            axes.plot(at, run.curve, label=f"{run.backend}, seed {run.seed}", zorder=1 if is_reference else 2, **style)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend()
        return figure

    return Drawing("training", "The loss of each backend, and of three seeds of the reference (gray).", draw)


def write(runs: list[Run], options: argparse.Namespace, device: torch.device) -> None:
    """Write the losses and the comparison."""
    rows = [
        {"backend": run.backend, "seed": run.seed, "step": step, "loss": loss}
        for run in runs
        for step, loss in enumerate(run.losses)
    ]
    options.folder.mkdir(parents=True, exist_ok=True)
    write_csv(options.folder / "training.csv", rows)
    write_json(options.folder / "training.json", summary(runs, options, device))


def usable(device: torch.device) -> list[str]:
    """Return the backends that run on this type of device, without the reference."""
    reasons = backends.available()
    return [name for name in reasons if reasons[name] is None and backends.device_type(name) == device.type]


def main() -> int:
    """Train all, the reference's first seed and the other backends first; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=170, help="start no run that would end later; %(default)s")
    options = parser.parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    first, *others = SEEDS
    plan = [(REFERENCE, first), *((name, first) for name in usable(device)), *((REFERENCE, seed) for seed in others)]
    begin = time.perf_counter()
    runs: list[Run] = []
    right = True
    for backend, seed in plan:
        left = options.seconds - (time.perf_counter() - begin)
        known = [run.seconds for run in runs if run.backend == backend]
        if known and max(known) > left:
            print(f"{backend}, seed {seed}: not run, it takes {max(known):.1f} s and {left:.1f} s are left", flush=True)
            continue
        try:
            runs.append(train(backend, seed, options, device))
        except Exception as error:  # a backend that fails must not end the others' runs
            right = False
            print(f"{backend}, seed {seed}: failed: {type(error).__name__}: {error}", flush=True)
            continue
        write(runs, options, device)
        curve = runs[-1].curve
        print(f"{backend}, seed {seed}: loss {curve[0]:.3f} to {curve[-1]:.3f}, {runs[-1].seconds:.1f} s", flush=True)
    try:
        write_pictures([drawing(runs, options.steps)], options.folder)
    except MissingExtra as missing:
        print(f"no picture: {missing}")
    for row in summary(runs, options, device)["runs"]:
        if row["backend"] != REFERENCE:
            right &= row["within"] is True
            result = {None: "not decided", True: "within the spread", False: "NOT within the spread"}[row["within"]]
            apart = "" if row["distance"] is None else f", at most {row['distance']:.2f} of it away"
            print(f"{row['backend']}: {result}{apart}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
