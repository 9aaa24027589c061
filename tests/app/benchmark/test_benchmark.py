"""The benchmark: what it calls right, how it times, what it writes, and that it never runs a machine out of memory."""

from __future__ import annotations

import csv
import itertools
import json
import math
import pickle
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support.benchmark_reports import CPU, TINY, synthetic_report
from support.clock import Clock

from fused_arcface import ArcFace, NormSoftmax, reference
from fused_arcface.app.benchmark import capacity, cost_model, memory, plots, runner
from fused_arcface.app.benchmark import providers as providers_module
from fused_arcface.app.benchmark.cases import NAMES, PASSES, Case, Inputs, cases_named, make_inputs
from fused_arcface.app.benchmark.names import Named
from fused_arcface.app.benchmark.providers import Provider, all_providers, select
from fused_arcface.app.benchmark.report import add_rows, read_report
from fused_arcface.app.benchmark.truth import PassResult, error_of, truth
from fused_arcface.app.cli.bench import bench
from fused_arcface.app.drawing import write_pictures
from fused_arcface.app.measure import timing
from fused_arcface.app.measure.child import Child, ChildFailed
from fused_arcface.app.measure.timing import Timing, time_interleaved
from fused_arcface.base.precision import allows_tf32

# torch.compile takes as long as all these tests together; the benchmark itself checks it at each run.
QUICK = [each for each in all_providers() if each.name != "compiled" and each.reason_against(TINY, CPU) is None]


@pytest.fixture
def no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ceiling without the seconds that measuring one takes."""
    ceiling = runner.machine.Ceiling("torch", 64, Timing((1.0,)), 0.0, 1e9)
    monkeypatch.setattr(runner.machine, "measure_ceiling", lambda device, dtype: ceiling)


def provider_named(name: str) -> Provider:
    return next(each for each in all_providers() if each.name == name and (each.is_fused or not each.is_ours))


@pytest.mark.parametrize("chunk", [2**23, 1000])
@pytest.mark.parametrize("formula", ["margin", "straight_through", "linear"])
def test_truth_is_the_reference(formula: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_arcface.app.benchmark.truth._CHUNK_ELEMENTS", chunk)
    inputs = make_inputs(replace(TINY, dtype="float64", weight_dtype="float64"), CPU)
    x, w = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    if formula == "linear":
        loss = torch.nn.functional.cross_entropy(x @ w.T, inputs.target)
    else:
        margin = ArcFace(0.5) if formula == "margin" else ArcFace(0.5, boundary="none", gradient="straight_through")
        loss = reference.margin_softmax_loss(x, w, inputs.target, margin=margin, scale=64.0)
    loss.backward()
    assert error_of(PassResult(loss, x.grad, w.grad), truth(inputs, formula)) < 1e-12


@pytest.mark.parametrize("provider", QUICK, ids=str)
def test_provider_is_right(provider: Provider) -> None:
    inputs = make_inputs(TINY, CPU)
    with provider.settings():
        run = provider.open(inputs)
        for backward in (True, False, True):
            outcome = run(backward)
            assert error_of(outcome, truth(inputs, provider.formula)) < 1e-5
            assert (outcome.d_weight is not None) == (outcome.d_embeddings is not None) == backward


def test_truth_tells_the_formulas_apart() -> None:
    inputs = make_inputs(TINY, CPU)
    right = truth(inputs, "margin")
    for other in ("straight_through", "linear"):
        assert error_of(truth(inputs, other), right) > 0.1
    without = reference.margin_softmax_loss(*inputs, margin=NormSoftmax())
    assert error_of(PassResult(without), right) > 0.1


def test_error_of_sees_a_nan_and_a_wrong_shape() -> None:
    right = PassResult(torch.tensor(1.0), torch.ones(2, 3))
    assert math.isnan(error_of(PassResult(torch.tensor(1.0), torch.tensor([[1.0, math.nan, 1.0]] * 2)), right))
    with pytest.raises(ValueError, match="d_embeddings"):
        error_of(PassResult(torch.tensor(1.0), torch.ones(3, 2)), right)


def test_error_of_sees_a_nan_behind_the_first_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_arcface.app.benchmark.truth._CHUNK_ELEMENTS", 2)
    right = PassResult(torch.tensor(1.0), torch.ones(2, 3))
    found = PassResult(torch.tensor(1.0), torch.tensor([[1.5, 1.0, math.nan], [1.0, 1.0, 1.0]]))
    assert math.isnan(error_of(found, right))
    assert error_of(PassResult(torch.tensor(1.25), right.d_embeddings), right) == 0.25


def test_cases_are_distinct_and_ascend_in_classes() -> None:
    for device_type in ("cpu", "cuda"):
        for name in NAMES:
            cases = cases_named(name, device_type)
            assert len(set(cases)) == len(cases)
            series: dict[Case, int] = {}
            for case in cases:
                assert series.setdefault(replace(case, C=0), 0) < case.C
                series[replace(case, C=0)] = case.C
    with pytest.raises(ValueError, match="quick"):
        cases_named("huge", "cpu")


def test_unknown_provider_is_named() -> None:
    with pytest.raises(ValueError, match="no_such"):
        select(["ours", "no_such"])
    with pytest.raises(ValueError, match="no_such"):
        select(None, "no_such")
    assert {each.backend for each in select(["ours"], "cpu")} == {"cpu"}


def test_settings_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_ARCFACE_ISA", raising=False)
    provider = replace(provider_named("fused_arcface"), environment={"FUSED_ARCFACE_ISA": "portable"}, tf32=True)
    assert not allows_tf32()
    with provider.settings():
        assert providers_module.backends.load("cpu").isa() == "portable"
        assert allows_tf32()
    assert not allows_tf32()
    assert "FUSED_ARCFACE_ISA" not in providers_module.os.environ


@pytest.mark.slow
@pytest.mark.usefixtures("no_ceiling")
def test_wrong_failing_and_missing_providers_do_not_stop_the_rest() -> None:
    ours = provider_named("fused_arcface")

    def wrong(inputs):
        return lambda backward: PassResult(torch.tensor(0.0))

    def failing(inputs):
        raise RuntimeError("no such luck")

    def with_nan(inputs):
        run = ours.open(inputs)

        def with_a_nan_in_a_gradient(backward):
            found = run(backward)
            return found._replace(d_weight=found.d_weight * torch.nan) if backward else found

        return with_a_nan_in_a_gradient

    missing = replace(ours, name="missing", reason_against=lambda case, device: "not installed")
    broken = {"wrong": wrong, "failing": failing, "nan": with_nan}
    chosen = [*(replace(ours, name=name, open=open_) for name, open_ in broken.items()), missing, ours]
    report = runner.run_benchmark([TINY], chosen, CPU, seconds=0.01, with_memory=False)
    assert {each.provider for each in report.measurements} == {"ceiling", "fused_arcface"}
    reasons = {skip.provider: skip.reason for skip in report.skips}
    assert reasons["wrong"].startswith("wrong: relative error 1.0e+00")
    assert reasons["nan"].startswith("wrong: relative error nan, ")
    assert reasons["failing"] == "RuntimeError: no such luck"
    assert reasons["missing"] == "not installed"


@pytest.mark.slow
@pytest.mark.usefixtures("no_ceiling")
def test_what_cannot_fit_is_not_tried(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peaks_of", lambda provider, case, *_: dict.fromkeys(PASSES, 100 * case.C))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 200_000)
    report = runner.run_benchmark([TINY, replace(TINY, C=3000)], select(["eager"]), CPU, seconds=0.01)
    assert {each.case for each in report.measurements if each.provider == "eager"} == {TINY}
    (skip,) = report.skips
    assert skip.case == replace(TINY, C=3000) and skip.reason.startswith("out of memory")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which ``time_interleaved`` measures."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_samples_are_taken_in_turn(clock: Clock) -> None:
    """Calls of 0.9 and of 2.2 ms: five and two of them are a sample of 5 ms."""
    calls: list[str] = []

    def run(name: str, seconds: float) -> None:
        calls.append(name)
        clock.sleep(seconds)

    runs = {"a": lambda: run("a", 9e-4), "b": lambda: run("b", 2.2e-3)}
    timings = time_interleaved(runs, CPU, seconds=0.05)
    turns = [(name, len(list(each))) for name, each in itertools.groupby(calls)]
    samples = len(timings["a"].samples)
    assert samples >= 3 and turns[2 : 2 * samples] == [("a", 5), ("b", 2)] * (samples - 1)
    for name, milliseconds in (("a", 0.9), ("b", 2.2)):
        assert timings[name].samples == pytest.approx([milliseconds] * len(timings[name].samples), rel=1e-3)
    mixed = Timing((4.0, 1.0, 2.0))
    assert 0 < mixed.least <= mixed.quantile(0.2) <= mixed.median <= mixed.quantile(0.8)


def test_a_short_run_is_warm_before_its_samples_count(clock: Clock) -> None:
    """The first call takes 40 ms, each later one 0.01 ms: no sample may hold the first."""
    calls = itertools.count()
    timings = time_interleaved({"a": lambda: clock.sleep(0.04 if next(calls) == 0 else 1e-5)}, CPU, seconds=0.02)
    assert next(calls) > 100  # a sample holds as many calls as a clock can tell, though the first took long
    assert timings["a"].quantile(1) == pytest.approx(0.01, rel=1e-2)


def test_a_run_that_fails_later_leaves_the_others(clock: Clock) -> None:
    calls = itertools.count()

    def fails_at_last() -> None:
        clock.sleep(0.006)
        if next(calls) >= 6:  # five passes warm it up
            raise RuntimeError("no memory is left")

    told: list[str] = []
    runs = {"a": lambda: clock.sleep(0.006), "b": fails_at_last}
    timings = time_interleaved(runs, CPU, 0.05, on_failure=lambda name, error: told.append(f"{name}: {error}"))
    assert set(timings) == {"a"} and told == ["b: no memory is left"]
    with pytest.raises(RuntimeError, match="no memory"):
        time_interleaved({"b": fails_at_last}, CPU, 0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("no_ceiling")
def test_an_interrupted_run_keeps_its_cases_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = (TINY, replace(TINY, C=400))
    monkeypatch.setattr("fused_arcface.app.benchmark.cases._CPU", {"quick": cases})
    whole, measured = runner._measure_case, []

    def interrupted_at_once(*_: object) -> Inputs:
        raise KeyboardInterrupt

    def interrupted(case: Case, *arguments: object) -> None:
        measured.append(case)
        if case == cases[1] and measured.count(case) == 1:
            raise KeyboardInterrupt
        whole(case, *arguments)

    monkeypatch.setattr(runner, "_measure_case", interrupted)
    options = {"providers": "eager,liger", "device": "cpu", "seconds": 0.01, "with_memory": False, "output": tmp_path}
    with pytest.raises(typer.Exit) as exit_:
        bench(**options)
    assert exit_.value.exit_code == 130
    said = capsys.readouterr().out
    assert tmp_path.name in said and "--resume" in said
    assert {each.case for each in read_report(tmp_path).measurements if each.provider == "eager"} == {TINY}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    # A second run that ends before its first case has found nothing: the files are those of the first one.
    with monkeypatch.context() as patched:
        patched.setattr(runner, "make_inputs", interrupted_at_once)
        with pytest.raises(typer.Exit):
            bench(**options)
    assert capsys.readouterr().out.splitlines() == ["Interrupted. Nothing new was found."]

    bench(**options, resume=True)
    assert measured == [*cases, cases[0], cases[1]]
    report = read_report(tmp_path)
    assert [each.case for each in report.measurements if each.provider == "eager"] == [cases[0]] * 2 + [cases[1]] * 2
    assert [skip.provider for skip in report.skips] == ["liger"]

    report.context["torch"] = "1.0"
    report.write(tmp_path)
    with pytest.raises(typer.BadParameter, match=r"torch must be .*; got 1\.0"):
        bench(**options, resume=True)
    with pytest.raises(typer.BadParameter, match="no run"):
        bench(**{**options, "output": tmp_path / "empty"}, resume=True)


def test_rows_have_the_fields_and_survive_a_round_trip(tmp_path: Path) -> None:
    report = synthetic_report()
    report.write(tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())
    fields = "provider,backend,pass,dtype,weight_dtype,N,C,D,ms,ps_per_logit,peak_bytes,error,device,torch,commit,date"
    assert [",".join(row) for row in rows] == [fields] * len(rows)
    with (tmp_path / "rows.csv").open() as file:
        assert [row["ms"] for row in csv.DictReader(file)] == [str(row["ms"]) for row in rows]
    assert {row["pass"] for row in rows} == {"fwd", "fwd+bwd"}
    row = next(row for row in rows if row["pass"] == "fwd+bwd")
    assert row["ps_per_logit"] == pytest.approx(row["ms"] * 1e9 / (row["N"] * row["C"]))
    again = read_report(tmp_path)
    assert again.rows() == rows and [vars(skip) for skip in again.skips] == [vars(skip) for skip in report.skips]
    assert [each.products for each in again.measurements] == [each.products for each in report.measurements]


def test_rows_are_added_to_those_of_earlier_runs(tmp_path: Path) -> None:
    """A later row may have more columns: the table has them all, and an earlier row leaves them empty."""
    add_rows(tmp_path / "new", "found", [{"a": 1, "b": None}])
    table, _ = add_rows(tmp_path / "new", "found", [{"a": 2, "b": 3, "c": "x"}])
    assert table.read_text() == "a,b,c\n1,,\n2,3,x\n"
    assert json.loads((tmp_path / "new" / "found.json").read_text()) == [
        {"a": 1, "b": None},
        {"a": 2, "b": 3, "c": "x"},
    ]


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawings = plots.run_drawings(synthetic_report())
    paths = write_pictures(drawings, tmp_path)
    expected = {"time_by_classes.png", "memory_by_classes.png", "time_by_rows.png", "roofline.png"}
    assert {path.name for path in paths} == expected
    steps = cost_model.grid(cost_model.H200)
    paths += write_pictures([plots.cost_drawing(steps, cost_model.H200, "model")], tmp_path)
    assert all(path.stat().st_size > 10_000 for path in paths)


@pytest.mark.slow
def test_memory_of_a_pass_is_seen_from_outside(child: Child) -> None:
    if not memory.can_measure(CPU):
        pytest.skip("this system does not let a process reset its peak of resident memory")
    case = Case(64, 60_000, 32)
    logits = case.N * case.C * 4  # 15 MB
    eager = memory.peaks_of(provider_named("eager"), case, CPU, child)["fwd+bwd"]
    fused = memory.peaks_of(provider_named("fused_arcface"), case, CPU, child)["fwd+bwd"]
    assert 3 * logits < eager < 8 * logits
    assert fused < logits / 4


@pytest.mark.parametrize("each", [*all_providers(), *capacity.all_setups()], ids=str)
def test_every_provider_and_setup_can_be_sent_to_a_child(each: Named) -> None:
    assert str(pickle.loads(pickle.dumps(each))) == str(each)


@pytest.mark.slow
def test_child_reports_errors_and_comes_back(child: Child) -> None:
    with pytest.raises(ChildFailed, match="ValueError"):
        child.call(cases_named, "huge", device_type="cpu")
    assert child._process is not None
    child._process.kill()
    with pytest.raises(MemoryError):
        child.call(runner.machine.commit)
    assert isinstance(child.call(runner.machine.commit), str)
    torch.set_num_threads(2)
    assert child.call(torch.get_num_threads) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("no_ceiling")
def test_command_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fused_arcface.app.benchmark.cases._CPU", {"quick": (TINY,)})
    bench(providers="ours,eager,liger", device="cpu", seconds=0.01, with_memory=False, output=tmp_path / "new")
    said = capsys.readouterr().out
    assert "eager" in said and "liger_kernel is not installed" in said
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert {(row["provider"], row["backend"]) for row in rows} >= {("fused_arcface", "cpu"), ("eager", "torch")}
    assert all(row["error"] < 1e-3 for row in rows)


def test_command_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no_such"):
        bench(providers="no_such", device="cpu")
    with pytest.raises(typer.BadParameter, match="quick"):
        bench(cases="huge", device="cpu")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(typer.BadParameter, match="file"):
        bench(device="cpu", output=file / "folder")
    for wrong in ({"device": "tpu"}, {"budget": 0.0}, {"budget": math.nan}, {"ranks": "1,x"}, {"ranks": "0"}):
        with pytest.raises(typer.BadParameter):
            bench(**{"device": "cpu", "output": tmp_path, **wrong})


@pytest.mark.slow
@pytest.mark.usefixtures("no_ceiling")
def test_command_fails_when_it_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit_:
        bench(providers="ours", backend="triton", device="cpu", output=tmp_path)
    assert exit_.value.exit_code == 1
    assert "fused_arcface (triton)" in capsys.readouterr().out


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[3] / "bench" / name))


def test_regressions_are_found() -> None:
    regressions = script("check.py")["regressions"]
    before = {"time of ours": 0.5, "memory of ours": 0.1}
    assert regressions({"time of ours": 0.6, "memory of ours": 0.15}, before) == []
    assert regressions({"time of ours": 0.4, "memory of ours": 0.0, "time of new": 9.0}, before) == []
    (slower,) = regressions({"time of ours": 0.65, "memory of ours": 0.1}, before)
    assert slower.startswith("time of ours: 0.650")
    (larger,) = regressions({"time of ours": 0.5, "memory of ours": 0.2}, before)
    assert larger.startswith("memory of ours")
    assert regressions({"time of ours": 0.5}, before) == ["memory of ours: no longer measured"]


@pytest.mark.slow
def test_the_readme_shows_what_was_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["update_readme.py", "--check"])
    assert script("update_readme.py")["main"]() == 0, capsys.readouterr().out
