"""The reports of the commands, each read as a strict reader would, with names that nobody should have."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from PIL import Image
from support.benchmark_reports import synthetic_report
from support.report_pages import Page, read_page
from support.training_runs import write_random_run

import fused_arcface as fa
from fused_arcface.app import drawing
from fused_arcface.app.cli import bench_results, reporting, run
from fused_arcface.app.data import identity_images
from fused_arcface.app.data.embedding_sets import EmbeddingSet
from fused_arcface.app.lab import comparison
from fused_arcface.app.report import training as training_page
from fused_arcface.app.report.document import render, rows
from fused_arcface.app.training import verifier
from fused_arcface.app.training.events import Checkpointed

PEOPLE = ("<script>alert(1)<", "人物 一", "\"'&<b>", "김 철수", "ann", "bob")


@pytest.fixture(autouse=True)
def _reports_are_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FUSED_ARCFACE_NO_REPORT", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's net, and a folder of people with hostile names."""
    root = tmp_path_factory.mktemp("reports")
    write_random_run(root / "run")
    faces = identity_images(len(PEOPLE), 4)
    for number, (pixels, label) in enumerate(zip(faces.images, faces.labels.tolist(), strict=True)):
        path = root / "people" / PEOPLE[label] / f"{number}<i>.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels[0].clamp(0, 1)).byte().numpy()).save(path)
    return root


def read(path: Path) -> Page:
    return read_page(path.read_text(encoding="utf-8"))


def beside(page: Page) -> dict[str, str]:
    """Return the text after the first of each text: in a table, the cell beside a name."""
    return dict(zip(page.texts[-2::-1], page.texts[:0:-1], strict=True))


@pytest.mark.slow
def test_verify(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", "--data", str(files / "people"), "--checkpoint", str(files / "run")]
    assert run([*command, "--json", "out/people.json"]) == 0
    shown = capsys.readouterr().out
    assert "report: out/people.html" in shown and not Path("runs").exists()
    page = read(Path("out/people.html"))
    assert page.titles == ["Figures", "Curves", "Hardest pairs", "Settings", "Versions"]
    figures = json.loads(Path("out/people.json").read_text())
    rows = beside(page)
    assert rows["equal error rate"] == f"{figures['eer']:.4f}" and rows["pairs of one person"] == "36"
    assert rows["batch_size"] == "64" and rows["flip"] == "no" and rows["torch"] == torch.__version__
    # Six pairs of each kind, two images each; three drawings.
    assert len(page.pictures) == 3 and len(page.photographs) == 24
    assert all(photograph.size == (96, 96) for photograph in page.photographs)
    assert "one person" in page.drawn() and "false accept rate" in page.drawn()
    named = {text for text in page.texts if text.endswith("<i>.png")}
    assert named and all(Path(name).is_file() for name in named)
    assert any("<script>" in name for name in named) and any("人物" in name for name in named)


@pytest.mark.slow
def test_saved_embeddings_have_names_alone(tmp_path: Path) -> None:
    labels = torch.arange(6).repeat_interleave(3)
    rows = torch.eye(6)[labels] + 0.4 * torch.randn(18, 6, generator=torch.Generator().manual_seed(0))
    EmbeddingSet(rows, [f"<{i}>.png" for i in range(18)], labels).save("saved.npz")
    assert run(["verify", "--embeddings", "saved.npz", "--distance", "euclidean", "--raw"]) == 0
    page = read(Path("runs/verify/report.html"))
    assert page.photographs == [] and page.texts.count("image not at hand") == 24
    assert sum(re.fullmatch(r"<\d+>\.png", text) is not None for text in page.texts) == 24
    assert any(re.fullmatch(r"one person, distance [\d.]+", text) for text in page.texts)
    assert "distance between two embeddings" in page.drawn()

    kinds = ["another person", "not in the gallery"]
    assert run(["identify", "--embeddings", "saved.npz", "--engine", "torch", "--pictures", "drawn"]) == 0
    page = read(Path("drawn/report.html"))
    assert page.titles == ["Figures", "Curves", "Hardest probes", "Settings", "Versions"]
    assert all(kind in page.drawn() for kind in kinds) and (Path("drawn") / "cmc.png").is_file()


def test_identify_with_images(files: Path) -> None:
    command = ["identify", "--data", str(files / "people"), "--checkpoint", str(files / "run")]
    assert run([*command, "--report", "a/b.html"]) == 0
    page = read(Path("a/b.html"))
    assert len(page.photographs) % 2 == 0 and len(page.photographs) >= 2 and not Path("runs").exists()


def test_pairs_of_one_kind_and_a_place_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    rows = EmbeddingSet(torch.eye(4), list("abcd"), pairs=fa.evaluation.Pairs(*torch.tensor([[0, 1], [2, 3], [1, 1]])))
    rows.save("one.npz")
    assert run(["verify", "--embeddings", "one.npz"]) == 0
    assert read(Path("runs/verify/report.html")).titles == ["Figures", "Settings", "Versions"]
    Path("file").write_text("")
    assert run(["verify", "--embeddings", "one.npz", "--report", "file/report.html"]) == 2
    assert "--report file/report.html cannot be written" in capsys.readouterr().err
    shutil.rmtree("runs")
    Path("runs").write_text("")
    assert run(["verify", "--embeddings", "one.npz"]) == 0  # nobody asked for this report
    captured = capsys.readouterr()
    assert (
        "No report: runs/verify/report.html cannot be written" in captured.err and "pairs of one person" in captured.out
    )


@pytest.mark.parametrize(("options", "written"), [((), True), (("--no-report",), False)])
def test_no_report(options: tuple[str, ...], written: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = EmbeddingSet(torch.eye(4), list("abcd"), pairs=fa.evaluation.Pairs(*torch.tensor([[0, 1], [2, 3], [1, 1]])))
    rows.save("one.npz")
    assert run(["verify", "--embeddings", "one.npz", *options]) == 0
    assert Path("runs").exists() == written
    monkeypatch.setenv("FUSED_ARCFACE_NO_REPORT", "1")
    assert run(["identify", "--help"]) == 0 and run(["verify", "--embeddings", "one.npz", "--json", "j/v.json"]) == 0
    assert not Path("j/v.html").exists()
    assert run(["verify", "--embeddings", "one.npz", "--report", "named.html"]) == 0
    assert Path("named.html").is_file()


OPTIONS = "--data identities:6x4 --output run --batch-size 8 --image-size 16 --workers 0 --device cpu"
TRAIN = ["train", *OPTIONS.split()]


@pytest.mark.slow
def test_train_and_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, "--epochs", "2"]) == 0
    assert "report: run/report.html" in capsys.readouterr().out
    first = read(Path("run/report.html"))
    assert first.titles == [
        "Training", "Verification", "Thresholds", "Curves", "Hardest pairs", "Data", "Settings", "Versions"
    ]  # fmt: skip
    rows = beside(first)
    assert rows["epochs"] == "2" and rows["identities"] == "6" and rows["images"] == "24"
    assert len(first.photographs) == 24 and len(first.pictures) == 5 + 1 + 2
    assert all(label in first.drawn() for label in ("loss", "learning rate", "angle, degrees"))
    assert any(text.endswith("step 6, epoch 2 of 2.") for text in first.texts)

    Path("run/report.html").unlink()
    assert run(["train", "--output", "run", "--resume", "--epochs", "3"]) == 0
    resumed = read(Path("run/report.html"))
    assert any(text.endswith("step 9, epoch 3 of 3.") for text in resumed.texts)
    assert any(text.startswith("Of the verification after step 9") for text in resumed.texts)

    # A finished run that is resumed has nothing left to verify, and keeps its curves.
    assert run(["train", "--output", "run", "--resume"]) == 0
    assert read(Path("run/report.html")).titles == resumed.titles

    # Whatever is wrong with a report, the run goes on and ends well.
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(training_page, "training_report", broken)
    monkeypatch.setattr(verifier, "digest_pairs", broken)
    assert run(["train", "--output", "run", "--resume", "--epochs", "4"]) == 0
    captured = capsys.readouterr()
    assert "No report: no ink" in captured.err and "12 steps are done" in captured.out
    assert "the report will not show it, no ink" in captured.err


def test_a_training_that_goes_on_for_hours_refreshes_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], []
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])

    def write() -> None:
        written.append(now[0])
        now[0] += 60  # a slow one

    refresh = reporting.Refresh(write)
    for seconds in (10, 599, 601, 700, 1800, 1900):
        now[0] = max(now[0], seconds)
        refresh(Checkpointed(1, Path()))
    assert written == [601, 1900]  # a minute's work at most every twenty minutes


def test_long_logs_are_thinned(tmp_path: Path) -> None:
    values = {"target_angle": 50.0, "accuracy": 0.5, "lr": 0.1, "images_per_second": 100.0, "head_share": 0.1}
    lines = [
        json.dumps({"step": step, "epoch": 1 + step // 100, "loss": 1.0 / step, **values}) for step in range(1, 5001)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 5001, "lo']))
    log = training_page.read_log(tmp_path / "log.jsonl")
    assert log.steps.shape == (5000,) and log.steps["loss"][-1] == 1 / 5000
    epochs = rows(training_page._epochs(log))
    assert 25 <= len(epochs) <= 30 and epochs[-1][:2] == ("51", "1")
    loss, *_ = training_page._training_drawings(log)
    assert len(drawing.as_svg(loss)) < 60_000 and "mean over several steps" in loss.caption
    for skipped in (slice(None, None, 2), slice(None)):  # steps without a finite loss
        log.steps["loss"][skipped] = float("nan")
        drawing.as_svg(training_page._training_drawings(log)[0])


@pytest.mark.slow
def test_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "peak_of_steps", lambda *_: 0)
    monkeypatch.setattr(drawing, "write_pictures", lambda *_: [])  # the same drawings as files: in tests/app/lab
    assert run(["compare", "--quick", "--criteria", "softmax; ArcFace", "--output", "out"]) == 0
    page = read(Path("out/report.html"))
    assert page.titles == [
        "Results", "Pictures", "Hardest pairs, softmax", "Hardest pairs, ArcFace", "Losses", "Distances", "Settings",
        "Versions",
    ]  # fmt: skip
    assert len(page.pictures) == 9 and len(page.photographs) == 2 * 12
    assert "Mahalanobis" in page.texts and "loss ÷ first loss" in page.drawn()


@pytest.mark.slow
def test_bench(tmp_path: Path) -> None:
    synthetic_report().write(tmp_path)
    capacity = {
        "recipe": "<fused>", "backend": "cpu", "weight_dtype": "float32", "momentum_dtype": "int8", "max_C": 10**6,
        "bytes_per_class": 16.0, "step_ms": 2.0, "how": "measured", "budget_bytes": 2**30, "N": 64, "D": 512,
        "device": "a device", "torch": "2.0", "commit": "abc", "date": "2026-01-01",
    }  # fmt: skip
    (tmp_path / "capacity.json").write_text(json.dumps([capacity]))
    page = read_page(render(bench_results.bench_report(tmp_path, {"cases": "quick", "device": "cpu"})))
    assert page.titles == ["Pictures", "Times", "Not measured", "Most identities", "Settings", "Versions"]
    assert len(page.pictures) == 5 and "N=64 C=100 000 D=512 float32, fwd+bwd" in " ".join(page.texts)
    assert "<fused> (cpu)" in page.texts and "not installed" in page.texts
