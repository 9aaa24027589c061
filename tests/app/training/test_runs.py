"""The folder of a run: begun or gone on with by one command, kept to its data, missed when it is gone."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.image_files import encoded, picture, write_folder, write_records
from support.training_runs import TINY, losses, run

from fused_arcface.app.cli import run as run_command
from fused_arcface.app.data import open_source
from fused_arcface.app.training import best
from fused_arcface.app.training.events import Event, Stepped
from fused_arcface.app.training.fingerprint import Fingerprint
from fused_arcface.app.training.outcomes import TrainingError, TrainingOutcome
from fused_arcface.app.training.runs import RunError
from fused_arcface.app.training.trainer import train
from fused_arcface.base.files import write_bytes

KINDS = (("L", 20, 20, "png"),)


@pytest.mark.slow
def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As torchrun --max-restarts repeats it."""
    output = tmp_path / "a run"
    options = ["--data", "identities:4x4", "--batch-size", "8", "--image-size", "16", "--workers", "0"]
    command = ["train", *options, "--output", str(output), "--epochs", "1", "--resume", "auto"]
    assert run_command(["train", *options, "--output", str(output), "--resume"]) == 2  # without auto: there is none
    made = f"fused-arcface train --data DATA --output {shlex.quote(str(output))}\n"
    assert f"does not exist; make a run with: {made}" in capsys.readouterr().err
    assert not output.exists()
    assert run_command(command) == 0
    assert "resumed" not in capsys.readouterr().out
    assert run_command([*command[:-1], "auto", "--epochs", "2"]) == 0
    assert "resumed after step 2 of 4" in capsys.readouterr().out
    assert run_command([*command, "--batch-size", "6"]) == 2
    assert "a resumed run keeps its batch_size, 8; got 6" in capsys.readouterr().err
    assert run_command([*command[:-1], "always"]) == 2
    (output / "config.toml").unlink()  # checkpoints are not overwritten by a new run
    assert run_command(command) == 2
    assert "has checkpoints but no config.toml: put it back and --resume" in capsys.readouterr().err
    (output / "config.toml").touch()  # as a full disk left it in versions before this one
    assert run_command(command) == 2
    assert "config.toml: it names no data, so it is damaged or not of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_auto_takes_what_a_kill_has_left_of_a_beginning(tmp_path: Path) -> None:
    config = TINY.replace({"epochs": 1})
    run(config, tmp_path / "whole")
    (tmp_path / "run").mkdir()
    for name in ("run.lock", "classes.txt", "data.json"):  # as they are written: the options last
        (tmp_path / "run" / name).touch()
        outcome = train(config, tmp_path / "run", resume="auto", listener=lambda event: None)
        assert outcome == TrainingOutcome(3, 3) and losses(tmp_path / "run") == losses(tmp_path / "whole")
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        (tmp_path / "run" / "config.toml").unlink()


@pytest.mark.parametrize("form", ["folder", "records"])
def test_a_resumed_run_keeps_its_images(tmp_path: Path, form: str) -> None:
    if form == "folder":
        root = write_folder(tmp_path / "faces", 4, 4, KINDS)
        image, other = root / "person_002" / "01.png", encoded(picture(50, 3))
        changed = root / "person_001"
    else:
        root = write_records(tmp_path / "faces", 4, 4)
        image = changed = root / "train.rec"
        content = bytearray(image.read_bytes())
        content[content.index(b"\xff\xda") + 30] ^= 1  # within an image's data
        other = bytes(content)
    config = TINY.replace({"data": str(root), "epochs": 1, "image_size": 16})
    run(config, tmp_path / "run", stop_at=1)
    before = image.read_bytes()
    image.write_bytes(other)
    match = re.escape(f"a resumed run keeps its data; {root} has other bytes than the run began with: ")
    match += "[0-9a-f]+ then, [0-9a-f]+ now"
    with pytest.raises(RunError, match=match):
        run(config, tmp_path / "run", resume=True)
    image.write_bytes(before)
    assert run(config, tmp_path / "run", resume=True)[0].step == 2
    image.write_bytes(other)
    (tmp_path / "run" / "data.json").unlink()  # as the message says
    assert run(config.replace({"epochs": 2}), tmp_path / "run", resume=True)[0].step == 4
    assert changed.exists()


def test_the_fingerprint_is_of_names_labels_and_bytes(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "faces", 3, 3, KINDS)

    def of() -> Fingerprint:
        return Fingerprint.of(open_source(str(root)))

    first = of()
    assert (first.images, first.identities) == (9, 3) and first.difference(of()) is None
    assert Fingerprint.from_json(first.to_json()) == first
    shutil.copytree(root, tmp_path / "moved")
    shutil.rmtree(root)
    (tmp_path / "moved").rename(root)  # neither the place nor the time counts
    assert of() == first
    (root / "person_001").rename(root / "person_0015")
    assert first.difference(of()) == "names"
    (root / "person_0015").rename(root / "person_001")
    (root / "person_001" / "00.png").write_bytes(b"")
    assert first.difference(of()) == "bytes"
    (root / "person_001" / "00.png").unlink()
    assert first.difference(of()) == "images"
    for text in ("", "[]", "{}", "nonsense"):
        with pytest.raises(ValueError):  # noqa: PT011 - of whatever kind
            Fingerprint.from_json(text)


@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_that_is_removed_ends_the_run(tmp_path: Path, anew: bool) -> None:
    output = tmp_path / "run"

    def remove(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 4:
            shutil.rmtree(output)
            if anew:
                output.mkdir()

    with pytest.raises(TrainingError, match=re.escape(f"{output} was removed or replaced while the run trained in it")):
        train(TINY, output, listener=remove)
    assert not output.exists() or not list(output.iterdir())  # and no half of a run is left in its place


@pytest.mark.slow
def test_a_folder_moved_away_and_back_goes_on(tmp_path: Path) -> None:
    output, away = tmp_path / "run", tmp_path / "away"

    def move(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            output.rename(away)

    command = f"fused-arcface train --output {shlex.quote(str(output))} --resume"
    with pytest.raises(TrainingError, match=re.escape(f"resume with: {command}")):
        train(TINY, output, listener=move)
    away.rename(output)
    run(TINY, tmp_path / "whole")
    assert run(TINY, output, resume=True)[0] == TrainingOutcome(9, 9)
    assert losses(output) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(path: Path, data: bytes) -> None:
        if path.name == "model.pt":
            raise OSError(28, "No space left on device", str(path))
        write_bytes(path, data)

    output = tmp_path / "run"
    TINY.save(tmp_path / "options.toml")
    command = ["train", "--config", str(tmp_path / "options.toml"), "--output", str(output), "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(best, "write_bytes", refuse)
        assert run_command(command) == 1
    said = capsys.readouterr().err
    assert f"{output / 'model.pt'} cannot be written: No space left on device; make room there and resume with:" in said
    assert f"fused-arcface train --output {shlex.quote(str(output))} --resume" in said
    assert run_command(command) == 0 and (output / "model.pt").exists()
