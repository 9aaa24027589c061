"""Sets of templates as files, and the alignment of their faces."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image
from support.template_files import landmarks_of, write_template_set

from fused_arcface.app.data import DataError, ImageError, ImageSpec, read_image
from fused_arcface.app.data.alignment import POINTS, align
from fused_arcface.app.data.formats.templates import read_templates
from fused_arcface.base.reading import NoSuchData


def naive_alignment(pixels: np.ndarray, landmarks: np.ndarray, size: int) -> np.ndarray:
    """Fit the four numbers of a similarity by least squares, and interpolate each pixel by hand. NaN at the border."""
    rows, values = [], []
    for (x, y), (u, v) in zip(landmarks, POINTS, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]  # u = a·x - b·y + c, v = b·x + a·y + d
        values += [u, v]
    a, b, c, d = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
    inverse = np.linalg.inv(np.array([[a, -b, c], [b, a, d], [0, 0, 1]]))
    result = np.full((size, size), np.nan)
    for row in range(size):
        for column in range(size):
            # The center of a pixel of the small image, as a place in the image of 112 pixels.
            place = [(column + 0.5) * 112 / size - 0.5, (row + 0.5) * 112 / size - 0.5, 1]
            x, y, _ = inverse @ place
            left, top = int(np.floor(x)), int(np.floor(y))
            if 0 <= left < pixels.shape[1] - 1 and 0 <= top < pixels.shape[0] - 1:
                right, below = x - left, y - top
                upper = pixels[top, left] * (1 - right) + pixels[top, left + 1] * right
                lower = pixels[top + 1, left] * (1 - right) + pixels[top + 1, left + 1] * right
                result[row, column] = upper * (1 - below) + lower * below
    return result


@pytest.mark.parametrize("size", [112, 40])
def test_faces_are_aligned_as_by_hand(size: int) -> None:
    noise = np.random.default_rng(0).random((150, 180)).astype(np.float32) * 255
    landmarks = landmarks_of(turn=0.3, zoom=0.9, shift=(38.0, 20.0)) + np.random.default_rng(1).normal(size=(5, 2))
    found = align(Image.fromarray(noise), landmarks, size)
    expected = naive_alignment(noise, landmarks, size)
    inside = ~np.isnan(expected)
    assert inside.mean() > 0.6 and found.shape == (size, size)
    np.testing.assert_allclose(found[inside], expected[inside], atol=0.02)


def test_a_face_that_is_aligned_stays_as_it_is_and_the_rest_is_black() -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (112, 112, 3), dtype=np.uint8)
    assert np.allclose(align(Image.fromarray(pixels), POINTS, 112), pixels, atol=1e-3)
    shifted = align(Image.fromarray(pixels), POINTS - [30, 0], 112)
    assert not shifted[:, :29].any() and np.allclose(shifted[:, 30:], pixels[:, :-30], atol=1e-3)


@pytest.mark.parametrize("landmarks", [np.ones((5, 2)), np.full((5, 2), np.nan), POINTS[:4]])
def test_landmarks_that_are_none_of_a_face(landmarks: np.ndarray, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png cannot be decoded as an image: landmarks must be"):
        read_image(tmp_path / "a.png", ImageSpec(16, 3), landmarks=landmarks)


def test_a_set_is_read_as_its_files_have_it(tmp_path: Path) -> None:
    root = write_template_set(tmp_path / "IJBC", people=4)
    found = read_templates(str(root))
    lists = (root / "meta" / "ijbc_face_tid_mid.txt").read_text().split()
    assert found.name == "ijbc" and found.images.paths == lists[::3]
    assert found.templates.tolist() == [int(each) for each in lists[1::3]]
    assert found.media.tolist() == [int(each) for each in lists[2::3]]
    assert found.scores is not None and 0 < found.scores.min() < found.scores.max() < 1
    assert found.pairs is not None and found.pairs.same.any() and not found.pairs.same.all()
    assert list(found.galleries) == ["G1", "G2"] and found.probes is not None
    gallery = found.galleries["G1"]
    assert gallery.templates.tolist() == sorted(set(gallery.templates.tolist()))  # the file has a line for each image
    aligned = found.images.read(0, ImageSpec(112, 1))
    (root / "meta" / "ijbc_name_5pts_score.txt").unlink()
    plain = read_templates(str(root))
    assert plain.scores is None and not torch.equal(plain.images.read(0, ImageSpec(112, 1)), aligned)


def test_lists_may_lie_beside_the_images(tmp_path: Path) -> None:
    root = write_template_set(tmp_path / "IJBB", people=4, name="ijbb", galleries=("S1", "S2"))
    for file in [*(root / "meta").iterdir(), *(root / "loose_crop").iterdir()]:
        file.rename(root / file.name)
    (root / "meta").rmdir()
    (root / "loose_crop").rmdir()
    found = read_templates(str(root))
    assert found.name == "ijbb" and list(found.galleries) == ["S1", "S2"]
    assert found.images.read(1, ImageSpec(20, 3)).shape == (3, 20, 20)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ijbc_face_tid_mid.txt", "1.jpg 5\n", "line 1: must be `image template medium`; got '1.jpg 5'"),
        ("ijbc_face_tid_mid.txt", "1.jpg 5 -6\n", "line 1: must be `image template medium`"),
        ("ijbc_face_tid_mid.txt", "\n", "names no faces"),
        ("ijbc_face_tid_mid.txt", None, "must have one list of faces, meta/NAME_face_tid_mid.txt, "),
        ("ijbc_name_5pts_score.txt", "1.jpg 1 2\n", "must have a line for each of the"),
        ("ijbc_template_pair_label.txt", "1 2\n", "cannot be read"),
        ("ijbc_template_pair_label.txt", "1 x 0\n", "cannot be read"),
        ("ijbc_template_pair_label.txt", "1 2 2\n", "the third number of a line must be 0 or 1; got 2"),
        ("ijbc_template_pair_label.txt", "1 2 0\n", "must have pairs of both kinds"),
        ("ijbc_template_pair_label.txt", "", "has no lines"),
        ("ijbc_1N_gallery_G2.csv", "T,S\n1,5\n1,6\n", "must show one subject; template 1 shows several"),
        ("ijbc_1N_gallery_G1.csv", "T,S\n", "has no lines"),
        ("ijbc_1N_probe_mixed.csv", None, "but no ijbc_1N_probe_mixed.csv: 1:N needs both"),
    ],
)
def test_wrong_lists_are_named(file: str, content: str | None, message: str, tmp_path: Path) -> None:
    path = write_template_set(tmp_path / "IJBC", people=4) / "meta" / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        read_templates(str(tmp_path / "IJBC"))


def test_faces_in_another_order_are_an_error(tmp_path: Path) -> None:
    root = write_template_set(tmp_path / "IJBC", people=4)
    path = root / "meta" / "ijbc_name_5pts_score.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"line 1: must be the face 1\.jpg, as in .*; got '2\.jpg'"):
        read_templates(str(root))
    path.write_text("\n".join([lines[0].rpartition(" ")[0] + " good", *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=r"line 1: must be `image x1 y1 … x5 y5 score`; got '1\.jpg"):
        read_templates(str(root))


def test_a_set_without_anything_to_compare(tmp_path: Path) -> None:
    meta = write_template_set(tmp_path / "IJBC", people=4) / "meta"
    for file in meta.glob("ijbc_1N_*"):
        file.unlink()
    assert read_templates(str(tmp_path / "IJBC")).probes is None
    (meta / "ijbc_template_pair_label.txt").unlink()
    with pytest.raises(DataError, match=r"must have ijbc_template_pair_label\.txt for 1:1, or galleries and probes"):
        read_templates(str(tmp_path / "IJBC"))
    with pytest.raises(NoSuchData, match="nothing does not exist"):
        read_templates(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must have one list of faces"):
        read_templates(str(tmp_path / "empty"))
