"""The benchmark's search for the most identities that fit, and its cost model of a step on several ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from support.benchmark_reports import CAPACITY_FIELDS, CPU, synthetic_report

from fused_arcface.app.benchmark import capacity, cost_model, memory, ranks
from fused_arcface.app.benchmark.names import chosen, is_fused
from fused_arcface.app.benchmark.report import write_rows
from fused_arcface.app.cli.bench import bench
from fused_arcface.app.measure import machine
from fused_arcface.app.measure.child import Child


@pytest.mark.slow
def test_a_trial_cannot_take_more_than_its_budget(child: Child) -> None:
    if not memory.can_measure(CPU):
        pytest.skip("this system does not limit a process's data")
    (recipe,) = (r for r in capacity.all_setups() if r.key == ("fused_arcface", "cpu", "float32", "float32"))
    shape = (8, 200_000, 64)  # 51 MB of class centers; with gradient, momentum and decay 205 MB
    trial = capacity.try_step(recipe, shape, CPU, 2**28, child)
    assert trial is not None and 3 * 51.2e6 < trial.peak_bytes < 2**28
    # The allowance for threads' stacks is 2**28 itself, so the refused one needs more than twice that.
    assert capacity.try_step(recipe, (8, 1_000_000, 64), CPU, 2**28, child) is None


@pytest.mark.slow
def test_an_update_in_the_backward_needs_no_gradient(child: Child) -> None:
    if not memory.can_measure(CPU):
        pytest.skip("this system does not let a process reset its peak of resident memory")
    (recipe,) = (r for r in capacity.all_setups() if r.key == ("fused_arcface + CenterSGD", "cpu", "bfloat16", "int8"))
    trial = capacity.try_step(recipe, (8, 200_000, 64), CPU, 2**28, child)
    assert trial is not None
    # Two bytes of a class center, one and a sixteenth of its momentum.
    assert 3.0 < trial.peak_bytes / (200_000 * 64) < 3.5


@pytest.mark.parametrize("kink", [0.0, 0.3])
@pytest.mark.parametrize("hard", [False, True], ids=["measures", "fails"])
def test_capacity_is_predicted_then_verified(kink: float, hard: bool) -> None:
    """Peaks that grow faster from 30 000 classes on, as when another allocation becomes the largest one."""
    budget, tried = 10**9, []

    def peak(C: int) -> int:
        return int(5e6 + 6000 * C + kink * 6000 * max(0, C - 30_000))

    def attempt(C: int) -> capacity.Trial | None:
        tried.append(C)
        return None if hard and peak(C) > budget else capacity.Trial(peak(C), 1.0)

    predicted = capacity.extrapolate(attempt, budget, 4000)
    assert predicted.how == "extrapolated" and max(tried) == 8000
    if kink == 0:
        assert abs(peak(predicted.max_C) - budget) < 10_000
    tried.clear()
    found = capacity.verify(attempt, budget, predicted.max_C)
    assert found.how == "measured" and found.bytes_per_class * found.max_C == pytest.approx(
        peak(found.max_C), rel=1e-12
    )
    assert peak(found.max_C) <= budget
    assert peak(int(found.max_C * 1.025)) > budget
    assert len(tried) <= (1 if kink == 0 else 10)


def test_capacity_that_never_fits_is_an_error() -> None:
    with pytest.raises(MemoryError, match="do not fit"):
        capacity.extrapolate(lambda C: None, 10**9, 1000)
    with pytest.raises(MemoryError, match="do not fit"):
        capacity.verify(lambda C: None, 10**9, 1000)


def test_capacity_goes_on_with_an_interrupted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run ends after one recipe was verified; the second verifies the other and repeats nothing."""
    tried: list[tuple[str, int]] = []

    def step(recipe: capacity.TrainingSetup, shape: tuple[int, int, int], *_: object) -> capacity.Trial:
        if tried and recipe.key != tried[0][0] and shape[1] > 10_000:
            raise KeyboardInterrupt
        tried.append((recipe.key, shape[1]))
        return capacity.Trial(6000 * shape[1], 1.0)

    budget = 10**8
    setups = chosen(capacity.all_setups(), ["eager", "insightface"], None)
    left: list[dict[str, Any]] = []
    monkeypatch.setattr(capacity, "try_step", step)
    with pytest.raises(KeyboardInterrupt):
        capacity.run_capacity(setups, CPU, budget, on_row=lambda rows: left.__setitem__(slice(None), rows))
    assert [row["how"] for row in left] == ["measured", "extrapolated"]
    assert all(",".join(row) == CAPACITY_FIELDS for row in left)
    before, tried = tried, []
    rows, skips = capacity.run_capacity(setups, CPU, budget, earlier=left)
    assert [row["how"] for row in rows] == ["measured"] * 2 and not skips
    assert len(before) == 5 and [key for key, _ in tried] == [("insightface", "torch", "float32", "float32")]
    with pytest.raises(ValueError, match="no_such"):
        chosen(capacity.all_setups(), ["no_such"], None)
    with pytest.raises(ValueError, match=r"backend must be one of .*; got 'no_such'"):
        chosen(capacity.all_setups(), None, "no_such")


def test_the_command_resumes_a_search_of_the_same_budget(tmp_path: Path) -> None:
    """An earlier call has verified the setup, so nothing is tried, and its row is kept.

    Rows that are computed without a trial are computed again.
    """
    key = ("eager", "torch", "float32", "float32")
    row = capacity.Capacity(1000, 8192.0, "measured", 2.0).row(key, 64, 512, 2**30, machine.context(CPU))
    write_rows(tmp_path, "capacity", [row])
    options = {"providers": "eager", "device": "cpu", "resume": True, "no_report": True}
    for _ in range(2):
        bench(**options, budget=1.0, output=tmp_path)
        found = json.loads((tmp_path / "capacity.json").read_text())
        assert found[0] == row and [each["how"] for each in found] == ["measured", "computed", "computed"]
    with pytest.raises(typer.BadParameter, match=rf"budget_bytes must be {2**29}; got {2**30}"):
        bench(**options, budget=0.5, output=tmp_path)
    with pytest.raises(typer.BadParameter, match="holds no capacities to resume"):
        bench(**options, budget=1.0, output=tmp_path / "empty")


def test_cost_model_keeps_its_own_laws() -> None:
    steps = {(step.identities, step.devices): step for step in cost_model.grid(cost_model.H200)}
    for (identities, devices), step in steps.items():
        assert 0 < step.efficiency <= 1
        one = steps[identities, 1]
        # The batch a device has is fixed: its arithmetic is the same on any number of devices, its centers are fewer.
        assert step.arithmetic_seconds == pytest.approx(one.arithmetic_seconds, rel=1e-3)
        if devices == 8:
            assert step.memory_bytes < one.memory_bytes
    assert steps[10**9, 1].limit == "does not fit"
    assert steps[10**6, 1024].limit == "network"
    free = cost_model.Network(node_bytes_per_second=math.inf, bytes_per_second=math.inf, latency_seconds=0.0)
    for step in cost_model.grid(cost_model.H200, network=free):
        assert step.seconds <= steps[step.identities, step.devices].seconds
        assert step.limit not in ("network", "latency")


@pytest.mark.slow
def test_cost_model_gives_back_the_rate_that_it_was_given(tmp_path: Path) -> None:
    report = synthetic_report()
    report.write(tmp_path)
    device = cost_model.Device.from_report(tmp_path)
    assert device.measured
    ours = [row for row in report.rows() if is_fused(row["provider"], row["backend"])]
    measured = [row for row in ours if row["pass"] == "fwd+bwd"]
    assert len(measured) == 5
    largest = max(measured, key=lambda row: row["N"] * row["C"])
    size = 2 if "16" in largest["weight_dtype"] else 4
    storage = cost_model.Storage("no optimizer", size, 2 * size, optimizer_bytes=size)
    step = cost_model.predict(device, largest["C"], 1, batch=largest["N"], D=largest["D"], storage=storage)
    assert step.seconds * 1e3 == pytest.approx(largest["ms"])


@pytest.mark.distributed
@pytest.mark.full
def test_cost_model_beside_two_processes() -> None:
    """A group runs, and its inputs make sense. Only a quiet machine can tell if the model agrees with the times."""
    progress: list[str] = []
    rows = ranks.run_ranks([2], progress.append)
    assert progress == ["the rate of one process", "2 ranks"]
    assert [row["C"] for row in rows] == list(ranks.IDENTITIES)
    for row in rows:
        assert ",".join(row) == (
            "ranks,N,C,D,predicted_ms,measured_ms,arithmetic_ms,limit,network_bytes_per_second,network_latency_us,"
            "device,torch,commit,date"
        )
        assert 0 < row["arithmetic_ms"] < row["predicted_ms"] and row["measured_ms"] > 0
        assert 1e6 < row["network_bytes_per_second"] < 1e12 and 0 < row["network_latency_us"] < 1e6
    assert rows[-1]["arithmetic_ms"] == pytest.approx(100 * rows[0]["arithmetic_ms"], rel=0.01)
