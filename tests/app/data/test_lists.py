"""List files: ``path label``."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("PIL")

from PIL import Image

from fused_arcface.app.data import DataError, ImageSpec, open_source
from fused_arcface.app.data.pair_sets import read_labeled, read_pair_set

SPEC = ImageSpec(4, 1)


def write(root: Path, text: str, name: str = "list.txt", **images: int) -> str:
    """Write a list and gray images, by the names of their files without suffix."""
    for image, level in images.items():
        Image.new("L", (5, 5), level).save(root / f"{image}.png")
    (root / name).write_bytes(text.encode())
    return str(root / name)


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.lst", "LIST.LIST"])
@pytest.mark.parametrize("separator", [" ", "\t", ",", "  "])
def test_paths_and_labels(name: str, separator: str, tmp_path: Path) -> None:
    text = f"a.png{separator}10\r\n\nb.png{separator}9\nc.png{separator}10"
    found = open_source(write(tmp_path, text, name, a=0, b=127, c=255))
    assert found.names == ["9", "10"] and found.labels.tolist() == [0, 1, 1] and found.problems == []
    assert [round(found.read(index, SPEC).mean().item(), 1) for index in range(3)] == [0.0, -1.0, 1.0]


def test_names_with_spaces_and_labels_that_are_names(tmp_path: Path) -> None:
    found = read_labeled(
        write(tmp_path, "my photo.png Ann\n" + str(tmp_path / "b.png") + " 许\n", **{"my photo": 1, "b": 2})
    )
    assert found.names == ["Ann", "许"] and found.paths == [str(tmp_path / "my photo.png"), str(tmp_path / "b.png")]


@pytest.mark.parametrize("separator", [",", "\t", ", "])
def test_quoted_fields_as_programs_write_them(separator: str, tmp_path: Path) -> None:
    text = f'path{separator}label\n"a, 1.png"{separator}"Müller, Ann"\n"b.png"{separator}"says ""hi"""\n'
    found = open_source(write(tmp_path, text, "list.csv", **{"a, 1": 0, "b": 1}))
    assert found.names == ["Müller, Ann", 'says "hi"'] and [problem[-15:] for problem in found.problems] == [
        "path is missing"
    ]
    (tmp_path / "pairs.csv").write_text(f'"a, 1.png"{separator}"b.png"{separator}"0"\n')
    assert read_pair_set(str(tmp_path / "pairs.csv")).pairs.same.tolist() == [False]


def test_lines_that_are_not_used_are_told(tmp_path: Path) -> None:
    found = open_source(write(tmp_path, "a.png 1\nnone.png 1\na.png 2\nb.png 2\n", a=0, b=0))
    assert found.labels.tolist() == [0, 1] and [text.split(", line ")[1] for text in found.problems] == [
        f"2: {tmp_path / 'none.png'} is missing",
        f"3: {tmp_path / 'a.png'} is named again",
    ]
    many = open_source(write(tmp_path, "a.png 1\n" + "none.png 1\n" * 1000, a=0)).problems
    assert len(many) == 21 and many[-1].endswith("980 more lines are not used")


@pytest.mark.parametrize("line", ["a.png", "0\t1.0\ta.png", "a.png,1,2"])
def test_a_line_of_another_kind_is_refused_by_its_number(line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list\.txt, line 2: must be `path label`; got "):
        open_source(write(tmp_path, f"a.png 1\n{line}\n", a=0))


def test_a_list_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list\.txt names no image that is there: .*line 1: .*none\.png is missing"):
        open_source(write(tmp_path, "none.png 1\n"))
    with pytest.raises(DataError, match=r"no\.lst does not exist$"):
        open_source(str(tmp_path / "no.lst"))


def test_pairs_are_made_of_a_list(tmp_path: Path) -> None:
    data = write(tmp_path, "a.png 1\nb.png 1\nc.png 2\n", "people.lst", a=0, b=0, c=0)
    pairs = read_pair_set(data).pairs
    assert pairs is not None and sorted(pairs.same.tolist()) == [False, True]
