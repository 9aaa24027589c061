"""Sets of templates, as insightface packs IJB-B and IJB-C for its evaluation.

::

    IJBC/loose_crop/1.jpg …                       the faces
    IJBC/meta/ijbc_face_tid_mid.txt               `image template medium`, a line for each face
    IJBC/meta/ijbc_name_5pts_score.txt            `image x1 y1 … x5 y5 score`, the same faces in this order; optional
    IJBC/meta/ijbc_template_pair_label.txt        `template template 0|1`, the pairs of 1:1
    IJBC/meta/ijbc_1N_gallery_G1.csv, _G2.csv     a heading, then `template,subject,…`: two galleries for 1:N; IJB-B
                                                  calls them S1 and S2
    IJBC/meta/ijbc_1N_probe_mixed.csv             the same of the probes
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fused_arcface.base.reading import DataError, NoSuchData, file_errors, open_regular, read_lines
from fused_arcface.base.suggest import missing_path
from fused_arcface.base.text import is_whole
from fused_arcface.evaluation.pairs import Pairs

from ..images import MAX_PIXELS, ImageSpec, read_image
from ..sources import ImageSet

_FACES = "_face_tid_mid.txt"
_DETECTED = "_name_5pts_score.txt"
_PAIRS = "_template_pair_label.txt"
_GALLERY, _PROBES = "_1N_gallery_", "_1N_probe_mixed.csv"
_NUMBERS = 11  # ten coordinates and a score


@dataclass(frozen=True)
class Subjects:
    """Templates and whom they show."""

    templates: Tensor
    """(K,) int64, each once."""
    subjects: Tensor
    """(K,) int64."""


@dataclass(frozen=True)
class TemplateSet:
    """A set of templates and what is to be compared."""

    name: str
    """The beginning of the files' names, ``ijbc`` for example."""
    images: ImageSet
    """M faces; their paths are as the list of faces has them."""
    templates: Tensor
    """(M,) int64, the template of each face."""
    media: Tensor
    """(M,) int64, the photo or video of each face."""
    scores: Tensor | None
    """(M,) fp32, the detector's score of each face, if the set has them."""
    pairs: Pairs | None
    """The pairs of 1:1 by the numbers of their templates, if the set has them."""
    galleries: dict[str, Subjects]
    """The galleries of 1:N by name, ``G1`` for example; empty if the set has none."""
    probes: Subjects | None
    """The probes of 1:N, if the set has galleries."""


def read_templates(data: str, max_pixels: int = MAX_PIXELS) -> TemplateSet:
    """Open a set of templates. Images are looked for in ``loose_crop``, lists in ``meta`` or in the folder itself.

    If the set has landmarks, faces are aligned by them; see :func:`fused_arcface.app.data.alignment.align`.

    Raises:
        DataError: if the folder has no such lists, or a list is not what it should be; the message names the place.
    """
    root = Path(data)
    if not root.exists():
        raise NoSuchData(missing_path(data))
    meta = root / "meta" if (root / "meta").is_dir() else root
    name, faces = _list_of_faces(root, meta)
    files, templates, media = _read_faces(faces)
    detected = meta / f"{name}{_DETECTED}"
    landmarks, scores = _read_detected(detected, files, faces) if detected.is_file() else (None, None)
    images = root / "loose_crop" if (root / "loose_crop").is_dir() else root
    pairs = meta / f"{name}{_PAIRS}"
    listed = [file for file in sorted(meta.glob(f"*{_GALLERY}*.csv")) if file.name.startswith(name + _GALLERY)]
    galleries = {file.stem.removeprefix(name + _GALLERY): _read_subjects(file) for file in listed}
    probes = meta / f"{name}{_PROBES}"
    if bool(galleries) != probes.is_file():
        have, lack = (f"{name}{_GALLERY}*.csv", probes.name) if galleries else (probes.name, f"{name}{_GALLERY}*.csv")
        raise DataError(f"{meta} has {have}, but no {lack}: 1:N needs both")
    if not galleries and not pairs.is_file():
        raise DataError(f"{meta} must have {pairs.name} for 1:1, or galleries and probes for 1:N; it has neither")
    return TemplateSet(
        name,
        ImageSet(files, partial(_read_face, images, files, landmarks, max_pixels)),
        templates,
        media,
        scores,
        _read_pairs(pairs) if pairs.is_file() else None,
        galleries,
        _read_subjects(probes) if galleries else None,
    )


def _read_face(
    folder: Path,
    files: list[str],
    landmarks: npt.NDArray[np.float32] | None,
    max_pixels: int,
    index: int,
    spec: ImageSpec,
) -> Tensor:
    points = landmarks[index].astype(np.float64) if landmarks is not None else None
    return read_image(folder / files[index], spec, max_pixels, points)


def _list_of_faces(root: Path, meta: Path) -> tuple[str, Path]:
    """Return the name of the set and its list of faces."""
    with file_errors(root):
        found = sorted(meta.glob(f"*{_FACES}"))
    if len(found) != 1:
        got = " and ".join(file.name for file in found) or "none"
        raise DataError(f"{root} must have one list of faces, meta/NAME{_FACES}, ijbc{_FACES} for example; got {got}")
    return found[0].name.removesuffix(_FACES), found[0]


def _read_faces(path: Path) -> tuple[list[str], Tensor, Tensor]:
    """Return names, templates and media of the faces."""
    names, numbers = [], []
    for number, line in read_lines(path):
        fields = line.rsplit(maxsplit=2)
        if len(fields) != 3 or not (is_whole(fields[1]) and is_whole(fields[2])):
            raise DataError(f"{path}, line {number}: must be `image template medium`; got {line[:100]!r}")
        names.append(fields[0].strip())
        numbers.append((int(fields[1]), int(fields[2])))
    if not names:
        raise DataError(f"{path} names no faces")
    templates, media = torch.tensor(numbers).T
    return names, templates.contiguous(), media.contiguous()


def _read_detected(path: Path, names: list[str], faces: Path) -> tuple[npt.NDArray[np.float32], Tensor]:
    """Return landmarks (M, 5, 2) and the detector's scores (M,), which must be of the same faces in the same order."""
    found = read_lines(path)
    if len(found) != len(names):
        raise DataError(f"{path} must have a line for each of the {len(names)} faces of {faces}; it has {len(found)}")
    numbers = np.empty((len(names), _NUMBERS), dtype=np.float32)
    for row, ((number, line), name) in enumerate(zip(found, names, strict=True)):
        fields = line.rsplit(maxsplit=_NUMBERS)
        try:
            numbers[row] = [float(field) for field in fields[1:]]
        except ValueError:  # a word, or too few fields
            numbers[row] = np.nan
        if len(fields) != 1 + _NUMBERS or not np.isfinite(numbers[row]).all():
            raise DataError(f"{path}, line {number}: must be `image x1 y1 … x5 y5 score`; got {line[:150]!r}")
        if fields[0].strip() != name:
            raise DataError(
                f"{path}, line {number}: must be the face {name}, as in {faces}; got {fields[0].strip()[:100]!r}"
            )
    return numbers[:, :-1].reshape(-1, 5, 2), torch.from_numpy(numbers[:, -1].copy())


def _read_pairs(path: Path) -> Pairs:
    first, second, same = _read_numbers(path, 3, None, 0)
    if not ((same == 0) | (same == 1)).all():
        raise DataError(
            f"{path}: the third number of a line must be 0 or 1; got {int(same[(same != 0) & (same != 1)][0])}"
        )
    if same.all() or not same.any():
        raise DataError(f"{path} must have pairs of both kinds")
    return Pairs(first, second, same.bool())


def _read_subjects(path: Path) -> Subjects:
    """Return the templates of a list that may have a line for each image of a template."""
    templates, subjects = _read_numbers(path, 2, ",", 1)
    both = torch.stack([templates, subjects]).unique(dim=1)
    if (double := both[0, 1:][both[0, 1:] == both[0, :-1]]).numel():
        raise DataError(f"{path}: a template must show one subject; template {int(double[0])} shows several")
    return Subjects(both[0].contiguous(), both[1].contiguous())


def _read_numbers(path: Path, columns: int, delimiter: str | None, heading: int) -> tuple[Tensor, ...]:
    """Return the first columns of a table of whole numbers, ``(rows,)`` each."""
    options: dict[str, Any] = {"usecols": range(columns), "delimiter": delimiter, "skiprows": heading}
    with open_regular(path) as file, file_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a file without lines, which is an error here
        # NumPy's own reader: a list of 15 million pairs takes seconds, a loop would take a minute.
        found = np.loadtxt(file, dtype=np.int64, ndmin=2, comments=None, encoding="utf-8", **options)
        if not len(found):
            raise DataError(f"{path} has no lines")
        return tuple(torch.from_numpy(column.copy()) for column in found.T)
