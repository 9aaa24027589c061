"""Train class centers that are on the device, in host memory or in a file, each storage in its own process.

Construction, the median step and the memory of ``PartialFC`` + ``CenterSGD`` on this machine's CPU, or on a GPU::

    python bench/stored_identities.py --storage file --classes 1000000000 --rate 1e-5 --steps 50
    python bench/stored_identities.py --storage device,host --classes 1000000 --rate 0.1
    python bench/stored_identities.py --device cuda --storage host --classes 30000000 --rate 0.01 --repeated

The folder of a file is removed afterwards. ``--output FOLDER`` adds rows to stored_identities.json and .csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fused_arcface as fa
from fused_arcface.app.benchmark.apart import measure_apart
from fused_arcface.app.benchmark.capacity import SGD, RepeatedCenters
from fused_arcface.app.benchmark.memory import peak_since_reset, reset_peak, status_bytes, synchronize
from fused_arcface.app.measure import machine

CPU = torch.device("cpu")


def run(options: argparse.Namespace, storage: str, folder: Path) -> dict[str, Any]:
    """Construct a head, train it, and return what it took."""
    weight_dtype, momentum_dtype = (getattr(torch, name) for name in options.dtypes.split("/"))
    recipe = fa.CenterSGD(**SGD, momentum_dtype=momentum_dtype)
    device = torch.device(options.device)
    before = reset_peak(CPU)
    if device.type == "cuda":
        reset_peak(device)
    start = time.perf_counter()
    head = (RepeatedCenters if options.repeated else fa.PartialFC)(
        options.dim,
        options.classes,
        sample_rate=options.rate,
        center_optimizer=recipe,
        dtype=weight_dtype,
        device=device,
        center_storage=str(folder / "store") if storage == "file" else storage,
    )
    synchronize(device)
    construction = time.perf_counter() - start
    times, processor = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(options.steps):
        x = torch.randn(options.rows, options.dim, generator=generator).to(device, weight_dtype).requires_grad_()
        y = torch.randint(options.classes, (options.rows,), generator=generator).to(device)
        start, used = time.perf_counter(), time.process_time()
        head(x, y).backward()
        synchronize(device)
        times.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    store = head.center_store
    start = time.perf_counter()
    if store is not None:
        store.drain()
    drained = time.perf_counter() - start
    row: dict[str, Any] = {
        "storage": storage,
        "weight_dtype": options.dtypes.split("/")[0],
        "momentum_dtype": options.dtypes.split("/")[1],
        "N": options.rows,
        "C": options.classes,
        "D": options.dim,
        "sample": len(head.sampled),
        "steps": options.steps,
        "construction_s": round(construction, 2),
        "step_ms": round(statistics.median(times[1:]) * 1e3, 1),
        "step_p80_ms": round(sorted(times[1:])[len(times[1:]) * 4 // 5] * 1e3, 1),
        # Of all threads. It depends less on other work of the machine.
        "processor_ms_a_step": round(statistics.mean(processor[1:]) * 1e3, 1),
        "drain_ms": round(drained * 1e3, 1),
        "read_bytes_a_step": 0 if store is None else store.traffic.read // options.steps,
        "written_bytes_a_step": 0 if store is None else store.traffic.written // options.steps,
        "peak_rss_bytes": status_bytes("VmHWM"),
        "rss_before_bytes": before,
        "device_peak_bytes": peak_since_reset(device) if device.type == "cuda" else None,
        "disk_bytes": 512 * sum(path.stat().st_blocks for path in folder.rglob("*") if path.is_file()),
    }
    if store is not None:
        store.close()
    return row | machine.context(device)


def main() -> None:
    """Measure each storage in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default %(default)s")
    parser.add_argument("--repeated", action="store_true", help="repeat 65,536 centers: drawing all takes minutes")
    parser.add_argument("--storage", default="device,host,file", help="comma-separated; default %(default)s")
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=10, help="the first one is left out")
    parser.add_argument("--dtypes", default="bfloat16/int8", help="of centers and momentum; default %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="times that the storages are measured in turn")
    parser.add_argument("--folder", type=Path, help="where the file is made; default: the system's temporary folder")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
            print(json.dumps(run(options, options.one, Path(folder))))
        return
    line = (
        "{storage:8} {C:>13,} classes, {sample:,} a step: {construction_s} s construction, {step_ms} ms a step "
        "(p80 {step_p80_ms}, processor {processor_ms_a_step}), peak resident memory {peak_rss_bytes:,}, "
        "disk {disk_bytes:,}"
    )
    measure_apart(options.storage.split(",") * options.rounds, line, options.output, "stored_identities")


if __name__ == "__main__":
    main()
