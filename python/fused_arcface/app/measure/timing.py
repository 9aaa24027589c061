"""Time several runs in turn, so that a slow minute of the machine affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

# Short passes are repeated until a sample takes this long, because clock and scheduler are coarse.
_SAMPLE_SECONDS = 5e-3
_LEAST_SAMPLES, _MOST_SAMPLES = 3, 50
# A run is warmed up by two passes, a short one by more, until one of these is reached.
_WARM_SECONDS, _MOST_WARM_PASSES = 0.1, 5
# Milliseconds of a pass that needs no second one to warm it up.
_LONG_PASS = 500.0
# Bytes that are overwritten before each pass on a GPU: more than any last-level cache, so that none starts with its
# inputs there.
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one pass, a number for each sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)

    def quantile(self, q: float) -> float:
        """Return a quantile, linear between the samples; q in [0, 1].

        >>> Timing((1.0, 2.0, 4.0)).quantile(0.25)
        1.5
        """
        return float(np.quantile(self.samples, q))


Timed = Callable[[], object]


def time_interleaved(
    runs: Mapping[str, Timed],
    device: torch.device,
    seconds: float,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time each run, one sample of each in turn, after passes that warm it up and are not counted.

    Args:
        runs: what to call, by name.
        device: the device that they run on; a GPU is timed by its own events.
        seconds: time that all samples together should take. A run that has used its share stops, but not before its
            third sample, unless it alone has taken twice the whole.
        on_failure: called with the name and the error of a run that raises, which is then left out of the result.
            Without it the error is raised.
    """
    sample = _cuda_sampler(device) if device.type == "cuda" else _cpu_sample
    repeats, spent = dict.fromkeys(runs, 1), dict.fromkeys(runs, 0.0)
    samples: dict[str, list[float]] = {name: [] for name in runs}

    def take(name: str) -> float | None:
        """Return the milliseconds of one sample; None if it failed and ``on_failure`` was called."""
        try:
            return sample(runs[name], repeats[name])
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(name, error)
            del samples[name]
            return None

    for name in runs:
        # The first pass loads and compiles, so its time is not the time of the next one.
        end = time.perf_counter() + _WARM_SECONDS
        for passes in range(1, _MOST_WARM_PASSES + 1):
            once = take(name)
            if once is None or once > _LONG_PASS:
                break
            if device.type != "cuda":  # a GPU's events are fine enough for one pass
                repeats[name] = max(1, int(_SAMPLE_SECONDS * 1e3 / max(once, 1e-6)))
            if passes > 1 and time.perf_counter() > end:
                break
    for round_ in range(_MOST_SAMPLES):
        share = 2 * seconds if round_ < _LEAST_SAMPLES else seconds / len(runs)
        going = [name for name in samples if round_ == 0 or spent[name] < share]
        if not going:
            break
        for name in going:
            start = time.perf_counter()
            taken = take(name)
            spent[name] += time.perf_counter() - start
            if taken is not None:
                samples[name].append(taken)
    return {name: Timing(tuple(each)) for name, each in samples.items()}


def _cpu_sample(run: Timed, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats * 1e3


def _cuda_sampler(device: torch.device) -> Callable[[Timed, int], float]:
    cache = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def once(run: Timed) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Nothing waits between the flush and the pass: while the GPU overwrites its cache the launches queue up, and
        # are no part of the time unless the pass itself waits for the GPU.
        cache.zero_()
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(stop))

    return lambda run, repeats: statistics.fmean(once(run) for _ in range(repeats))
