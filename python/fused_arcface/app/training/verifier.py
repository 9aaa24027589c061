"""1:1 verification of a net in training, on pairs of people that it is not trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fused_arcface.evaluation import Verification, pair_scores, verify_scores
from fused_arcface.evaluation.thresholds import OperatingPoint, operating_points
from fused_arcface.evaluation.verification import FARS

from ..data.embedding_sets import EmbeddingSet, embed_set
from ..data.images import ImageSpec
from ..data.sources import ImageSet
from ..report.digest import Digest, digest_pairs
from ..report.thumbnails import Thumbnails
from ..thresholds import of_cosine_distance
from .config import OptionError

_FARS = FARS[:3]
_SAID = 20  # unreadable images that are named


class Checked(NamedTuple):
    """One verification."""

    found: Verification
    thresholds: list[OperatingPoint]
    """Cosines."""
    digest: Digest | None = None
    """For the run's report; None if it could not be made."""


class Verifier:
    """Verifies a net at the end of an epoch, on a set of images with pairs, ``batch_size`` of them at once.

    Raises:
        OptionError: if there are too few pairs to verify with.
        MissingExtra: if scikit-learn is not installed.
    """

    def __init__(self, images: ImageSet, batch_size: int, workers: int) -> None:
        self._images, self._batch_size, self._workers = images, batch_size, workers
        self.problems = images.problems
        rows = torch.randn(len(images), 2, generator=torch.Generator().manual_seed(0))
        try:
            # Random embeddings show an error before hours of training, not after them.
            _verify(EmbeddingSet(rows, images.paths, pairs=images.pairs))
        except ValueError as error:
            raise OptionError(f"verify_data: {error}") from None

    def __call__(
        self, net: nn.Module, spec: ImageSpec, device: torch.device, name: str, step: int
    ) -> tuple[Checked | None, list[str]]:
        """Verify a net; return the figures, None if there are none, and what went wrong.

        The net is put into evaluation mode. A pair with an image that cannot be read is left out. A verification that
        cannot be made does not end the training. The figures keep the set's ``name`` and the ``step``.
        """
        problems: list[str] = []
        try:
            found = embed_set(
                net,
                self._images,
                spec,
                batch_size=self._batch_size,
                device=device,
                workers=self._workers,
                unreadable=lambda problem: problems.append(f"{problem}; its pairs are left out"),
            )
            if not found.embeddings.isfinite().all():
                raise ValueError("the net's embeddings are not finite")
            checked = _verify(found)
        except ValueError as error:
            return None, [*_first(problems), f"no figures, {error}"]
        try:
            digest = self._digest(checked.found, found, name, step)
            return checked._replace(digest=digest), _first(problems)
        except Exception as error:  # a fault in a report must not end a training
            return checked, [*_first(problems), f"the report will not show it, {str(error) or type(error).__name__}"]

    def _digest(self, figures: Verification, found: EmbeddingSet, name: str, step: int) -> Digest:
        assert found.pairs is not None
        thumbnails, scores = Thumbnails([self._images]), pair_scores(found.embeddings, found.pairs)
        return digest_pairs(name, figures, scores, found.pairs, found.paths, thumbnails, cosine=True, step=step)


def _first(problems: list[str]) -> list[str]:
    """Return the first problems, and the number of the others."""
    more = len(problems) - _SAID
    return [*problems[:_SAID], f"{more} more images cannot be read"] if more > 0 else problems


def _verify(found: EmbeddingSet) -> Checked:
    assert found.pairs is not None
    same, scores = found.pairs.same.numpy(), pair_scores(found.embeddings, found.pairs)
    return Checked(verify_scores(same, scores, fars=_FARS), of_cosine_distance(operating_points(same, scores)))
