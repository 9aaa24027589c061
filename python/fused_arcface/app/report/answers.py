"""The nearest gallery image of each probe: the scores in the report of an identification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fused_arcface.evaluation import Identification

from ..predictions import Search
from .digest import HARDEST, histograms, measure
from .document import Comparison, Thumbnail


@dataclass(frozen=True)
class Answers:
    """The nearest gallery images of N probes."""

    probes: list[str]
    """(N,) names."""
    matches: list[str]
    """(N,) names of the nearest gallery images."""
    scores: npt.NDArray[np.float64]
    """(N,) cosines, or negated distances."""
    right: npt.NDArray[np.bool_]
    """(N,) the match shows the probe's person."""
    known: npt.NDArray[np.bool_]
    """(N,) the gallery has the probe's person."""
    cosine: bool

    def histograms(self) -> tuple[npt.NDArray[np.float64], dict[str, list[int]]]:
        """Return edges (bins + 1,), and the number of probes in each bin by how they were answered."""
        wrong = self.known & ~self.right
        kinds = {"right person": self.right, "another person": wrong, "not in the gallery": ~self.known}
        return histograms(self.scores, self.cosine, kinds)

    def hardest(self, thumbnail: Callable[[str], Thumbnail], count: int = HARDEST) -> list[Comparison]:
        """Return probes that were taken for another person, most alike first, then those of unknown people."""
        order = np.argsort(-self.scores, kind="stable")
        wrong = self.known & ~self.right
        found = []
        for kind, name in ((wrong, "another person"), (~self.known, "not in the gallery")):
            for place in order[kind[order]][:count]:
                caption = f"{name}, {measure(float(self.scores[place]), self.cosine)}"
                found.append(Comparison(thumbnail(self.probes[place]), thumbnail(self.matches[place]), caption))
        return found


def answers_of(search: Search, found: Identification, cosine: bool) -> Answers:
    """Return the nearest gallery images that an identification has found; ``cosine`` if by the cosine distance."""
    scores = 1 - found.distances if cosine else -found.distances
    return Answers(
        search.probe_paths,
        [search.gallery_paths[row] for row in found.nearest.tolist()],
        scores.double().numpy(),
        (search.gallery_labels[found.nearest] == search.probe_labels).numpy(),
        torch.isin(search.probe_labels, search.gallery_labels).numpy(),
        cosine,
    )
