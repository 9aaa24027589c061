"""Find the most identities whose training step fits on one GPU: ours, and the operations of other heads.

    python bench/gpu_identities.py FOLDER
    python bench/gpu_identities.py FOLDER --device cpu --budget 0.25 --rows 8 --dim 64      tries it out

A step has N=1024 rows of D=512: forward, backward, and SGD with momentum. Ours has bf16 centers and int8 momentum, with
the update in its backward pass; the others have fp32 centers and torch.optim.SGD, as they are trained. It is the search
of ``fused-arcface bench --budget``. The budget is the GPU's free memory without the part that the child process itself
needs. capacity.csv and capacity.json are written after each row, so the rows found within --seconds are kept.

Estimate for an H100, not measured: 2 + 1 trials for each of six heads. A trial of ours at 50 million identities takes
two steps of 0.9 s and 2 s to allocate; the others' are shorter. With the child's start, about 50 s.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from fused_arcface.app.benchmark import capacity, memory
from fused_arcface.app.benchmark.report import write_rows

# Memory of the child process that its allocator does not count: CUDA's context and the kernels.
_CONTEXT_BYTES = 3 * 2**29
# The peers without compiled: torch.compile would take as long as all others together.
_PEERS = ("insightface", "insightface-fp16", "pytorch-metric-learning", "eager")


def wanted(setup: capacity.TrainingSetup) -> bool:
    """Return whether a setup is one of those that are compared."""
    if setup.is_ours:
        return setup.name.endswith("CenterSGD") and (setup.weight_dtype, setup.momentum_dtype) == ("bfloat16", "int8")
    return setup.name in _PEERS


def main() -> int:
    """Search until the time is over; return the exit status, 1 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, help="GiB; default: the GPU's free memory")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=80, help="start no trial later; default %(default)s")
    options = parser.parse_args()
    device = torch.device(options.device)
    free = memory.available_bytes(device) - (_CONTEXT_BYTES if device.type == "cuda" else 0)
    budget = free if options.budget is None else min(free, int(options.budget * 2**30))
    end = time.monotonic() + options.seconds
    found = {}

    def progress(text: str) -> None:
        if time.monotonic() > end:
            raise TimeoutError(text)  # the trial would begin too late
        print(text, flush=True)

    def on_row(rows: list[dict[str, object]]) -> None:
        found.update({(row["recipe"], row["backend"]): row for row in rows})
        write_rows(options.folder, "capacity", rows)

    try:
        setups = [setup for setup in capacity.all_setups() if wanted(setup)]
        _, skips = capacity.run_capacity(
            setups, device, budget, N=options.rows, D=options.dim, progress=progress, on_row=on_row
        )
        for skip in skips:
            print(f"{skip.provider} ({skip.backend}): {skip.reason}")
    except TimeoutError as late:
        print(f"the time of {options.seconds:.0f} s is over; not tried: {late}")
    for (name, backend), row in found.items():
        step = "" if row["step_ms"] is None else f", a step of {row['step_ms']:,} ms"
        print(f"{name} ({backend}): {row['max_C']:,} identities in {budget / 2**30:.1f} GiB, {row['how']}{step}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
