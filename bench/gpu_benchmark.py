"""The GPU part of gpu_verify.sh: measure our GPU backends and the peers at the sizes that matter.

    python bench/gpu_benchmark.py FOLDER [SECONDS]

writes rows.csv, rows.json and run.json into FOLDER, after each case: what was measured stays when time runs out.
The rows have the benchmark's columns, ``graph_ms`` and the versions that compiled the kernels. ``graph_ms`` is the
median time of the same pass replayed from a CUDA graph, for our backends: the GPU's share of ``ms``. It is empty where
the pass was not captured, and the skips in run.json give the reason. Needs nothing but torch, Triton and this package.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import time
from pathlib import Path

import torch

from fused_arcface import backends
from fused_arcface.app.benchmark.cases import Case
from fused_arcface.app.benchmark.graph_replay import time_replays
from fused_arcface.app.benchmark.names import is_ours
from fused_arcface.app.benchmark.providers import Provider, select
from fused_arcface.app.benchmark.report import FIELDS, Report, write_csv, write_json
from fused_arcface.app.benchmark.runner import run_benchmark
from fused_arcface.app.measure.timing import Timing
from fused_arcface.backends.hopper import CONFIGS
from fused_arcface.backends.triton.configs import ALGORITHMS, pick

BF16 = ("bfloat16", "bfloat16")
# The sizes of the acceptance bars first, then those at which the two algorithms compete.
CASES = (
    *(Case(N, 1_000_000, 512, *dtypes) for dtypes in (BF16, ("bfloat16", "float32")) for N in (4096, 1024)),
    Case(1024, 1_000_000, 512, "float32", "float32"),
    *(Case(4096, 1_000_000, D, *BF16) for D in (256, 128)),
    Case(512, 1_000_000, 512, *BF16),
    Case(256, 1_000_000, 512, *BF16),
    Case(1024, 100_000, 512, *BF16),
)


def _algorithms(variants: bool) -> list[Provider]:
    """Return the Triton backend with each algorithm forced; ``fused_arcface`` is the one that configs.pick takes.

    ``-copied`` ones, which copy bf16 centers in the backward pass too, are among the variants.
    """
    (ours,) = select(["fused_arcface"], "triton")
    return [
        dataclasses.replace(ours, name=f"fused_arcface-{name}", environment={"FUSED_ARCFACE_TRITON_ALGORITHM": name})
        for name in ALGORITHMS
        if variants or not name.endswith("-copied")
    ]


VARIED_CASES = 2
"""In so many of the first cases each configuration of Hopper's kernels is measured, in the others the first alone, and
each variant of the Triton backend."""


def _hopper(variants: bool) -> list[Provider]:
    """Return the CUDA backend by configuration of its kernels for Hopper: rows ``fused_arcface-hopper``.

    ``-0`` is the backend without them.
    """
    described = backends.describe("cuda")
    if not described or described.startswith("not "):
        return []
    (ours,) = select(["fused_arcface"], "cuda")

    def reason(case: Case, on: torch.device) -> str | None:
        if (case.D, case.dtype) != (512, "bfloat16"):
            return "Hopper's kernels take bf16 embeddings of 512 columns"
        return ours.reason_against(case, on)

    return [
        dataclasses.replace(
            ours,
            name="fused_arcface-hopper" + ("" if name == "1" else f"-{name}"),
            environment={"FUSED_ARCFACE_HOPPER": name},
            reason_against=reason,
        )
        for name in ((*CONFIGS, "0") if variants else ("1", "0"))
    ]


Replays = dict[tuple[Case, str, str, str], Timing]
"""Times of the replays by case, provider, backend and pass."""


def write(report: Report, replays: Replays, folder: Path) -> None:
    """Write the report and the times of the replays beside it."""
    report.write(folder)
    versions = {"triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda or "none"}
    rows = []
    for each, row in zip(report.measurements, report.rows(), strict=True):
        replay = replays.get((each.case, each.provider, each.backend, each.pass_name))
        rows.append({**row, "graph_ms": None if replay is None else round(replay.median, 4), **versions})
    write_csv(folder / "rows.csv", rows, [*FIELDS, "graph_ms", *versions])
    write_json(folder / "rows.json", rows)


def main() -> None:
    """Measure each case until the time is over."""
    folder, budget = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 120.0
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    peers = select(["insightface", "insightface-tf32", "insightface-fp16", "eager", "products"])
    every = select(["fused_arcface", "fused_arcface-tf32"])
    ours = [each for each in every if each.is_fused and each.backend != "cpu"]
    print(f"Hopper's kernels: {backends.describe('cuda') or 'the backend cuda cannot run'}")
    end = time.monotonic() + budget
    whole: Report | None = None
    replays: Replays = {}
    for number, case in enumerate(CASES):
        if time.monotonic() > end:
            print(f"{case}: not measured, the time of {budget:.0f} s is over")
            continue
        providers = [*ours, *_hopper(number < VARIED_CASES), *_algorithms(number < VARIED_CASES), *peers]
        whole = run_benchmark([case], providers, device, seconds=1.0, earlier=whole)
        write(whole, replays, folder)
        fused = [each for each in providers if each.is_fused]
        found_replays = time_replays(case, fused, device, 0.1, whole)
        replays |= {(case, *key): timing for key, timing in found_replays.items()}
        write(whole, replays, folder)
        picked = [pick(case.N, case.C, case.D, arch, case.torch_dtype, with_sums) for with_sums in (False, True)]
        print(f"\n{case}: picked {picked[0]} forward, {picked[1]} forward and backward")
        found = [each for each in whole.measurements if each.case == case]
        for each in sorted(found, key=lambda each: (each.pass_name, each.ms)):
            extra = "" if each.peak_bytes is None else f"  {each.peak_bytes / 1e6:9,.0f} MB beyond"
            name = each.label
            replay = replays.get((case, each.provider, each.backend, each.pass_name))
            extra = (f"  replayed {replay.median:10.3f} ms" if replay is not None else "") + extra
            print(f"  {each.pass_name:8}{name:32}{each.ms:10.3f} ms {each.ps_per_logit:8.2f} ps a logit{extra}")
        for skip in whole.skips:
            if skip.case in (case, None):
                print(f"  {skip.provider} ({skip.backend}): {skip.reason}")
        sys.stdout.flush()
    wrong = [] if whole is None else [skip for skip in whole.skips if skip.reason.startswith("wrong")]
    if any(is_ours(skip.provider) for skip in wrong):
        sys.exit("a result of this package is wrong: see above")


if __name__ == "__main__":
    main()
