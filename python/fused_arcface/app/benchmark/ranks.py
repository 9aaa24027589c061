"""Predict and measure a training step on several gloo ranks of this machine.

The inputs of a prediction are other measurements than the step that it predicts: the time that one more row costs one
process, with another number of classes; its copies; a step over hardly any classes; and the collectives alone. Each
rank is a process of one thread, which does one thing after the other. If there are more ranks than processors, they
share them, and the model takes that into account.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..measure import machine
from ..measure.child import Child
from .capacity import TakeStep, with_center_sgd
from .cases import Case
from .cost_model import FUSED_FP32, Device, Network, predict

IDENTITIES = (2_000, 20_000, 200_000)
_BATCH, _D = 64, 512
# Steps of few and of many rows give the cost of one more row. A step over hardly any classes gives the fixed cost.
_FEW_ROWS, _MANY_ROWS, _RATE_C, _FEW_CLASSES = 32, 192, 12_000, 64
# The collectives alone: a small message measures the latency, a large one the transfer.
_SMALL_BYTES, _LARGE_BYTES = 2**10, 2**22
_SAMPLES, _TIMEOUT = 7, timedelta(seconds=120)


def run_ranks(world_sizes: Sequence[int], progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return a row for each number of ranks and each of :data:`IDENTITIES`.

    ``N`` counts the rows of all ranks. ``arithmetic_ms`` and ``limit``, the name of the largest part, belong to the
    prediction.

    Raises:
        ChildFailed, MemoryError: if a rank failed.
    """
    cpu = torch.device("cpu")
    context = machine.context(cpu) | {"device": f"{machine.device_name(cpu, threads=1)} a rank"}
    rows = []
    progress("the rate of one process")
    with Child() as child:
        seconds_per_mac, copy, fixed = child.call(_rates)
    for ranks in world_sizes:
        progress(f"{ranks} ranks")
        latency, rate, steps = _run_world(ranks)
        share = max(1.0, ranks / machine.processors())
        rates = share * seconds_per_mac, copy / share, math.inf
        device = Device(context["device"], *rates, measured=True, step_seconds=share * fixed, overlap=0.0)
        model = partial(predict, device, batch=_BATCH, D=_D, storage=FUSED_FP32, embedding_bytes=4)
        for identities, measured in zip(IDENTITIES, steps, strict=True):
            step = model(identities, ranks, network=Network(ranks, rate, rate, latency))
            rows.append(
                {
                    "ranks": ranks,
                    "N": _BATCH * ranks,
                    "C": identities,
                    "D": _D,
                    "predicted_ms": round(step.seconds * 1e3, 3),
                    "measured_ms": round(measured * 1e3, 3),
                    "arithmetic_ms": round(step.arithmetic_seconds * 1e3, 3),
                    "limit": step.limit,
                    "network_bytes_per_second": round(rate) if ranks > 1 else None,
                    "network_latency_us": round(latency * 1e6, 1) if ranks > 1 else None,
                    **context,
                }
            )
    return rows


def _run_world(ranks: int) -> tuple[float, float, list[float]]:
    """Return latency in seconds, bytes per second, and the slowest rank's seconds of a step for :data:`IDENTITIES`."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        children = [stack.enter_context(Child()) for _ in range(ranks)]
        pool = stack.enter_context(ThreadPoolExecutor(ranks))
        calls = [pool.submit(child.call, _rank, rank, ranks, f"{folder}/store") for rank, child in enumerate(children)]
        found = [call.result() for call in calls]
    latencies, rates, steps = zip(*found, strict=True)
    return max(latencies), min(rates), [max(each) for each in zip(*steps, strict=True)]


def _rates() -> tuple[float, float, float]:
    """Measure one thread: seconds per row, class and dimension, bytes copied per second, fixed seconds of a step."""
    torch.set_num_threads(1)
    few, many = (_median_seconds(_training_step(rows, _RATE_C)) for rows in (_FEW_ROWS, _MANY_ROWS))
    fixed = _median_seconds(_training_step(_BATCH, _FEW_CLASSES))
    copy = machine.copy_bytes_per_second(torch.device("cpu"), seconds=0.5)
    return (many - few) / ((_MANY_ROWS - _FEW_ROWS) * _RATE_C * _D), copy, fixed


def _rank(rank: int, ranks: int, store: str) -> tuple[float, float, list[float]]:
    """Return what one rank measures: latency, bytes per second, and the seconds of a step for :data:`IDENTITIES`."""
    torch.set_num_threads(1)
    # The loopback interface. Otherwise gloo looks up the machine's name, which need not have an address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=_TIMEOUT)
    try:
        latency, rate = _network(ranks) if ranks > 1 else (0.0, float(2**60))
        steps = []
        for identities in IDENTITIES:
            step = _training_step(_BATCH, identities)
            steps.append(_median_seconds(step, dist.barrier))
        return latency, rate, steps
    finally:
        dist.destroy_process_group()


def _network(ranks: int) -> tuple[float, float]:
    """Measure latency for each doubling of the ranks, and bytes per second; see :class:`~.cost_model.Network`."""
    seconds = []
    for size in (_SMALL_BYTES, _LARGE_BYTES):
        own = torch.zeros(size, dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(ranks)]
        seconds.append(_median_seconds(partial(dist.all_gather, every, own), dist.barrier))
    doublings = (ranks - 1).bit_length()
    received = (_LARGE_BYTES - _SMALL_BYTES) * (ranks - 1)
    return seconds[0] / doublings, received / max(seconds[1] - seconds[0], 1e-9)


def _training_step(rows: int, classes: int) -> TakeStep:
    return with_center_sgd("auto", "float32", Case(rows, classes, _D), torch.device("cpu"))


def _median_seconds(run: Callable[[], object], barrier: Callable[[], object] = lambda: None) -> float:
    run()
    samples = []
    for _ in range(_SAMPLES):
        barrier()
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
