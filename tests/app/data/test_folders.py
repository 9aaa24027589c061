"""Labeled folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fused_arcface.app.data import DataError, open_source, read_folder
from fused_arcface.app.data.unlabeled import read_images


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
        read_folder(tmp_path)
    with pytest.raises(DataError, match=r"has 1 image\(s\) but no folders of images: it must hold a folder"):
        read_folder(make(tmp_path, "loose.png"))


def test_links_and_pipes_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "ann/1.png", "bob/1.png", "bob/notes.txt", "bob/.2.png", "elsewhere.txt")
    os.mkfifo(tmp_path / "bob" / "pipe.jpg")
    (tmp_path / "ann" / "2.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "ann" / "3.png").symlink_to(tmp_path / "bob" / "1.png")
    (tmp_path / "ann" / "more").symlink_to(tmp_path / "bob")
    (tmp_path / "zoe").symlink_to(tmp_path / "gone")
    found = read_folder(tmp_path)
    assert [path.name for path, _ in found.files] == ["1.png", "3.png", "1.png"]
    assert found.problems == [f"{tmp_path / 'zoe'}: 4 image(s) or folder(s) that cannot be read or followed"]
    assert len(found.notes) == 1 and ": 2 file(s) that are no images by their name; not used" in found.notes[0]
    assert open_source(str(tmp_path)).notes == found.notes


def test_parts_of_a_data_set_are_no_identities(tmp_path: Path) -> None:
    make(tmp_path, *(f"{part}/{name}/1.png" for part in ("train", "Val") for name in ("ann", "bob")))
    with pytest.raises(DataError, match="holds Val and train, which hold the identities: name one of them"):
        read_folder(tmp_path)
    assert read_folder(tmp_path / "train").names == ["ann", "bob"]


def test_nested_identities_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "A/ann/1.png", "A/abe/1.png", "B/bob/1.png", "B/ben/1.png", "c/1.png")
    found = read_folder(tmp_path)
    assert found.names == ["A", "B", "c"] and found.problems == [
        f"{tmp_path}: 2 of 3 identities have their images in several folders of their own, as {tmp_path / 'A' / 'abe'}:"
        f" each folder of {tmp_path} counts as one identity"
    ]


def test_a_name_of_many_digits_is_a_name(tmp_path: Path) -> None:
    (tmp_path / ("9" * 200)).mkdir()
    make(tmp_path, "9" * 200 + "/1.png", "10/1.png")
    assert read_folder(tmp_path).names == ["10", "9" * 200]


def test_links_to_folders_are_told_when_images_are_embedded(tmp_path: Path) -> None:
    make(tmp_path, "flat/1.png", "flat/deep/2.png", "other/3.png")
    (tmp_path / "flat" / "deep" / "more").symlink_to(tmp_path / "other")
    found = read_images([str(tmp_path / "flat" / "1.png"), str(tmp_path / "flat" / "deep")])
    assert [Path(path).name for path in found.paths] == ["1.png", "2.png"]
    assert found.problems == [f"{tmp_path / 'flat' / 'deep' / 'more'}: 1 link(s) to folders, which are not followed"]
