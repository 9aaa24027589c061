"""The best checkpoint of a run is kept whole: with class centers and optimizers, as a run of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.training_runs import TINY, losses, run

import fused_arcface as fa
from fused_arcface import checkpoint
from fused_arcface.app.cli import run as run_command
from fused_arcface.app.thresholds import KeptThresholds, read_thresholds
from fused_arcface.app.training import best
from fused_arcface.app.training.best import BestNet
from fused_arcface.app.training.config import TrainConfig
from fused_arcface.app.training.events import Noted, Verified
from fused_arcface.app.training.outcomes import TrainingError
from fused_arcface.app.training.runs import RunFolder
from fused_arcface.checkpoint import convert

pytest.importorskip("sklearn")

CONFIG = TINY.replace({"verify_every": 1, "epochs": 4})
BEST = 6
"""The step that the verifications below say is the best one; a run has 12."""


class Judge:
    """Stands in for the verification: an accuracy for each epoch."""

    accuracies = (0.5, 0.9, 0.7, 0.9)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keep, judge = BestNet.keep, self

        def judged(self: BestNet, net: torch.nn.Module, found: KeptThresholds) -> bool:
            assert found.step is not None
            accuracy = judge.accuracies[found.step // 3 - 1]
            return keep(self, net, KeptThresholds(found.data, accuracy, found.points, found.step))

        monkeypatch.setattr(BestNet, "keep", judged)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run to its end, of which the second epoch was the best; the fourth is as good."""
    Judge(monkeypatch)
    _, heard = run(CONFIG, tmp_path / "run")
    assert [event.best for event in heard if isinstance(event, Verified)] == [True, True, False, False]
    return tmp_path / "run"


def centers_of(source: Path) -> torch.Tensor:
    return torch.cat(list(convert.read(source).tensors["weight"].pieces()))


@pytest.mark.slow
def test_the_best_checkpoint_is_a_run_of_its_own(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(CONFIG.replace({"keep": 9}), tmp_path / "all")
    (of_best,) = (tmp_path / "all" / "checkpoints").glob(f"step_*{BEST}")
    best, kept = RunFolder(whole / "best"), whole / "best" / "checkpoints" / of_best.name
    assert [path.name for path in best.checkpoints.iterdir() if path.is_dir()] == [of_best.name]
    assert not (whole / "checkpoints" / of_best.name).exists()  # only two are kept there
    assert torch.equal(centers_of(best.root), centers_of(of_best))
    assert (kept / "manifest.json").read_bytes() == (of_best / "manifest.json").read_bytes()
    images = torch.rand(3, 1, 16, 16) * 2 - 1
    assert torch.equal(fa.load_embedder(best.root)(images), fa.load_embedder(whole / "best.pt")(images))
    assert fa.load_embedder(best.root).thresholds == read_thresholds(whole / "best.json")
    assert best.read_config() == CONFIG.replace({**vars(best.read_config())}) and best.read_config().epochs == 4
    # It is verified, converted and resumed by the commands for any run.
    assert run_command(["verify", "--data", "identities:5x4", "--checkpoint", str(best.root)]) == 0
    assert run_command(["convert", str(best.root), str(tmp_path / "centers.safetensors")]) == 0
    assert torch.equal(centers_of(tmp_path / "centers.safetensors"), centers_of(of_best))
    before = losses(whole)
    assert run_command(["train", "--output", str(best.root), "--resume"]) == 0
    steps = [line for line in best.log.read_text().splitlines() if '"loss"' in line]
    assert len(steps) == 12 - BEST and f'"loss": {before[-1]!r}' in steps[-1]
    assert torch.equal(centers_of(best.root), centers_of(whole)) and losses(whole) == before
    capsys.readouterr()


def test_class_centers_of_the_best_are_a_start(whole: Path, tmp_path: Path) -> None:
    still = {"lr": 0.0, "center_lr": 0.0, "weight_decay": 0.0, "epochs": 1}
    options = {**still, "centers": str(whole / "best"), "init": str(whole / "best")}
    _, heard = run(TINY.replace(options), tmp_path / "tuned")
    assert torch.equal(centers_of(tmp_path / "tuned"), centers_of(whole / "best"))
    notes = [event.text for event in heard if isinstance(event, Noted)]
    assert any(note.startswith("centers: 6 of 6 identities keep their centers from") for note in notes)


@pytest.mark.slow
def test_a_run_interrupted_at_its_best_verifies_and_keeps_it_when_it_resumes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption comes after the step and before the verification."""
    run(CONFIG, tmp_path / "parts", stop_at=BEST)
    assert verified(tmp_path / "parts") == [3]
    _, heard = run(CONFIG, tmp_path / "parts", resume=True)
    assert [event.step for event in heard if isinstance(event, Verified)] == [6, 9, 12]
    assert verified(tmp_path / "parts") == verified(whole) == [3, 6, 9, 12]
    assert torch.equal(centers_of(tmp_path / "parts" / "best"), centers_of(whole / "best"))
    _, heard = run(CONFIG, tmp_path / "parts", resume=True)
    assert not any(isinstance(event, Verified) for event in heard)


def verified(output: Path) -> list[int]:
    """Return the steps of a log that have a verification."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "verification_accuracy" in line]


@pytest.mark.slow
def test_a_best_of_a_training_that_was_given_up_is_replaced(whole: Path) -> None:
    """The newest checkpoints are removed, and the run goes on from an earlier one with another verification."""
    first = centers_of(whole / "best")
    shutil.rmtree(whole / "checkpoints")
    shutil.copytree(whole / "best" / "checkpoints", whole / "checkpoints")
    Judge.accuracies, before = (0.5, 0.9, 0.95, 0.9), Judge.accuracies
    try:
        run(CONFIG, whole, resume=True)
    finally:
        Judge.accuracies = before
    (kept,) = (whole / "best" / "checkpoints").glob("step_*")
    assert kept.name.endswith("9") and not torch.equal(centers_of(whole / "best"), first)


@pytest.mark.slow
def test_a_best_that_was_trained_in_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Judge(monkeypatch)
    run(CONFIG, tmp_path / "run", stop_at=4)
    best = tmp_path / "run" / "best"
    run(CONFIG, best, resume=True, stop_at=5)
    centers = centers_of(best)
    _, heard = run(CONFIG, tmp_path / "run", resume=True)
    assert torch.equal(centers_of(best), centers)
    said = f"{best} was trained in, so it stays as it is; the checkpoint of the best verification is not kept"
    assert said in [event.text for event in heard if isinstance(event, Noted)]


def test_it_is_an_option_and_needs_a_verification(tmp_path: Path) -> None:
    assert TrainConfig().keep_best
    run(CONFIG.replace({"epochs": 1, "keep_best": False}), tmp_path / "without")
    assert (tmp_path / "without" / "best.pt").exists() and not (tmp_path / "without" / "best").exists()


def test_a_full_disk_while_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "run" / "best"))

    with monkeypatch.context() as patch:
        patch.setattr(best, "keep_alone", full)
        with pytest.raises(TrainingError, match="No space left on device; make room there and resume with"):
            run(CONFIG.replace({"epochs": 1}), tmp_path / "run")
    assert not (tmp_path / "run" / "model.pt").exists()
    run(CONFIG.replace({"epochs": 1}), tmp_path / "run", resume=True)
    assert torch.equal(centers_of(tmp_path / "run" / "best"), centers_of(tmp_path / "run"))
    assert checkpoint.latest(tmp_path / "run" / "best" / "checkpoints") is not None
