"""Labelled folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_arcface.data import DataError, read_folder


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_identities_in_order_of_their_names(tmp_path: Path) -> None:
    found = read_folder(make(tmp_path, "b/2.PNG", "b/1.jpeg", "a/x/deep.bmp", "a/notes.txt", "a/.hidden.png"))
    assert [(str(path.relative_to(tmp_path)), identity) for path, identity in found.files] == [
        ("a/x/deep.bmp", 0),
        ("b/1.jpeg", 1),
        ("b/2.PNG", 1),
    ]
    assert found.names == ["a", "b"] and found.num_identities == 2 and found.problems == []


def test_numbers_are_sorted_by_value_and_gaps_reported(tmp_path: Path) -> None:
    found = read_folder(make(tmp_path, "10/a.png", "9/a.png", "2/a.png", "1/a.png"))
    assert found.names == ["1", "2", "9", "10"]
    assert found.problems == [f"{tmp_path}: no folder 3 to 8 between 2 and 9"]
    assert read_folder(make(tmp_path / "x", "1/a.png", "3/a.png")).problems[0].endswith("no folder 2 between 1 and 3")


def test_empty_identities_and_loose_images_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "ann/1.png", "cid/1.png", "loose.png")
    (tmp_path / "bob").mkdir()
    found = read_folder(tmp_path)
    assert found.names == ["ann", "cid"] and [identity for _, identity in found.files] == [0, 1]
    assert found.problems == [
        f"{tmp_path / 'loose.png'}: 1 image(s) outside any identity's folder",
        f"{tmp_path / 'bob'}: an identity without images",
    ]


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_folder(tmp_path / "missing")
    with pytest.raises(DataError, match="has no images: it must hold a folder for each identity"):
        read_folder(make(tmp_path, "loose.png"))
