"""Replays from a CUDA graph, on a machine without one: the stand-in runs a capture at once and replays nothing."""

from __future__ import annotations

import contextlib
import csv
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.benchmark_reports import CPU, TINY

from fused_arcface.app.benchmark.graph_replay import time_replays
from fused_arcface.app.benchmark.providers import Provider, Run, select
from fused_arcface.app.benchmark.report import Measurement, Report
from fused_arcface.app.measure.timing import Timing

BENCH = Path(__file__).parents[3] / "bench"


class Graphs:
    """A stand-in for torch's CUDA graphs: what is captured, and how often it is replayed."""

    def __init__(self) -> None:
        self.capturing, self.captures, self.replays = False, 0, 0
        self.on_replay: Callable[[], object] = lambda: None

    def replay(self) -> None:
        self.replays += 1
        self.on_replay()

    @contextlib.contextmanager
    def capture(self, graph: object, stream: object) -> Iterator[None]:
        self.capturing, self.captures = True, self.captures + 1
        try:
            yield
        except Exception:
            raise RuntimeError("the capture was invalidated") from None
        finally:
            self.capturing = False


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    stand_in = Graphs()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=stand_in.replay))
    monkeypatch.setattr(torch.cuda, "graph", stand_in.capture)
    return stand_in


def _report(providers: list[Provider]) -> Report:
    context = dict.fromkeys(("device", "torch", "commit", "date"), "")
    measurements = [
        Measurement(each.name, each.backend, name, TINY, Timing((2.0,)), 0.0, 8)
        for each in providers
        for name in ("fwd", "fwd+bwd")
    ]
    return Report(context, measurements, [], {})


def _opened(change: Callable[[Run], Run]) -> Provider:
    """Return our CPU backend as a provider whose runs are changed."""
    (ours,) = select(["fused_arcface"], "cpu")
    return replace(ours, open=lambda inputs: change(ours.open(inputs)))


def test_each_pass_is_captured_once_after_it_is_warm(graphs: Graphs) -> None:
    seen: list[tuple[bool, bool]] = []

    def watched(run: Run) -> Run:
        def call(backward: bool):
            seen.append((backward, graphs.capturing))
            return run(backward)

        return call

    provider = _opened(watched)
    report = _report([provider])
    timings = time_replays(TINY, [provider], CPU, 0.001, report)
    assert set(timings) == {("fused_arcface", "cpu", name) for name in ("fwd", "fwd+bwd")}
    assert seen == [(backward, captured) for backward in (False, True) for captured in (False, False, False, True)]
    assert graphs.replays > 6 and report.skips == []


def test_a_pass_without_a_measurement_is_not_captured(graphs: Graphs) -> None:
    provider = _opened(lambda run: run)
    assert time_replays(TINY, [provider], CPU, 0.001, _report([])) == {}
    assert graphs.captures == 0


def test_a_pass_that_refuses_capture_is_reported_by_name(graphs: Graphs) -> None:
    def waiting(run: Run) -> Run:
        def call(backward: bool):
            if backward and graphs.capturing:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            return run(backward)

        return call

    provider = _opened(waiting)
    report = _report([provider])
    assert set(time_replays(TINY, [provider], CPU, 0.001, report)) == {("fused_arcface", "cpu", "fwd")}
    (skip,) = report.skips
    assert (skip.provider, skip.backend, skip.case) == ("fused_arcface", "cpu", TINY)
    assert skip.reason == (
        "fwd+bwd not replayed from a CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    )


def test_a_replay_with_another_result_is_reported(graphs: Graphs) -> None:
    """The replay adds 1 to the loss that the capture wrote."""

    def kept(run: Run) -> Run:
        def call(backward: bool):
            result = run(backward)
            if graphs.capturing:
                graphs.on_replay = lambda: result.loss.add_(1)
            return result

        return call

    provider = _opened(kept)
    report = _report([provider])
    assert time_replays(TINY, [provider], CPU, 0.001, report) == {}
    assert [skip.reason.partition(": RuntimeError: ")[0] for skip in report.skips] == [
        f"{name} not replayed from a CUDA graph" for name in ("fwd", "fwd+bwd")
    ]
    assert "the replay differs from the pass by" in report.skips[0].reason


def test_the_time_has_a_column_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed here")
    script = runpy.run_path(str(BENCH / "gpu_benchmark.py"))
    (provider,) = select(["fused_arcface"], "cpu")
    script["write"](_report([provider]), {(TINY, "fused_arcface", "cpu", "fwd+bwd"): Timing((0.5, 1.5, 9.0))}, tmp_path)
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["pass"], row["ms"], row["graph_ms"]) for row in rows] == [
        ("fwd", "2.0", ""),
        ("fwd+bwd", "2.0", "1.5"),
    ]
