"""A margin and a scale that rise in a training run, also in one that is interrupted and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.training_runs import TINY, run

import fused_arcface as fa
from fused_arcface.app.cli import run as run_command
from fused_arcface.app.training.config import OptionError
from fused_arcface.app.training.schedule import parse_rise

RISING = TINY.replace(
    {"margin": "ArcFace(0.4)", "margin_schedule": "linear:1-3", "scale": 16, "scale_schedule": "exponential:2-3:0.25"}
)


def test_each_step_has_its_margin_and_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of three steps. The margin rises over the first two, the scale in the second, from a quarter."""
    seen: list[tuple[float, float]] = []
    forward = fa.PartialFC.forward

    def note(head: fa.PartialFC, *args: Any, **options: Any) -> Any:
        seen.append((head.margin.margin, head.scale))
        return forward(head, *args, **options)

    monkeypatch.setattr(fa.PartialFC, "forward", note)
    run(RISING, tmp_path, stop_at=5)
    run(RISING, tmp_path, resume=True)
    margins = [0.4 * part / 6 for part in range(6)] + [0.4] * 3
    scales = [4.0] * 3 + [16 * (0.25 + 0.75 * (1 - 0.001 ** (part / 3))) for part in range(3)] + [16.0] * 3
    assert [margin for margin, _ in seen] == pytest.approx(margins, abs=1e-12)
    assert [scale for _, scale in seen] == pytest.approx(scales, abs=1e-12)


def test_the_form_of_a_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_rise("exponential:20-40", 100) == fa.margins.Rise(1900, 3900)
    for text in ("20-40", "linear:20", "cosine:1-2", "linear:0-2", "linear:4-4", "linear:1-2:"):
        with pytest.raises(ValueError, match=r"^margin_schedule must"):
            TINY.replace({"margin_schedule": text})
    with pytest.raises(ValueError, match=r"^margin_schedule must have START from 0 to 1; got 'linear:1-2:2'$"):
        TINY.replace({"margin_schedule": "linear:1-2:2"})
    with pytest.raises(ValueError, match=r"^scale_schedule must begin above 0"):
        TINY.replace({"scale_schedule": "linear:1-2"})
    with pytest.raises(OptionError, match=r"a margin schedule needs ArcFace, .*; got AdaFace"):
        run(TINY.replace({"margin": "AdaFace", "margin_schedule": "linear:1-2"}), tmp_path / "run")
    command = ["train", "--data", "identities:6x4", "--output", str(tmp_path / "run"), "--margin-schedule", "fast"]
    assert run_command(command) == 2
    assert "must be exponential:FIRST-LAST or linear:FIRST-LAST" in capsys.readouterr().err.replace("\n", " ")
