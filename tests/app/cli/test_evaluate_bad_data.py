"""``verify`` and ``identify`` on files that they cannot use: each is named, and skipped or refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image
from support.evaluated_people import IMAGES, embedded, figures, save_pairs, write_people

from fused_arcface.app.cli import run
from fused_arcface.app.data.embedding_sets import EmbeddingSet


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    write_people(root)
    return root


def test_an_image_that_cannot_be_read_is_named(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for person in ("a", "b"):
        (tmp_path / person).mkdir()
        for number in (1, 2):
            (tmp_path / person / f"{number}.png").write_bytes(b"no image")
    assert run(["verify", "--data", str(tmp_path), "--checkpoint", str(files / "run"), "--folds", "2"]) == 1
    assert f"{tmp_path / 'a' / '1.png'} cannot be read as an image" in capsys.readouterr().err


def test_what_is_wrong_with_labeled_images_is_said(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = files / "people" / "person without images"
    empty.mkdir()
    try:
        for name in ("verify", "identify"):
            assert run([name, "--data", str(files / "people"), "--checkpoint", str(files / "run")]) == 0
            shown = capsys.readouterr()
            assert shown.err.splitlines() == [f"{empty}: an identity without images; skipped"]
    finally:
        empty.rmdir()


def broken_people(files: Path, root: Path) -> Path:
    """A copy of six people whose third has an image that is none, and whose fourth has a link to nothing."""
    for person in range(6):
        shutil.copytree(files / "people" / f"person {person:02d}", root / f"person {person:02d}")
    (root / "person 02" / f"{2 * IMAGES}.png").write_bytes(b"no image")
    (root / "person 03" / f"{3 * IMAGES}.png").unlink()
    (root / "person 03" / f"{3 * IMAGES}.png").symlink_to(root / "nothing.png")
    return root


@pytest.mark.parametrize("name", ["verify", "identify"])
@pytest.mark.slow
def test_bad_data_is_skipped_or_stops(
    name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = broken_people(files, tmp_path / "people")
    arguments = [name, "--data", str(root), "--checkpoint", str(files / "run"), "--workers", "1"]
    assert run([*arguments, "--save-embeddings", str(tmp_path / "e.npz")]) == 0
    shown = capsys.readouterr().err.splitlines()
    bad, gone = root / "person 02" / f"{2 * IMAGES}.png", root / "person 03" / f"{3 * IMAGES}.png"
    assert shown[0] == f"{gone}: 1 image(s) or folder(s) that cannot be read or followed; skipped"
    assert shown[1].startswith(f"{bad} cannot be read as an image") and shown[1].endswith("; skipped")
    assert shown[2].startswith("left out: 1 of 29 images cannot be read")
    kept = EmbeddingSet.load(tmp_path / "e.npz")
    embeddings, labels = embedded(files)
    own = torch.tensor([i for i in range(6 * IMAGES) if i not in (2 * IMAGES, 3 * IMAGES)])
    torch.testing.assert_close(kept.embeddings, embeddings[own])
    assert kept.labels is not None and kept.labels.equal(labels[own])
    if name == "verify":  # each pair is still of the images that its label speaks of
        assert kept.pairs is not None and "pairs are not scored" in shown[2]
        assert (kept.labels[kept.pairs.first] == kept.labels[kept.pairs.second]).equal(kept.pairs.same)
    assert run([*arguments, "--bad-data", "stop"]) == 1
    assert (
        capsys.readouterr().err.strip()
        == f"{shown[0].removesuffix('; skipped')}; bad_data is stop, so this is an error"
    )
    gone.unlink()
    assert run([*arguments, "--bad-data", "stop"]) == 1
    assert capsys.readouterr().err.startswith(f"{bad} cannot be read as an image")
    assert run([*arguments, "--bad-data", "hope"]) == 2


def test_a_file_of_pairs_with_missing_images(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"person {i:02d}/{IMAGES * i}.png\tperson {i:02d}/{IMAGES * i + 1}.png\t1\n" for i in range(10)]
    lines += [f"person {i:02d}/{IMAGES * i}.png\tperson {i + 1:02d}/{IMAGES * i + 5}.png\t0\n" for i in range(10)]
    lines.insert(3, "person 00/0.png\tperson 00/gone.png\t1\n")
    (tmp_path / "pairs.txt").write_text("".join(lines))
    arguments = ["verify", "--data", str(tmp_path / "pairs.txt"), "--images", str(files / "people")]
    arguments += ["--checkpoint", str(files / "run")]
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "pairs.txt, line 4: " in shown.err and shown.err.rstrip().endswith("gone.png is missing; skipped")
    assert {"pairs of one person 10", "pairs of two people 10"} <= set(figures(shown.out))
    assert run([*arguments, "--bad-data", "stop"]) == 1


def test_names_from_files_do_not_reach_the_terminal_raw(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = broken_people(files, tmp_path / "people")
    os.rename(root / "person 02", root / "\x1b]0;owned\x07\x1b[2J[red]")
    assert run(["verify", "--data", str(root), "--checkpoint", str(files / "run")]) == 0
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\x07" not in shown and r"\x1b]0;owned\x1b[2J[red]" in shown
    name = tmp_path / "\x1b[1m[bold].npz"
    save_pairs(name, [True, False] * 6)
    assert run(["verify", "--embeddings", str(name)]) == 0
    assert r"\x1b[1m[bold].npz" in capsys.readouterr().out


def test_pipes_do_not_hang(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("npz", "safetensors", "txt", "bin", "toml", "pt"):
        os.mkfifo(tmp_path / f"x.{suffix}")
    checkpoint, output = ("--checkpoint", str(files / "run")), ("--output", str(tmp_path / "run"))
    train = ["train", "--data", "identities:4x4", "--image-size", "16", *output]
    for arguments in (
        ["verify", "--embeddings", str(tmp_path / "x.npz")],
        ["identify", "--embeddings", str(tmp_path / "x.safetensors")],
        ["verify", "--data", str(tmp_path / "x.txt"), *checkpoint],
        ["verify", "--data", str(tmp_path / "x.bin"), *checkpoint],
        [*train, "--config", str(tmp_path / "x.toml")],
        [*train, "--init", str(tmp_path / "x.pt")],
        ["convert", str(tmp_path / "x.pt"), str(tmp_path / "y.safetensors")],
        ["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")],
    ):
        assert run(arguments) in (1, 2)
        assert "must be a regular file; it is a named pipe" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["people", "people.bin", "pairs.txt"])
def test_verify_has_a_pixel_limit(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str) -> None:
    for number in (0, 1):
        Image.new("L", (32, 32)).save(tmp_path / f"{number}.png")
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("0.png 0.png 1\n0.png 1.png 0\n" * 10)
    read = str(pairs if data == "pairs.txt" else files / data)
    assert run(["verify", "--data", read, "--checkpoint", str(files / "run"), "--max-pixels", "1023"]) == 1
    assert "must have at most max_pixels=1023 pixels; got 32 × 32" in capsys.readouterr().err


def test_identify_has_a_pixel_limit(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people, checkpoint = str(files / "people"), str(files / "run")
    assert run(["identify", "--data", people, "--checkpoint", checkpoint, "--max-pixels", "1023"]) == 1
    assert "must have at most max_pixels=1023 pixels; got 32 × 32" in capsys.readouterr().err
