"""The answers of an identification, a line for each probe: ``identify --predictions`` writes them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_arcface.base.files import replacing
from fused_arcface.base.text import encode
from fused_arcface.evaluation import Cosine, Distance, nearest
from fused_arcface.evaluation.search import Engine

MATCHES = 5
"""Gallery images that are listed for each probe, at most."""


class Search(NamedTuple):
    """Images of known people, and images to look for among them."""

    gallery: Tensor
    """(G, D), as they are compared."""
    gallery_labels: Tensor
    """(G,) int64."""
    probes: Tensor
    """(N, D)"""
    probe_labels: Tensor
    """(N,) int64; the same numbers for the same people."""
    gallery_paths: list[str]
    """(G,)"""
    probe_paths: list[str]
    """(N,)"""


def write_predictions(
    path: Path, search: Search, distance: Distance, engine: Engine = "auto", matches: int = MATCHES
) -> None:
    """Write a CSV file with a line for each probe: its name, and its nearest images of the gallery.

    The columns are ``image``; ``known``, yes if the gallery has the probe's person; and for each match ``match_1``, the
    image's name, ``right_1``, yes if it shows the same person, and ``score_1``, the negated distance (for the cosine
    distance the cosine).

    Raises:
        OSError: if the file cannot be written.
    """
    distances, rows = nearest(search.probes, search.gallery, min(matches, len(search.gallery)), distance, engine)
    scores = 1 - distances if isinstance(distance, Cosine) else -distances
    right = search.gallery_labels[rows] == search.probe_labels[:, None]
    known = torch.isin(search.probe_labels, search.gallery_labels)
    places = range(1, rows.shape[1] + 1)
    head = ["image", "known", *(f"{column}_{place}" for place in places for column in ("match", "right", "score"))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(csv_line(head))
        columns = (known.tolist(), rows.tolist(), right.tolist(), scores.tolist())
        for name, mated, *found in zip(search.probe_paths, *columns, strict=True):
            line = [name, _yes(mated)]
            for row, same, score in zip(*found, strict=True):
                line += [search.gallery_paths[row], _yes(same), f"{score:.6f}"]
            file.write(csv_line(line))


def csv_line(values: list[str]) -> bytes:
    r"""Return a line of a CSV file; names of files keep their own bytes.

    >>> csv_line(["a,b", "1"])
    b'"a,b",1\n'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return encode(text.getvalue())


def _yes(value: bool) -> str:
    return "yes" if value else "no"
