"""The nearest gallery image of each probe: the scores in the report of an identification."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from fused_arcface.evaluation import Identification

from ..predictions import Search
from .digest import HARDEST, histograms, measure
from .document import Comparison, Thumbnail


class Answers:
    """The nearest gallery images of N probes, as an identification has found them.

    ``cosine`` says that it compared by the cosine distance.
    """

    def __init__(self, search: Search, found: Identification, cosine: bool) -> None:
        self.probes, self.cosine = search.probe_paths, cosine
        self.matches = [search.gallery_paths[row] for row in found.nearest.tolist()]
        self.scores = (1 - found.distances if cosine else -found.distances).double().numpy()
        """(N,) cosines, or negated distances."""
        self.right = (search.gallery_labels[found.nearest] == search.probe_labels).numpy()
        """(N,) the match shows the probe's person."""
        self.known = torch.isin(search.probe_labels, search.gallery_labels).numpy()
        """(N,) the gallery has the probe's person."""

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
