"""A step that is skipped or refused leaves no trace: weights, buffers, optimizers, margin state, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_runs import TINY, run, weights
from torch import Tensor

from fused_arcface.app.data import DataError
from fused_arcface.app.data.images import LabeledImages
from fused_arcface.app.data.sources import MemoryImages
from fused_arcface.app.training import trainer
from fused_arcface.app.training.config import TrainConfig
from fused_arcface.app.training.events import Noted
from fused_arcface.app.training.learner import Learner
from fused_arcface.app.training.outcomes import TrainingError
from fused_arcface.app.training.world import World

IDENTITIES, ROWS = 6, 8


def make_learner(options: dict[str, Any]) -> Learner:
    filled = {"image_size": 16, "channels": 1, "embedding_dim": 8, "lr": 0.1, "scale": 16.0}
    return Learner(TINY.replace(filled | options), IDENTITIES, 20, World(torch.device("cpu")))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(ROWS, 1, 16, 16, generator=generator), torch.arange(ROWS) % IDENTITIES


def state(learner: Learner) -> dict[str, Any]:
    head = learner.head
    # A learning rate follows the run's counter; it is set anew in each step.
    optimizers = [each.state_dict()["state"] for each in (learner.optimizer, head.center_optimizer) if each]
    modules = [[*module.parameters(), *module.buffers()] for module in (learner.backbone, head)]
    return copy.deepcopy({"modules": modules, "optimizers": optimizers})


def assert_identical(got: Any, right: Any) -> None:
    if isinstance(right, Tensor):
        assert torch.equal(got, right)
    elif isinstance(right, (dict, list)):
        assert len(got) == len(right)
        for key in right if isinstance(right, dict) else range(len(right)):
            assert_identical(got[key], right[key])
    else:
        assert got == right


def nan_pixel(learner: Learner, images: Tensor) -> None:
    images[3, 0, 5, 5] = torch.nan


def gradient_of_the_net(learner: Learner, images: Tensor) -> None:
    """The loss and the head's gradients are finite, the net's is not."""
    first = next(learner.backbone.parameters())
    first.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))


def gradient_of_the_centers(learner: Learner, images: Tensor) -> None:
    """The net's gradient is finite, that of the class centers is not."""
    learner.head.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))


OPTIONS = [
    {},
    {"accumulation": 2, "optimizer": "adamw", "sample_rate": 0.5},
    {"precision": "bf16", "margin": "AdaFace", "sub_centers": 2},
    {"precision": "fp16", "margin": "ElasticFace"},
    {"margin": "CurricularFace", "center_optimizer": "joint"},
    {"precision": "fp16", "center_optimizer": "joint", "optimizer": "adamw", "accumulation": 2},
]


@pytest.mark.parametrize("spoil", [nan_pixel, gradient_of_the_net, gradient_of_the_centers])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_skipped_step_leaves_no_trace(options: dict[str, Any], spoil: Any) -> None:
    if spoil is gradient_of_the_centers and options.get("center_optimizer") != "joint":
        spoil = nan_pixel  # the fused optimizer has no such gradient
    learner = make_learner(options)
    sizes = [ROWS // 2] * 2 if learner.config.accumulation == 2 else [ROWS]
    for step in range(2):
        learner._scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=learner._scaler.is_enabled())
        learner._step._scaler = learner._scaler
        assert learner.learn(*batch(step), sizes, step).updated
    before = state(learner)
    images, labels = batch(2)
    spoil(learner, images)
    result = learner.learn(images, labels, sizes, 2)
    assert not result.updated
    assert_identical(state(learner), before)
    assert learner.head.step == 3  # the same batch and sample are not drawn again
    if learner._scaler.is_enabled():
        assert learner._scaler.get_scale() == 4.0


@pytest.mark.parametrize("options", OPTIONS)
def test_a_refused_step_leaves_no_trace_and_no_count(options: dict[str, Any]) -> None:
    learner = make_learner(options)
    sizes = [ROWS // 2] * 2 if learner.config.accumulation == 2 else [ROWS]
    learner.learn(*batch(0), sizes, 0)
    before = state(learner)
    images, labels = batch(1)
    labels[2] = IDENTITIES
    with pytest.raises(ValueError, match="target"):
        learner.learn(images, labels, sizes, 1)
    assert_identical(state(learner), before)
    assert learner.head.step == 1
    learner.learn(*batch(1), sizes, 1)  # and it goes on


def test_a_skipped_step_is_as_if_its_batch_had_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after it is that of a net which never saw the bad batch."""
    learners = [make_learner({"margin": "AdaFace", "schedule": "constant", "warm_up": 0.0}) for _ in range(2)]
    for learner in learners:
        learner.learn(*batch(0), [ROWS], 0)
    images, labels = batch(9)
    nan_pixel(learners[0], images)
    assert not learners[0].learn(images, labels, [ROWS], 1).updated
    learners[1].head.step += 1
    losses = [learner.learn(*batch(2), [ROWS], 2).loss for learner in learners]
    assert losses[0] == losses[1]
    assert_identical(state(learners[0]), state(learners[1]))


class Spoiled(MemoryImages):
    """Some images have a NaN pixel, as a floating-point file may."""

    def __init__(self, bad: list[int]) -> None:
        labels = torch.arange(24) // 4
        images = torch.rand(24, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        images[bad, 0, 3, 3] = torch.nan
        super().__init__(LabeledImages(images, labels))


def run_on(bad: list[int], monkeypatch: pytest.MonkeyPatch, output: Path, config: TrainConfig = TINY) -> Any:
    monkeypatch.setattr(trainer, "open_data", lambda _: Spoiled(bad))
    return run(config, output)


def test_pixels_that_are_not_finite_are_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, heard = run_on([5], monkeypatch, tmp_path / "run")
    notes = [event.text for event in heard if isinstance(event, Noted)]
    assert outcome.step == 9 and len(notes) == 3, notes  # once an epoch
    assert set(notes) == {"image 5 of the data has pixels that are not finite; the next image is taken instead"}
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    with pytest.raises(DataError, match="image 5 of the data has pixels that are not finite; bad_data is stop"):
        run_on([5], monkeypatch, tmp_path / "stop", TINY.replace({"bad_data": "stop"}))
    with pytest.raises(DataError, match="24 images in a row cannot be read; the last: image"):
        run_on(list(range(24)), monkeypatch, tmp_path / "all")


def test_a_run_without_a_single_update_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "_finish_gradients", lambda *_: False)
    for resume in (False, True):  # also of a run that has ended so
        with pytest.raises(TrainingError, match="all 9 steps were skipped: no loss or gradient was finite"):
            run(TINY, tmp_path / "run", resume=resume)
        assert not (tmp_path / "run" / "model.pt").exists()
