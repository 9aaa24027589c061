"""Files of a run that others have written: used, or one named error; no traceback, no wait, no full memory."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.training_runs import TINY, losses, run

from fused_arcface.app.cli import run as run_command
from fused_arcface.app.thresholds import KeptThresholds, read_thresholds
from fused_arcface.app.training.lock import FolderLock
from fused_arcface.base.reading import DataError
from fused_arcface.evaluation.thresholds import OperatingPoint

CONFIG = TINY.replace({"epochs": 1})
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    run(CONFIG, root / "run")
    return root / "run"


def resumed(trained: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    return output, ["train", "--output", str(output), "--resume", "--epochs", "2"]


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n")


FILES = ("config.toml", "classes.txt", "log.jsonl", "model.pt", "best.pt", "thresholds.json", "best.json")


KINDS = {
    "must be a regular file; it is a named pipe": pipe,
    "must be a regular file; it is a device": endless,
    "must be a regular file; it is a folder": folder,
    "is a Git LFS pointer, not the file itself": pointer,
}


@pytest.mark.skipif(sys.platform != "linux", reason="pipes and devices of Linux")
@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("name", ["data.json", *(pytest.param(name, marks=pytest.mark.full) for name in FILES)])
def test_only_regular_files_are_read_and_written(
    trained: Path, tmp_path: Path, name: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output, command = resumed(trained, tmp_path)
    KINDS[what](output / name)
    assert run_command(command) == 2
    assert f"{output / name} {what}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fingerprint_that_is_none(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, command = resumed(trained, tmp_path)
    words = b'{"images": "6", "identities": 2, "names": "a", "labels": "b", "bytes": "c"}'
    for text in (b"", DEEP, b"[" * 60_000, b'{"a":' * 10_000, b"9" * 5000, b"\xff\xfe", b"null", b"[1, 2]", words):
        (output / "data.json").write_bytes(text)
        assert run_command(command) == 2
        said = capsys.readouterr().err
        file = re.escape(str(output / "data.json"))
        assert re.search(rf"{file} (cannot be read: |must have <= 65536 bytes)", said), said
        assert "remove it to continue without it" in said
    (output / "data.json").unlink()
    assert run_command(command) == 0


def test_lines_of_the_log_that_are_none_are_dropped(trained: Path, tmp_path: Path) -> None:
    output, command = resumed(trained, tmp_path)
    lines = [DEEP, b'{"step": 1e400}', b'{"step": ' + DEEP, b'{"step": "two"}', b"\xff", b"[]", b'{"step": ']
    with (output / "log.jsonl").open("ab") as log:
        log.write(b"\n".join(lines))
    assert run_command(command) == 0
    assert losses(output)[:3] == losses(trained) and len(losses(output)) == 6


KEPT = KeptThresholds("lfw.bin", 0.875, [OperatingPoint("best accuracy", 0.25, 0.125, 0.9, 0.875)], 6)


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": "x"},
        {"accuracy": None},
        {"accuracy": 10**400},
        {"accuracy": float("nan")},
        {"accuracy": True},
        {"data": 3},
        {"step": "z"},
        {"pairs_of_two": "z"},
        {"points": {}},
        {"points": [3]},
        {"points": [{"name": "best accuracy"}]},
        {"points": [{**vars(KEPT.points[0]), "threshold": "0.3"}]},
        {"points": [{**vars(KEPT.points[0]), "name": None}]},
    ],
    ids=str,
)
def test_thresholds_of_other_types_are_an_error(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "thresholds.json"
    KEPT.save(path)
    assert read_thresholds(path) == KEPT
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if change == {"points": {}}:
        assert read_thresholds(path).points == []  # as a list without any
        return
    with pytest.raises(DataError, match=r"thresholds\.json cannot be read: .*; remove the file to continue without"):
        read_thresholds(path)


def test_a_best_net_of_unreadable_accuracy_is_replaced(trained: Path, tmp_path: Path) -> None:
    """What compares accuracies takes none of another type."""
    output, _ = resumed(trained, tmp_path)
    KEPT.save(output / "best.json")
    (output / "best.json").write_text((output / "best.json").read_text().replace("0.875", '"high"'))
    config = CONFIG.replace({"epochs": 2, "verify_every": 1, "verify_data": "identities:8x3"})
    run(config, output, resume=True)
    kept = read_thresholds(output / "best.json")
    assert kept is not None and 0 <= kept.accuracy <= 1 and (output / "best.pt").is_file()


@pytest.mark.slow
def test_a_sparse_image_of_terabytes_is_a_bad_image(tmp_path: Path) -> None:
    from support.image_files import write_folder

    from fused_arcface.app.data import open_source
    from fused_arcface.app.training.fingerprint import Fingerprint

    root = write_folder(tmp_path / "faces", 2, 2)
    first = Fingerprint.of(open_source(str(root)))
    image = root / "person_001" / "00.png"
    content = image.read_bytes()
    with image.open("wb") as file:
        file.truncate(10**12)
    assert first.difference(Fingerprint.of(open_source(str(root)))) == "bytes"
    image.write_bytes(content)
    assert Fingerprint.of(open_source(str(root))) == first


def test_a_lock_whose_file_was_just_removed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process opened the file before its owner removed it: such a lock would hold nobody off."""
    lock, taken = fcntl.lockf, []

    def remove_before_the_first(file: int, how: int) -> None:
        if not taken:
            (tmp_path / "run.lock").unlink()
        taken.append(lock(file, how))

    monkeypatch.setattr(fcntl, "lockf", remove_before_the_first)
    with FolderLock(tmp_path) as folder:
        assert folder.is_in_place() and len(taken) == 2
