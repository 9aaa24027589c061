"""The scripts for a GPU on a CPU with small numbers, and the tables that README shows of their results."""

from __future__ import annotations

import argparse
import csv
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_reports import CPU

from fused_arcface.app.benchmark import capacity
from fused_arcface.app.benchmark.cases import Case
from fused_arcface.app.benchmark.report import Measurement, Report, Skip
from fused_arcface.app.measure.timing import Timing

BENCH = Path(__file__).parents[3] / "bench"


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(BENCH / name))


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    return script("gpu_training.py")


OPTIONS = argparse.Namespace(steps=40, rows=8, classes=50, dim=16)


def judged(training: dict[str, Any], level: float, seeds: int = 3) -> dict[str, Any]:
    """Return the row of a run with one level of loss, beside references at 1.0, 1.2 and 0.9: a spread of 0.3."""
    runs = [training["Run"]("torch", seed, [loss] * 40, 1.0) for seed, loss in enumerate((1.0, 1.2, 0.9)[:seeds])]
    row: dict[str, Any] = training["summary"]([*runs, training["Run"]("cuda", 0, [level] * 40, 1.0)], OPTIONS, CPU)[
        "runs"
    ][-1]
    return row


def test_a_curve_is_judged_by_the_spread_of_three_seeds(training: dict[str, Any]) -> None:
    near = judged(training, 1.24)
    assert near["within"] is True and near["distance"] == pytest.approx(0.8)
    far = judged(training, 1.36)
    assert far["within"] is False and far["distance"] == pytest.approx(1.2)
    wrong = judged(training, math.nan)
    assert (wrong["within"], wrong["distance"], wrong["last_loss"]) == (False, None, None)
    open_ = judged(training, 1.0, seeds=2)
    assert (open_["within"], open_["distance"]) == (None, None)


def test_one_bad_window_is_enough(training: dict[str, Any]) -> None:
    """Seeds at 1 and 2 but for one window, where they are equal: the windows beside it count there, no others."""
    Run = training["Run"]
    flat = [Run("torch", seed, [1.0 + seed] * 40, 1.0) for seed in (0, 1)]
    losses = [2.0] * 40
    losses[20:22] = [1.0, 1.0]  # window 10 of 20
    references = [flat[0], Run("torch", 1, losses, 1.0)]
    assert training["spread"](references) == [1.0] * 20
    losses = [1.0] * 40
    losses[6] = 5.0  # a mean of 3 in window 3
    assert training["distance"](Run("cuda", 0, losses, 1.0), references) == pytest.approx(2.0)
    broken = [Run("torch", 0, [1.0] * 39 + [math.nan], 1.0), flat[1]]
    assert training["distance"](Run("cuda", 0, [1.0] * 40, 1.0), broken) == math.inf


@pytest.mark.slow
def test_every_backend_is_trained_on_the_same_batches(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    sizes = "--device cpu --steps 40 --rows 8 --classes 50 --dim 16"
    monkeypatch.setattr("sys.argv", ["gpu_training.py", str(tmp_path), *sizes.split()])
    assert training["main"]() == 0
    found = json.loads((tmp_path / "training.json").read_text())
    assert [(run["backend"], run["seed"]) for run in found["runs"]] == [
        ("torch", 0),
        ("cpu", 0),
        ("torch", 1),
        ("torch", 2),
    ]
    torch_, cpu, *others = found["runs"]
    assert cpu["within"] is True and cpu["distance"] < 0.5
    # The same batches give nearly the same curve; another seed does not.
    assert cpu["curve"] == pytest.approx(torch_["curve"], rel=0.01)
    assert all(run["curve"] != pytest.approx(torch_["curve"], rel=0.01) for run in others)
    assert torch_["last_loss"] < torch_["first_loss"]
    with (tmp_path / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 40 and math.isfinite(float(rows[-1]["loss"]))
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert "cpu: within the spread" in capsys.readouterr().out


def test_a_run_that_fails_or_comes_too_late_leaves_the_others(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(backend: str, seed: int, *_: object) -> Any:
        if backend == "cpu":
            raise RuntimeError("no such luck")
        return training["Run"](backend, seed, [1.0 + seed] * 4, 50.0 if seed == 0 else 0.0)

    main = training["main"]
    monkeypatch.setitem(main.__globals__, "train", train)
    monkeypatch.setitem(main.__globals__, "write_pictures", lambda drawings, folder: None)
    monkeypatch.setattr("sys.argv", ["gpu_training.py", str(tmp_path), "--device", "cpu", "--seconds", "40"])
    assert main() == 1
    said = capsys.readouterr().out
    assert "cpu, seed 0: failed: RuntimeError: no such luck" in said
    assert "torch, seed 1: not run, it takes 50.0 s and " in said
    found = json.loads((tmp_path / "training.json").read_text())
    assert [(run["backend"], run["seed"]) for run in found["runs"]] == [("torch", 0)] and found["seeds"] == 1


def test_identities_are_searched_until_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[tuple[str, tuple[int, int, int]]] = []

    def step(setup: capacity.TrainingSetup, shape: tuple[int, int, int], *_: object) -> capacity.Trial:
        tried.append((setup.name, shape))
        return capacity.Trial(1568 * shape[1], 1.0)

    monkeypatch.setattr(capacity, "try_step", step)
    options = ["gpu_identities.py", str(tmp_path), "--device", "cpu", "--budget", "0.1"]
    monkeypatch.setattr("sys.argv", options)
    assert script("gpu_identities.py")["main"]() == 0
    rows = json.loads((tmp_path / "capacity.json").read_text())
    recipes = {row["recipe"] for row in rows}
    (ours,) = (row for row in rows if row["recipe"] == "fused_arcface + CenterSGD" and row["backend"] == "cpu")
    assert (ours["weight_dtype"], ours["momentum_dtype"]) == ("bfloat16", "int8")
    assert (ours["N"], ours["D"], ours["how"]) == (1024, 512, "measured")
    assert 0.97 < ours["max_C"] * 1568 / (0.1 * 2**30) <= 1
    assert (
        {"insightface", "eager"}
        <= recipes
        <= {"fused_arcface + CenterSGD", "insightface", "eager", "pytorch-metric-learning"}
    )
    assert all(shape[0] == 1024 and shape[2] == 512 for _, shape in tried)

    tried.clear()
    monkeypatch.setattr("sys.argv", [*options[:1], str(tmp_path / "late"), *options[2:], "--seconds", "-1"])
    assert script("gpu_identities.py")["main"]() == 1
    assert not tried and "is over; not tried: fused_arcface + CenterSGD (cpu)" in capsys.readouterr().out


@pytest.mark.slow
def test_stored_centers_are_measured_on_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = "--storage host --classes 3000 --dim 16 --rate 0.1 --rows 8 --steps 3 --repeated"
    monkeypatch.setattr("sys.argv", [str(BENCH / "stored_identities.py"), *sizes.split(), "--output", str(tmp_path)])
    script("stored_identities.py")["main"]()
    (row,) = json.loads((tmp_path / "stored_identities.json").read_text())
    assert (row["storage"], row["C"], row["sample"], row["device_peak_bytes"]) == ("host", 3000, 300, None)


H100 = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11", "commit": "abc", "date": "2026-11-26T06:00:57+00:00"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of a GPU: what was measured before the kernels for Hopper were on by default."""
    bf16 = Case(4096, 1_000_000, 512, "bfloat16", "bfloat16")
    fp32 = Case(1024, 1_000_000, 512)
    few = Case(256, 10_000, 512, "bfloat16", "bfloat16")
    report = Report(H100, [], [Skip("eager", "torch", bf16, "out of memory: CUDA out of memory.")], {})
    for provider, backend, case, ms, peak in (
        ("fused_arcface", "cuda", bf16, 77.73, 97_111_040),
        ("fused_arcface-hopper", "cuda", bf16, 25.006, 17_122_816),
        ("fused_arcface-hopper-unordered", "cuda", bf16, 9.0, None),
        ("fused_arcface", "triton", bf16, 59.56, 50_345_472),
        ("fused_arcface-flash", "triton", bf16, 9.0, None),
        ("insightface", "torch", fp32, 135.83, 16_392_943_616),
        ("fused_arcface", "cuda", few, 0.5, None),
        ("compiled", "torch", few, 0.4, None),
    ):
        report.measurements.append(Measurement(provider, backend, "fwd", case, Timing((1.0,)), 0.0, 2))
        report.measurements.append(Measurement(provider, backend, "fwd+bwd", case, Timing((ms,)), 0.0, 8, peak))
    report.write(tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows = [{**row, "graph_ms": 0.125 if row["provider"] == "compiled" else None} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def test_the_gpu_table_shows_the_default_backends_and_what_is_missing(folder: Path) -> None:
    lines = script("update_readme.py")["gpu"](folder).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == [
        *("C=1,000,000, D=512, bf16", "`cuda`", "`triton`", "plain PyTorch"),
        *("insightface, fp32", "TF32", "fp16"),
    ]
    # 25.006 ms / (4096 · 10⁶) = 6.105 ps; 17 122 816 / 2²⁰ = 16.33 MiB
    step, one_k, memory = cells[2:]
    assert step == ["time of a step, N=4,096", "25 ms (6.11 ps)", "59.6 ms (14.5 ps)", "out of memory", "—", "—", "—"]
    assert one_k == ["time of a step, N=1,024", "—", "—", "—", "136 ms (133 ps)", "—", "—"]
    assert memory[1:5] == ["16.3 MiB / —", "48 MiB / —", "out of memory / —", "— / 15,634 MiB"]
    assert lines[-1].endswith("NVIDIA H100 80GB HBM3; torch 2.11; commit abc, 2026-11-26.")

    found = [
        {**H100, "commit": "def", "recipe": recipe, "backend": backend, "max_C": max_C, "N": 1024}
        for recipe, backend, max_C in (
            ("fused_arcface + CenterSGD", "cuda", 52_123_456),
            ("fused_arcface", "cuda", 9_000_000),
            ("insightface-fp16", "torch", 3_250_000),
        )
    ]
    (folder / "capacity.json").write_text(json.dumps(found))
    lines = script("update_readme.py")["gpu"](folder).splitlines()
    assert lines[-3] == "| most identities that train, N=1,024 | 52.1 million | — | — | — | — | 3.2 million |"
    assert lines[-1].endswith(
        "commit abc, 2026-11-26. Identities: NVIDIA H100 80GB HBM3; torch 2.11; commit def, 2026-11-26."
    )


def test_other_gpu_tables(folder: Path) -> None:
    tables = script("update_readme.py")
    cases = tables["gpu_cases"](folder)
    assert "| N=4096 C=1 000 000 D=512 bfloat16 | 25 | 59.6 | — | — |" in cases
    few = tables["all_of"](folder, tables["ALL_OF"]["launches"]).splitlines()
    assert few[0].startswith("N=256 C=10 000 D=512 bfloat16. NVIDIA H100")
    assert few[-2:] == ["| compiled | 0.4 | 0.125 | — | 0e+00 |", "| fused_arcface (cuda) | 0.5 | — | — | 0e+00 |"]
    assert tables["all_of"](folder, tables["ALL_OF"]["peers"]) == "Not yet measured."
    large = tables["all_of"](folder, Case(4096, 1_000_000, 512, "bfloat16", "bfloat16")).splitlines()
    names = [line.split("|")[1].strip() for line in large[4:]]
    assert names == ["fused_arcface-hopper (cuda)", "fused_arcface (triton)", "fused_arcface (cuda)"]


def test_the_table_of_loss_curves(folder: Path) -> None:
    run = {"backend": "cuda", "last_loss": 12.345, "distance": 0.25, "within": True, "seconds": 7.0}
    bad = {"backend": "triton", "last_loss": None, "distance": None, "within": False, "seconds": 8.0}
    reference = {**run, "backend": "torch", "distance": None, "within": None}
    found = {
        **H100,
        "steps": 2000,
        "N": 512,
        "C": 100_000,
        "D": 512,
        "dtype": "bfloat16",
        "runs": [reference, run, bad],
    }
    (folder / "training.json").write_text(json.dumps(found))
    lines = script("update_readme.py")["training"](folder).splitlines()
    assert lines[0].startswith("2,000 steps, N=512, C=100,000, D=512, bfloat16. NVIDIA H100")
    assert lines[4:6] == ["| `cuda` | 12.3 | 0.25 | yes | 7 |", "| `triton` | — | — | no | 8 |"]
    assert lines[-1] == f"![Loss curves]({folder / 'training.png'})"


def test_pictures_are_linked_from_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = script("update_readme.py")
    (tmp_path / "h1").mkdir()
    for name in ("rows.json", "roofline.png"):
        (tmp_path / "h1" / name).touch()
    monkeypatch.setitem(tables["block"].__globals__, "RESULTS", tmp_path)
    assert tables["block"]("pictures", "h1", tmp_path / "docs" / "page.md", False) == "![roofline](../h1/roofline.png)"


def test_what_a_gpu_has_not_measured_is_said(tmp_path: Path) -> None:
    block = script("update_readme.py")["block"]
    for kind in ("gpu", "gpu_cases", "launches", "peers", "training", "capacity"):
        assert block(kind, "no-such-gpu", tmp_path / "README.md", False) == "Not yet measured."


def test_figures_of_a_gpu_carry_device_commit_and_date() -> None:
    for folder in ("h100", "h200"):
        for row in json.loads((BENCH / "results" / folder / "rows.json").read_text()):
            assert folder[1:] in row["device"] and len(row["commit"]) >= 10 and row["date"].startswith("20")
            assert row["ps_per_logit"] == pytest.approx(row["ms"] * 1e9 / (row["N"] * row["C"]), abs=2e-3)
