"""Options of a training: their rules, TOML, margins as text; the schedule and the batches that follow from them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import fused_arcface as fa
from fused_arcface.app.training.batches import BatchPlan
from fused_arcface.app.training.config import OptionError, TrainConfig, read_options, rules
from fused_arcface.app.training.schedule import Schedule
from fused_arcface.margins.text import parse_margin


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 1}, ValueError, "batch_size must be >= 2; got 1"),
        ({"epochs": 0}, ValueError, "epochs must be >= 1; got 0"),
        # A stranger's run must not ask for more memory than there is.
        ({"embedding_dim": 1 << 62}, ValueError, f"embedding_dim must be >= 1 and <= 16384; got {1 << 62}"),
        ({"image_size": 100000}, ValueError, "image_size must be >= 1 and <= 4096; got 100000"),
        ({"epochs": 1.5}, TypeError, "epochs must be of type int; got float"),
        ({"epochs": True}, TypeError, "epochs must be of type int; got bool"),
        ({"flip": 1}, TypeError, "flip must be of type bool; got int"),
        ({"data": 3}, TypeError, "data must be of type str; got int"),
        ({"scale": 0.0}, ValueError, "scale must be > 0; got 0"),
        ({"scale": math.nan}, ValueError, "scale must be > 0; got nan"),
        ({"lr": math.inf}, ValueError, "lr must be >= 0; got inf"),
        ({"sample_rate": 1.1}, ValueError, "sample_rate must be > 0 and <= 1; got 1.1"),
        ({"momentum": 1.0}, ValueError, "momentum must be >= 0 and < 1; got 1"),
        ({"channels": 2}, ValueError, "channels must be 1 or 3; got 2"),
        ({"optimizer": "lion"}, ValueError, "optimizer must be one of sgd, adamw; got 'lion'"),
        ({"backend": "abacus"}, ValueError, "backend must be one of"),
        ({"backbone": "large"}, ValueError, "backbone must be one of small"),
        ({"margin": "ArcFace(7)"}, ValueError, r"ArcFace: margin must be in \[0, π\) radians; got 7"),
        ({"batchsize": 3}, ValueError, "no option is called batchsize; did you mean batch_size?"),
    ],
)
def test_wrong_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig().replace(options)


def test_every_option_has_help_and_a_default_that_passes() -> None:
    assert all(rule.help.endswith(".") for rule, _ in rules().values())
    assert TrainConfig() == TrainConfig().replace({})


@pytest.mark.slow
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.full)])
def test_a_flipped_bit_is_an_error_or_changes_nothing(every: int, tmp_path: Path) -> None:
    """With every fifth bit each bit of a byte has its turn."""
    file, config = tmp_path / "config.toml", TrainConfig(lr=0.25, epochs=2)
    config.save(file)
    content = file.read_bytes()
    for place in range(0, 8 * len(content), every):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            found = TrainConfig().replace(read_options(file))
        except OptionError:
            continue
        assert found == config, place


def test_toml_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(data='a "b"\\c', lr=0.25, embedding_dim=7, flip=False, margin="CosFace(0.4)")
    config.save(tmp_path / "config.toml")
    assert TrainConfig().replace(read_options(tmp_path / "config.toml")) == config
    text = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(text.replace("lr = 0.25", "lr = 0.5"))
    with pytest.raises(
        OptionError, match=r"config\.toml does not match its checksum: .*edited it, delete its first line"
    ):
        read_options(tmp_path / "config.toml")
    (tmp_path / "config.toml").write_text(text.replace("lr = 0.25", "lr = 0.5").partition("\n")[2])
    assert read_options(tmp_path / "config.toml")["lr"] == 0.5
    (tmp_path / "config.toml").write_text("scale = 64\n")
    assert TrainConfig().replace(read_options(tmp_path / "config.toml")).scale == 64.0
    (tmp_path / "config.toml").write_text("scale = \n")
    with pytest.raises(ValueError, match=r"config\.toml cannot be read: .*line 1"):
        read_options(tmp_path / "config.toml")


def test_margins_as_text() -> None:
    every = (
        fa.ArcFace(0.3, "fold"),
        fa.CosFace(0.2),
        fa.SphereFace(2.0),
        fa.CombinedMargin(1.0, 0.3, 0.2),
        fa.NormSoftmax(),
    )
    every += (fa.MVSoftmax(fa.CosFace(0.2), t=1.2, kind="fixed"), fa.InterclassFilter(fa.ArcFace(0.3), 0.5))
    for margin in every:
        assert parse_margin(repr(margin)) == margin
    assert parse_margin("arcface(0.3, boundary='fold')") == every[0]
    for module in (
        fa.AdaFace(0.3),
        fa.ElasticFace(std=0.1),
        fa.CurricularFace(),
    ):  # modules are equal to themselves only
        assert repr(parse_margin(repr(module))) == repr(module)
    assert parse_margin("torch:tanh") is torch.tanh
    for text, message in (
        ("PartialFC", "margin must be one of .*ArcFace, .*or MODULE:NAME; got .PartialFC"),
        ("ArcFace(m=1)", "unexpected keyword"),
        ("ArcFace(__import__('os'))", "margin must be one of"),
        ("ArcFace([].append)", "malformed node"),
        ("1 +", "margin '1 \\+'"),
        ("torch:nothing", "cannot be imported"),
        ("torch:pi", "of a callable"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_margin(text)


def test_schedules() -> None:
    cosine = [Schedule(100, "cosine", warm_up=0.2).factor(step) for step in range(100)]
    assert cosine[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert cosine[20] == 1 and cosine[60] == pytest.approx(0.5) and 0 < cosine[-1] < 0.001
    assert [Schedule(4, "polynomial", 2.0, 0.0).factor(step) for step in range(4)] == [1, 9 / 16, 1 / 4, 1 / 16]
    assert {Schedule(4, "constant", warm_up=0).factor(step) for step in range(9)} == {1}
    assert all(Schedule(1, kind, warm_up=1.0).factor(0) == 1 for kind in ("cosine", "polynomial", "constant"))


def test_batches_cover_an_epoch_and_are_those_of_the_seed() -> None:
    plan = BatchPlan(num_images=23, batch_size=5, seed=3, flip=True)
    assert plan.steps_per_epoch == 4
    for epoch in (0, 1):
        items = [item for batch in plan.epoch(epoch) for item in batch]
        assert len({item.place for item in items}) == 20 and {item.mirrored for item in items} == {True, False}
    assert plan.epoch(0) == plan.epoch(0) != plan.epoch(1)
    assert plan.epoch(0) != BatchPlan(23, 5, 4, True).epoch(0)
    every = list(plan.from_step(0, 10, slice(0, 5)))
    assert every == [*plan.epoch(0), *plan.epoch(1), *plan.epoch(2)[:2]]
    assert list(plan.from_step(3, 10, slice(2, 4))) == [batch[2:4] for batch in every[3:]]
    few = BatchPlan(num_images=3, batch_size=5, seed=0, flip=False)
    assert few.steps_per_epoch == 1 and len(few.epoch(0)[0]) == 3
