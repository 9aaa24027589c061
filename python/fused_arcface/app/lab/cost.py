"""Time and peak extra memory of the head, fused and reference: the benchmark's measurements at the demo's shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from fused_arcface import backends

from ..benchmark.cases import Case, make_inputs
from ..benchmark.memory import peaks_of
from ..benchmark.providers import Provider, all_providers
from ..measure.child import Child, ChildFailed
from ..measure.timing import time_interleaved

_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Cost:
    """Of the head's forward and backward pass, by ``"fused"`` and ``"reference"``."""

    case: Case
    milliseconds: dict[str, float]
    """Median, both taken in turn."""
    peak_bytes: dict[str, int | None]
    """Resident memory of a process of its own beyond inputs, class centers and the two gradients; None where it is
    not measured."""
    problem: str = ""
    """Why not."""

    def as_json(self) -> dict[str, object]:
        """For the demo's file of numbers."""
        return {**asdict(self), "problem": self.problem or None}


def head_costs(cases: Sequence[Case], seconds: float) -> list[Cost]:
    """Measure both heads at some shapes.

    Args:
        cases: the shapes, smallest first: what an earlier one left with the allocator of its process cannot hold a
            larger one. seconds: to spend on the times of each.
    """
    heads = {
        "fused": _provider("fused_arcface", backends.select("auto", _DEVICE)),
        "reference": _provider("eager", "torch"),
    }
    milliseconds = [_milliseconds(heads, case, seconds) for case in cases]
    peaks: list[dict[str, int | None]] = [dict.fromkeys(heads) for _ in cases]
    problems = [""] * len(cases)
    for name, provider in heads.items():
        with Child() as child:
            for index, case in enumerate(cases):
                try:
                    peaks[index][name] = peaks_of(provider, case, _DEVICE, child)["fwd+bwd"]
                except (MemoryError, ChildFailed, OSError) as error:
                    problems[index] = f"memory of the {name} head at {case} not measured: {error}"
    return [Cost(*measured) for measured in zip(cases, milliseconds, peaks, problems, strict=True)]


def _milliseconds(heads: Mapping[str, Provider], case: Case, seconds: float) -> dict[str, float]:
    inputs = make_inputs(case, _DEVICE)

    def timed(provider: Provider) -> Callable[[], object]:
        run = provider.open(inputs)
        return lambda: run(True)

    timings = time_interleaved({name: timed(provider) for name, provider in heads.items()}, _DEVICE, seconds)
    return {name: timing.median for name, timing in timings.items()}


def _provider(name: str, backend: str) -> Provider:
    (found,) = (each for each in all_providers() if (each.name, each.backend) == (name, backend))
    return found
