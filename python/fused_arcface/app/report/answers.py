"""The nearest gallery image of each probe: the scores in the report of an identification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fused_arcface.evaluation import Cosine, Distance, nearest
from fused_arcface.evaluation.search import Engine

from ..predictions import Search
from .digest import HARDEST, histograms, measure
from .document import Comparison, Thumbnail

MOST = 20_000
"""Number of probes that are searched once more for the report. If there are more, evenly spaced ones are taken."""


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


def nearest_answers(search: Search, distance: Distance, engine: Engine = "auto") -> Answers:
    """Search the nearest gallery image of each probe, of at most :data:`MOST` probes."""
    chosen = torch.linspace(0, len(search.probes) - 1, min(MOST, len(search.probes))).long()
    distances, rows = nearest(search.probes[chosen], search.gallery, 1, distance, engine)
    cosine = isinstance(distance, Cosine)
    scores = 1 - distances[:, 0] if cosine else -distances[:, 0]
    labels, found = search.probe_labels[chosen], search.gallery_labels[rows[:, 0]]
    return Answers(
        [search.probe_paths[row] for row in chosen.tolist()],
        [search.gallery_paths[row] for row in rows[:, 0].tolist()],
        scores.double().numpy(),
        (found == labels).numpy(),
        torch.isin(labels, search.gallery_labels).numpy(),
        cosine,
    )
