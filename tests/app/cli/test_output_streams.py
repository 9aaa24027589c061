"""Output that nobody reads, that no disk takes or that has no width: commands still do their work."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fused_arcface.app import cli
from fused_arcface.app.training.runs import RunFolder

TRAIN = "train --data identities:4x4 --epochs 2 --batch-size 8 --workers 0 --image-size 32 --no-report --output"
NO_ROOM = "The output cannot be written any more: No space left on device. The command goes on.\n"


@contextlib.contextmanager
def output_to(target: str) -> Iterator[None]:
    """Let standard output be a pipe that nobody reads, as after ``| head -0``, or a file by its name."""
    if target == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(target, os.O_WRONLY)
    with open(writer, "w") as stream, contextlib.redirect_stdout(stream):
        yield


@pytest.mark.parametrize(("target", "note"), [("pipe", ""), ("/dev/full", NO_ROOM)])
def test_a_training_ends_whatever_becomes_of_its_output(
    target: str, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if target != "pipe" and not os.path.exists(target):
        pytest.skip(f"no {target} here")
    with output_to(target):
        assert cli.run([*TRAIN.split(), str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err == note
    folder = RunFolder(tmp_path / "run")
    steps = [line["step"] for line in map(json.loads, folder.log.read_text().splitlines())]
    # 2 epochs of 16 images in steps of 8.
    assert folder.model.is_file() and max(steps) == 4


def save_embeddings(file: Path) -> list[str]:
    """Write two equal embeddings of each of four people, and return the command that verifies them."""
    np.savez(file, embeddings=np.eye(4, dtype=np.float32).repeat(2, 0), labels=np.arange(4).repeat(2))
    return ["verify", "--embeddings", str(file), "--folds", "2", "--no-report"]


def test_files_are_written_without_a_reader_of_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    with output_to("pipe"):
        assert cli.run([*save_embeddings(tmp_path / "embeddings.npz"), "--json", str(figures)]) == 0
    assert capsys.readouterr().err == ""
    assert json.loads(figures.read_text())["accuracy"] == 1.0


@pytest.mark.parametrize("width", ["0", "7"])
def test_a_width_in_which_nothing_fits_is_not_taken(
    width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert cli.run(["doctor"]) == 0
    assert "backends" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", width)
    assert cli.run(["verify", "--help"]) == 0
    assert "--checkpoint" in capsys.readouterr().out


def test_a_narrow_table_keeps_its_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.run(save_embeddings(tmp_path / "embeddings.npz")) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and "equal error rate" in shown
