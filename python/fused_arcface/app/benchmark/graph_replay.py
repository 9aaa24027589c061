"""Time the passes of a provider replayed from a CUDA graph: the GPU's time without the host's launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..measure.timing import Timing, time_interleaved
from . import memory
from .cases import PASSES, Case, Inputs, make_inputs
from .providers import Provider
from .report import Report
from .runner import reason_of
from .truth import PassResult, error_of

_WARM_PASSES = 3

MOST_DIFFERENCE = 1e-3
"""Largest relative difference between a replay and a pass that is not replayed. The kernels and their inputs are the
same, and only sums without a fixed order may differ."""


def _capture(provider: Provider, inputs: Inputs, backward: bool) -> tuple[Callable[[], None], PassResult]:
    """Return a function that replays one pass, and the result whose memory each replay writes.

    New leaves are made on the stream of the capture: autograd adds a leaf's gradient on the stream that it met first.

    Raises:
        RuntimeError: if the pass does something that a graph cannot hold, or the replay gives another result.
    """
    device = inputs.embeddings.device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), provider.settings():
        run = provider.open(inputs)
        for _ in range(_WARM_PASSES):
            right = run(backward)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with provider.settings(), torch.cuda.graph(graph, stream=stream):
        result = run(backward)
    graph.replay()
    difference = error_of(result, right)
    if not difference <= MOST_DIFFERENCE:
        raise RuntimeError(f"the replay differs from the pass by {difference:.1e}, {MOST_DIFFERENCE:.0e} allowed")
    return graph.replay, result


def time_replays(
    case: Case, providers: Sequence[Provider], device: torch.device, seconds: float, report: Report
) -> dict[tuple[str, str, str], Timing]:
    """Return the times of the replays of one case by provider, backend and pass, in ``seconds`` for each pass.

    Only passes that the report has measured are captured. A pass that cannot be captured is left out, and the report
    gets its reason.
    """
    timings: dict[tuple[str, str, str], Timing] = {}
    measured = {(each.provider, each.backend, each.pass_name) for each in report.measurements if each.case == case}
    inputs = make_inputs(case, device)
    for pass_name, backward in PASSES.items():
        for provider in providers:
            key = (provider.name, provider.backend, pass_name)
            if key not in measured:
                continue
            try:
                replay, result = _capture(provider, inputs, backward)
                (timings[key],) = time_interleaved({pass_name: replay}, device, seconds).values()
                del replay, result
            except Exception as error:  # a graph cannot hold every pass; the report gives the reason
                report.skip(provider, case, f"{pass_name} not replayed from a CUDA graph: {_first_cause(error)}")
            memory.release(device)
    return timings


def _first_cause(error: BaseException) -> str:
    """Return the error that came first: a capture that has failed raises another one at its end."""
    while error.__context__ is not None:
        error = error.__context__
    return reason_of(error)
