"""Suggestions for names and paths that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_arcface.app.data import open_source
from fused_arcface.app.training.config import TrainConfig
from fused_arcface.base.reading import DataError
from fused_arcface.base.suggest import did_you_mean, missing_path


def test_the_nearest_name_is_suggested() -> None:
    assert did_you_mean("Iresnet5O", ["iresnet18", "iresnet50"]) == "; did you mean iresnet50?"
    assert did_you_mean("zzz", ["iresnet18", "iresnet50"]) == did_you_mean("a", []) == ""


def test_a_missing_path_names_what_is_missing_of_it(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    assert missing_path(tmp_path / "facse") == f"{tmp_path / 'facse'} does not exist; did you mean faces?"
    inner = tmp_path / "elsewhere" / "faces" / "a.jpg"
    assert missing_path(inner) == f"{inner} does not exist: there is no folder {tmp_path / 'elsewhere'}"


def test_data_that_does_not_exist_says_so(tmp_path: Path) -> None:
    (tmp_path / "faces.rec").touch()
    with pytest.raises(DataError, match=r"faces\.rce does not exist; did you mean faces\.rec\?$"):
        open_source(str(tmp_path / "faces.rce"))


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"backbone": "resnet50"}, "iresnet50"),
        ({"margin": "ArcFase(0.4)"}, "ArcFace"),
        ({"batchsize": 9}, "batch_size"),
    ],
)
def test_options_suggest_the_name_that_was_meant(options: dict[str, object], meant: str) -> None:
    with pytest.raises(ValueError, match=rf"; did you mean {meant}\?$"):
        TrainConfig().replace(options)
