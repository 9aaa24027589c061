"""The benchmark of gpu_verify.sh: measure our GPU backends and the peers at the sizes that matter.

    python bench/gpu_benchmark.py FOLDER [SECONDS]

writes rows.csv, rows.json and run.json into FOLDER after each case, so they are kept when the time runs out. The rows
have the benchmark's columns, ``graph_ms`` and the versions that compiled the kernels. ``graph_ms`` is the median time
of the same pass replayed from a CUDA graph: the GPU's share of ``ms``. It is empty if the pass was not captured, and
the skips in run.json give the reason. The script needs torch, Triton and this package. Peers that cannot be imported
are named among the skips.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from fused_arcface import backends
from fused_arcface.app.benchmark.cases import BF16, BF16_BESIDE_FP32, FP32, Case
from fused_arcface.app.benchmark.graph_replay import time_replays
from fused_arcface.app.benchmark.providers import Provider, select
from fused_arcface.app.benchmark.report import Report, write_rows
from fused_arcface.app.benchmark.runner import run_benchmark
from fused_arcface.app.measure.timing import Timing
from fused_arcface.backends.hopper import CONFIGS
from fused_arcface.backends.triton.configs import ALGORITHMS

MILLION = 1_000_000


@dataclasses.dataclass(frozen=True)
class Turn:
    """A case, and the implementations that it is measured with."""

    case: Case
    peers: tuple[str, ...] = ()
    """Names of other providers."""
    ours: bool = True
    """If false, only the peers are measured."""
    variants: bool = False
    """If true, each algorithm of Triton and each configuration of the Hopper kernels is measured too."""
    replayed: tuple[str, ...] = ()
    """Peers that are replayed from a CUDA graph too, as all of ours are."""


INSIGHTFACE = ("insightface", "insightface-tf32", "insightface-fp16")
# Without normalization and margin: yardsticks.
LINEAR = ("cut_cross_entropy", "liger", "linear_cross_entropy", "linear_cross_entropy-chunked")
PLAIN = ("eager", "plain", "compiled", "compiled-plain", "pytorch-metric-learning", "products")
# At N=4096 the logits of plain PyTorch nearly fill a GPU of 80 GB, so compiled ones are not measured. A pass of Liger
# takes seconds at a million classes, because its chunks are one to four rows; so it runs at N=1024 alone.
TURNS = (
    Turn(Case(4096, MILLION, 512, *BF16), ("products", "eager", "plain"), variants=True),
    Turn(Case(4096, MILLION, 512, *FP32), INSIGHTFACE, ours=False),
    # With so few logits launching the kernels takes most of the time. Neither eager nor compiled is replayed: the
    # reference reads a value to check the labels, which a CUDA graph cannot hold.
    Turn(Case(256, 10_000, 512, *BF16), PLAIN, replayed=("plain", "compiled-plain")),
    Turn(Case(1024, MILLION, 512, *BF16), PLAIN, variants=True),
    Turn(Case(1024, MILLION, 512, *FP32), (*INSIGHTFACE, "eager", "pytorch-metric-learning", "products")),
    # In a turn of their own: if they stop or hang, ours have been measured.
    Turn(Case(4096, MILLION, 512, *BF16), tuple(each for each in LINEAR if each != "liger"), ours=False),
    Turn(Case(1024, MILLION, 512, *BF16), LINEAR, ours=False),
    *(Turn(Case(N, MILLION, 512, *BF16_BESIDE_FP32), ("eager",)) for N in (4096, 1024)),
    *(Turn(Case(N, MILLION, 512, *BF16), ("eager", "products"), variants=True) for N in (512, 256)),
    Turn(Case(1024, 100_000, 512, *BF16), ("eager", "products"), variants=True),
    *(Turn(Case(4096, MILLION, D, *BF16), ("products",), variants=True) for D in (256, 128)),
)
"""The most valuable first, because the time may run out. A case may have several turns."""


def _algorithms() -> list[Provider]:
    """Return the Triton backend with each algorithm forced; ``fused_arcface`` chooses its algorithm itself."""
    (ours,) = select(["fused_arcface"], "triton")
    return [
        dataclasses.replace(ours, name=f"fused_arcface-{name}", environment={"FUSED_ARCFACE_TRITON_ALGORITHM": name})
        for name in ALGORITHMS
    ]


def _hopper() -> list[Provider]:
    """Return the CUDA backend with other configurations of its kernels for Hopper, and (``-0``) without them."""
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
            name=f"fused_arcface-hopper-{name}",
            environment={"FUSED_ARCFACE_HOPPER": name},
            reason_against=reason,
        )
        for name in (*CONFIGS, "0")
        if name != "1"  # which is the backend as it is
    ]


def providers_of(turn: Turn) -> list[Provider]:
    """Return the providers of a turn, ours first, installed or not."""
    found: list[Provider] = []
    if turn.ours:
        names = ["fused_arcface", *(["fused_arcface-tf32"] if turn.case.dtype == "float32" else [])]
        found += [each for each in select(names) if each.is_fused and each.backend != "cpu"]
    if turn.variants:
        found += [*_hopper(), *_algorithms()]
    return [*found, *(select(turn.peers) if turn.peers else ())]


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
    write_rows(folder, "rows", rows)


def measure(turns: Iterable[Turn], folder: Path, seconds: float, device: torch.device) -> Report | None:
    """Measure turns until the time is over, and write the report after each; return it, or None if there is none."""
    end = time.monotonic() + seconds
    whole: Report | None = None
    replays: Replays = {}
    for turn in turns:
        case, providers = turn.case, providers_of(turn)
        if time.monotonic() > end:
            print(f"{case}: not measured, the time of {seconds:.0f} s is over")
            continue
        # Each turn has its own report: a report measures no case twice. The machine's ceilings are handed on.
        earlier = None if whole is None else Report(whole.context, [], [], whole.machine)
        part = run_benchmark([case], providers, device, seconds=1.0, earlier=earlier)
        if whole is None:
            whole = part
        else:
            whole.measurements += part.measurements
            whole.skips += [skip for skip in part.skips if skip not in whole.skips]
        write(whole, replays, folder)
        replayed = [each for each in providers if each.is_fused or each.name in turn.replayed]
        found = time_replays(case, replayed, device, 0.1, whole)
        replays |= {(case, *key): timing for key, timing in found.items()}
        write(whole, replays, folder)
        _say(whole, replays, case)
    return whole


def main() -> None:
    """Measure every turn on the GPU; the exit status is 1 if a result of this package is wrong."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 190.0
    # Each shape has its own graph: the fastest use of torch.compile.
    torch._dynamo.config.automatic_dynamic_shapes = False
    print(f"Hopper's kernels: {backends.describe('cuda') or 'the backend cuda cannot run'}")
    found = measure(TURNS, folder, seconds, torch.device("cuda"))
    if found is not None and found.has_wrong_result_of_ours():
        sys.exit("a result of this package is wrong: see above")


def _say(report: Report, replays: Replays, case: Case) -> None:
    """Print the measurements of one case, the fastest first, and its skips."""
    print(f"\n{case}")
    found = [each for each in report.measurements if each.case == case]
    for each in sorted(found, key=lambda each: (each.pass_name, each.ms)):
        extra = "" if each.peak_bytes is None else f"  {each.peak_bytes / 1e6:9,.0f} MB beyond"
        replay = replays.get((case, each.provider, each.backend, each.pass_name))
        extra = (f"  replayed {replay.median:10.3f} ms" if replay is not None else "") + extra
        print(f"  {each.pass_name:8}{each.label:32}{each.ms:10.3f} ms {each.ps_per_logit:8.2f} ps a logit{extra}")
    for skip in report.skips:
        if skip.case in (case, None):
            print(f"  {skip.provider} ({skip.backend}): {skip.reason}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
