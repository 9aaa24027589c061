"""Fine-tuning: class centers of another run, a frozen backbone, augmentation and balanced batches."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.image_files import write_folder
from support.training_runs import TINY, losses, run, weights

import fused_arcface as fa
from fused_arcface.app.cli import run as run_command
from fused_arcface.app.data import open_source
from fused_arcface.app.nets.small import embed
from fused_arcface.app.training import events
from fused_arcface.app.training.augment import augment
from fused_arcface.app.training.batches import BatchPlan
from fused_arcface.app.training.centers import load_centers
from fused_arcface.app.training.config import OptionError, TrainConfig
from fused_arcface.app.training.events import Noted, Stepped
from fused_arcface.app.training.runs import load_backbone
from fused_arcface.base.text import encode_names
from fused_arcface.checkpoint import convert


@pytest.mark.slow
def test_a_net_of_another_dimension_begins_with_what_fits(tmp_path: Path) -> None:
    """From a run's folder, whose newest checkpoint counts, and from its file of weights."""
    still = {"lr": 0.0, "weight_decay": 0.0, "epochs": 1}
    run(TINY.replace({"epochs": 1}), tmp_path / "start")
    options = {**still, "embedding_dim": 32, "init": str(tmp_path / "start" / "model.pt")}
    with pytest.raises(OptionError, match=r"init: .*projection.*must be \(32, .*\. --init-partial takes what fits$"):
        run(TINY.replace(options), tmp_path / "refused")
    _, heard = run(TINY.replace({**options, "init_partial": True}), tmp_path / "wider")
    notes = [event.text for event in heard if isinstance(event, Noted) and event.text.startswith("init: ")]
    assert len(notes) == 1 and "tensors are taken from it, the others begin with new weights: projection" in notes[0]
    start, wider = weights(tmp_path / "start"), weights(tmp_path / "wider")
    fitting = [name for name in start if start[name].shape == wider[name].shape and "weight" in name]
    assert len(fitting) >= 6 and all(torch.equal(start[name], wider[name]) for name in fitting)
    _, heard = run(TINY.replace({**still, "init": str(tmp_path / "start")}), tmp_path / "same")
    assert all(torch.equal(start[name], weights(tmp_path / "same")[name]) for name in start if "weight" in name)
    with pytest.raises(OptionError, match=r"init: .* has no complete checkpoint yet"):
        run(TINY.replace({"init": str(tmp_path)}), tmp_path / "none")


def centers_of(output: Path) -> torch.Tensor:
    (piece,) = convert.read(output).tensors["weight"].pieces()
    return piece


def test_old_identities_keep_their_centers_and_new_ones_begin_anew(tmp_path: Path) -> None:
    """Nothing learns in the second run, so what it saves is what it began with."""
    options = {"image_size": 16, "channels": 1, "seed": 3}
    first = TINY.replace({**options, "data": str(write_folder(tmp_path / "first", 4, 4)), "epochs": 1})
    run(first, tmp_path / "old")
    write_folder(tmp_path / "second", 3, 4, first=2)  # two old identities and a new one, which comes first by name
    (tmp_path / "second" / "person_004").rename(tmp_path / "second" / "a_new_one")
    still = {"lr": 0.0, "center_lr": 0.0, "weight_decay": 0.0, "epochs": 1}
    second = first.replace({**still, "data": str(tmp_path / "second"), "centers": str(tmp_path / "old")})
    _, heard = run(second, tmp_path / "new")
    old, new = centers_of(tmp_path / "old"), centers_of(tmp_path / "new")
    assert torch.equal(new[1:], old[2:4])
    assert torch.equal(new[:1], fa.PartialFC(128, 3, seed=3).weight[:1])
    assert (
        f"centers: 2 of 3 identities keep their centers from {tmp_path / 'old'}, matched by name; "
        "random centers for 1 new; 2 of the source are not in the data"
    ) in [event.text for event in heard if isinstance(event, Noted)]


def test_centers_without_names_are_the_first_classes(tmp_path: Path) -> None:
    file = tmp_path / "centers.pt"
    torch.save({"weight": torch.arange(12.0).view(6, 2)}, file)
    head = fa.PartialFC(2, 4, sub_centers=2)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match="must have centers of embedding_dim=2 and sub_centers=2; it has 2 and 1"):
        load_centers(head, list("abcd"), file)
    head = fa.PartialFC(2, 7)
    before = head.weight.detach().clone()
    (note,) = load_centers(head, list("abcdefg"), file)
    kept = f"centers: 6 of 7 identities keep their centers from {file}, matched by order"
    assert note == f"{kept}; random centers for 1 new"
    assert torch.equal(head.weight[:6], torch.arange(12.0).view(6, 2)) and torch.equal(head.weight[6:], before[6:])
    with pytest.raises(ValueError, match="has 6 classes without names, and the data 5"):
        load_centers(fa.PartialFC(2, 5), list("abcde"), file)
    (tmp_path / "classes.txt").write_bytes(encode_names(["x", "a", "y", "b", "z", "c"]))
    head = fa.PartialFC(2, 3)
    assert "3 of the source are not in the data" in load_centers(head, list("abc"), file)[0]
    assert head.weight.tolist() == [[2, 3], [6, 7], [10, 11]]
    (tmp_path / "classes.txt").write_bytes(encode_names(["x"]))
    with pytest.raises(ValueError, match=r"classes\.txt must name each of 6 classes of .* once; it has 1 names"):
        load_centers(head, list("abc"), file)
    with pytest.raises(OptionError, match=r"centers: .*nothing does not exist$"):
        run(TINY.replace({"centers": str(tmp_path / "nothing")}), tmp_path / "run")


def _first_loss(output: Path, config: TrainConfig) -> float:
    """Return the oracle's loss of the first batch with new class centers, of the net in evaluation mode."""
    net, spec = load_backbone(output)
    source = open_source(config.data)
    items = BatchPlan(24, 8, config.seed, config.flip).epoch(0)[0]
    images = torch.stack([source.read(item.place, spec).flip([-1] if item.mirrored else []) for item in items])
    labels = source.labels[[item.place for item in items]]
    centers = fa.PartialFC(128, 6, seed=config.seed).weight
    embeddings = embed(net, images, normalize=False)
    return fa.reference.margin_softmax_loss(embeddings, centers, labels, scale=16.0).item()


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-5), ({"center_optimizer": "joint", "accumulation": 2}, 1e-5), ({"precision": "fp16"}, 1e-2)],
)
@pytest.mark.slow
def test_a_frozen_backbone_does_not_move(tmp_path: Path, options: dict, tolerance: float) -> None:
    """Not its running statistics either; after the frozen epochs it learns."""
    config = TINY.replace({**options, "epochs": 2})
    run(config.replace({"lr": 0.0, "weight_decay": 0.0, "epochs": 1}), tmp_path / "start")
    init = {"init": str(tmp_path / "start" / "model.pt")}
    start = weights(tmp_path / "start")
    run(config.replace({**init, "freeze": "backbone"}), tmp_path / "frozen")
    frozen = weights(tmp_path / "frozen")
    assert all(torch.equal(start[name], frozen[name]) for name in start)
    assert not torch.equal(centers_of(tmp_path / "frozen"), centers_of(tmp_path / "start"))
    assert losses(tmp_path / "frozen")[0] == pytest.approx(_first_loss(tmp_path / "start", config), rel=tolerance)
    run(config.replace({**init, "freeze": "backbone:1"}), tmp_path / "thawed")
    thawed = weights(tmp_path / "thawed")
    assert losses(tmp_path / "thawed")[:3] == losses(tmp_path / "frozen")[:3]
    if config.precision == "fp32":  # in fp16 the scaler leaves the first steps out
        counted = thawed["projection.2.num_batches_tracked"] - start["projection.2.num_batches_tracked"]
        assert counted == 3 * config.accumulation
        assert not torch.equal(thawed["projection.1.weight"], start["projection.1.weight"])


def test_balanced_batches_have_every_class_equally_often() -> None:
    counts = [1, 2, 3, 14]
    labels = torch.repeat_interleave(torch.tensor(counts))
    plan = BatchPlan(num_images=20, batch_size=4, seed=1, flip=False, labels=labels)
    for epoch in range(2):
        drawn = [[item.place for item in batch] for batch in plan.epoch(epoch)]
        assert len(drawn) == 5 and all(sorted(labels[batch].tolist()) == [0, 1, 2, 3] for batch in drawn)
        of_last = [place for batch in drawn for place in batch if labels[place] == 3]
        assert len(set(of_last)) == 5  # no image twice while there are others
    assert plan.epoch(0) != plan.epoch(1) and plan.epoch(0) == plan.epoch(0)


def test_augmentation_is_a_function_of_its_key() -> None:
    image = torch.rand(3, 24, 24) * 2 - 1
    for level in ("light", "strong"):
        found = [augment(image, level, key) for key in range(40)]
        assert all(each.shape == image.shape and each.abs().max() <= 1 for each in found)
        assert all(torch.equal(each, augment(image, level, key)) for key, each in enumerate(found))
        assert all(not torch.equal(one, two) for one, two in pairwise(found))
    gray = sum(bool((each[0] == each[1]).all()) for each in found)
    assert 2 <= gray <= 16  # a fifth of 40
    flat = torch.full((1, 9, 9), 0.25)
    assert (augment(flat, "light", 3).std() < 1e-6) and abs(augment(flat, "light", 3).mean() - 0.25) <= 0.15


@pytest.mark.slow
def test_augmented_and_balanced_training_is_resumed_as_if_never_interrupted(tmp_path: Path) -> None:
    config = TINY.replace({"augment": "strong", "balanced": True, "freeze": "backbone:1"})
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", stop_at=5)
    run(config, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") != losses_without(tmp_path)


def losses_without(folder: Path) -> list[float]:
    run(TINY, folder / "plain")
    return losses(folder / "plain")


@pytest.mark.parametrize("freeze", ["head", "backbone:0", "backbone:", "backbone:2.5"])
def test_what_can_be_frozen(freeze: str) -> None:
    rule = "freeze must be backbone or backbone:EPOCHS, EPOCHS from 1 on"
    with pytest.raises(ValueError, match=re.escape(f"{rule}; got {freeze!r}")):
        TrainConfig(freeze=freeze)


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--data", "identities:6x4", "--output", str(tmp_path / "run"), "--batch-size", "8"]
    command += ["--image-size", "16", "--workers", "0", "--device", "cpu", "--dry-run"]
    assert run_command(command) == 0
    shown = capsys.readouterr().out
    # The small net has 16, 32 and 64 channels and a projection; there are 6 centers of 128. SGD keeps two more copies
    # of the net, CenterSGD one of the centers.
    net = 9 * (16 + 16 * 32 + 32 * 64) + 2 * (16 + 32 + 64) + 1024 * 128 + 2 * 128
    assert shown.splitlines()[:2] == [
        "cpu: 24 images of 6 identities, 16 × 16 gray; 60 steps of 8 images, scale 16",
        f"a net of {net / 1e6:.2f} M parameters; {(3 * net + 2 * 6 * 128) * 4 / 1e6:.1f} MB of memory for weights and "
        "optimizers",
    ]
    assert "  embedding_dim = 128\n" in shown and re.search(r"The first step took .* s, .*; loss \d", shown)
    assert not (tmp_path / "run").exists()


def test_the_end_says_what_there_is_and_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--data", "identities:6x4", "--output", str(tmp_path / "run"), "--batch-size", "8"]
    command += ["--image-size", "16", "--workers", "0", "--device", "cpu", "--epochs", "1"]
    assert run_command(command) == 0
    shown = capsys.readouterr().out
    assert "the best so far, saved in best.pt" in shown and "\x1b" not in shown
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 80
    for file in ("model.pt", "best.pt", "best", "thresholds.json", "log.jsonl"):
        assert re.search(rf"^  {file} +\w", shown, re.M), file
    folder = shlex.quote(str(tmp_path / "run"))
    assert f"  fused-arcface embed IMAGES --checkpoint {folder} --output embeddings.npz\n" in shown
    epoch = next(line for line in shown.splitlines() if line.startswith("epoch"))
    assert len(epoch) <= 80 and "\x1b" not in shown and "\r" not in shown


def test_a_better_net_is_kept_and_a_worse_one_is_not(tmp_path: Path) -> None:
    """With a learning rate that ruins the net, the first epochs are better than the last."""
    kept: list[bool] = []
    config = TINY.replace({"verify_every": 1, "epochs": 4, "data": "identities:8x6"})
    _, heard = run(config, tmp_path / "run")
    found = [event for event in heard if isinstance(event, events.Verified)]
    highest = -1.0
    for event in found:
        kept.append(event.found.accuracy > highest)
        highest = max(highest, event.found.accuracy)
    assert [event.best for event in found] == kept and kept[0]
    assert len([event for event in heard if isinstance(event, Stepped)]) == found[-1].step
