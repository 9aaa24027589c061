"""A training measures time, and does not depend on it."""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path

import pytest

from fused_arcface.app.training.config import TrainConfig
from fused_arcface.app.training.runs import RunFolder
from fused_arcface.app.training.trainer import train


@pytest.mark.parametrize("pace", [0, -1])
def test_a_clock_that_stands_still_or_goes_back(pace: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr("time.perf_counter", lambda: 5.0 + pace * next(ticks))
    config = TrainConfig(data="identities:4x4", epochs=1, batch_size=8, image_size=32, workers=0)
    assert train(config, tmp_path / "run").step == 2
    lines = [json.loads(line) for line in RunFolder(tmp_path / "run").log.read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    assert len(rates) == 2 and all(0 < rate < math.inf for rate in rates)
