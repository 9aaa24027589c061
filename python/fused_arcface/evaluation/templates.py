"""Templates, as IJB-B and IJB-C have them: one embedding of a person from all images of some photos and videos.

A medium is a photo or a video; its images are the photo's face or the video's frames. The protocol compares templates
with templates: 1:1 in pairs, 1:N in a gallery with one template for each person.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .identification import FPIRS, Identification, identify
from .pairs import Pairs
from .search import Engine
from .verification import FARS, Rates, accept_rates, pair_scores

# Images that are added up at once: all of them in fp64 would be twice as large as the embeddings.
_IMAGES_AT_ONCE = 1 << 14


class Templates(NamedTuple):
    """The embeddings of T templates."""

    ids: Tensor
    """(T,) int64, ascending."""
    embeddings: Tensor
    """(T, D) fp32, of norm 1; zeros for a template whose images add up to nothing."""

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows ``(K,)`` of templates ``(K,)``.

        Raises:
            ValueError: if one is not among the T templates.

        >>> Templates(torch.tensor([3, 7]), torch.eye(2)).rows(torch.tensor([7, 7, 3]))
        tensor([1, 1, 0])
        """
        ids = ids.to(self.ids)
        known = self.has(ids)
        if not known.all():
            raise ValueError(f"templates must be among the {len(self.ids)} that have images; got {ids[~known][0]}")
        return torch.searchsorted(self.ids, ids)

    def has(self, ids: Tensor) -> Tensor:
        """Return which of templates ``(K,)`` are among the T templates, ``(K,)`` bool."""
        return torch.isin(ids.to(self.ids), self.ids)


@torch.no_grad()
def pool_templates(
    embeddings: Tensor, templates: Tensor, media: Tensor, *, weights: Tensor | None = None, normalize: bool = False
) -> Templates:
    """Make one embedding of each template from the embeddings of its images.

    The embedding of a medium is the mean over its images, that of a template the sum over its media, scaled to norm 1.
    So a video of 500 frames counts as much as a photo. insightface's evaluation of IJB-B and IJB-C computes the same:
    with flipped images added, norms kept, and the detector's scores as weights.

    Args:
        embeddings: embeddings (M, D) of the images.
        templates: template (M,) of each image, any integers.
        media: medium (M,) of each image, any integers. The same number in two templates is two media.
        weights: factor (M,) of each image, the score of the face detector for example; None for 1.
        normalize: scale each image's embedding to norm 1 first. The norm tells a sharp face from a blurred one, so it
            is kept by default.

    Raises:
        TypeError: if templates or media are not integers, or embeddings not floating-point.
        ValueError: if the shapes do not fit, or embeddings or weights are not finite.

    >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [3.0, 4.0]])
    >>> pool_templates(images, torch.tensor([5, 5, 5, 2]), torch.tensor([1, 8, 8, 1]))  # 1: photos, 8: a video
    Templates(ids=tensor([2, 5]), embeddings=tensor([[0.6000, 0.8000],
            [0.7071, 0.7071]]))
    """
    _check(embeddings, templates, media, weights)
    ids, place = templates.long().unique(return_inverse=True)
    medium = media.unique(return_inverse=True)[1]
    count = int(medium.max()) + 1 if len(medium) else 1
    _, part, images_of = (place * count + medium).unique(return_inverse=True, return_counts=True)
    # The sum of the means is the sum of the images, each divided by the number of images of its medium.
    factor = 1 / images_of[part].double()
    if weights is not None:
        factor = factor * weights.to(factor)
    total = torch.zeros(len(ids), embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
    for rows, where, factors in zip(
        *(each.split(_IMAGES_AT_ONCE) for each in (embeddings, place, factor)), strict=True
    ):
        rows = rows.double()
        if normalize:
            rows = F.normalize(rows)
        total.index_add_(0, where, rows * factors[:, None])
    return Templates(ids, F.normalize(total).float())


def _check(embeddings: Tensor, templates: Tensor, media: Tensor, weights: Tensor | None) -> None:
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings must be (M, D); got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise TypeError(f"embeddings must be floating-point; got {embeddings.dtype}")
    for name, numbers in (("templates", templates), ("media", media), ("weights", weights)):
        if numbers is None:
            continue
        if numbers.shape != embeddings.shape[:1]:
            raise ValueError(f"{name} must be ({len(embeddings)},), one for each image; got {tuple(numbers.shape)}")
        if name != "weights" and (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool):
            raise TypeError(f"{name} must be integers; got {numbers.dtype}")
    if not embeddings.isfinite().all():
        raise ValueError("embeddings must be finite")
    if weights is not None and not weights.isfinite().all():
        raise ValueError("weights must be finite")


def verify_templates(
    templates: Templates, first: Tensor, second: Tensor, same: Tensor, *, fars: Sequence[float] = FARS
) -> Rates:
    """Compare pairs of templates by the cosine, 1:1.

    Memory grows with the templates and the pairs, not with the number of all possible pairs.

    Args:
        templates: embeddings, see :func:`pool_templates`.
        first: first template (P,) of each pair.
        second: second template (P,) of each pair.
        same: true for each pair that shows one person, (P,) bool.
        fars: false accept rates to report.

    Raises:
        ValueError: if a template has no images, or all pairs are of one kind.
        MissingExtra: if scikit-learn is not installed.

    >>> people = Templates(torch.tensor([1, 2, 3]), torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]))
    >>> verify_templates(people, torch.tensor([1, 1]), torch.tensor([2, 3]), torch.tensor([True, False])).tar[1e-6]
    1.0
    """
    pairs = Pairs(templates.rows(first), templates.rows(second), same)
    return accept_rates(same, pair_scores(templates.embeddings, pairs), fars=fars)


def identify_templates(
    templates: Templates,
    gallery: Tensor,
    gallery_subjects: Tensor,
    probes: Tensor,
    probe_subjects: Tensor,
    *,
    max_rank: int = 20,
    fpirs: Sequence[float] = FPIRS,
    engine: Engine = "auto",
) -> Identification:
    """Search templates in a gallery of templates by the cosine, 1:N.

    Args:
        templates: embeddings, see :func:`pool_templates`.
        gallery: templates (G,) of known people.
        gallery_subjects: person (G,) of each.
        probes: templates (N,) to look for.
        probe_subjects: person (N,) of each; people who are not in the gallery count for the open set.
        max_rank: last rank of the curve.
        fpirs: false positive identification rates to report.
        engine: search engine, see :func:`fused_arcface.evaluation.nearest`.

    Raises:
        ValueError: if a template has no images, shapes do not fit, or no probe shows a person of the gallery.

    >>> people = Templates(torch.tensor([1, 2, 3]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    >>> gallery, probe = torch.tensor([1, 2]), torch.tensor([3])
    >>> identify_templates(people, gallery, torch.tensor([50, 60]), probe, torch.tensor([60])).rank(1)
    1.0
    """
    known, sought = (templates.embeddings[templates.rows(ids)] for ids in (gallery, probes))
    return identify(known, gallery_subjects, sought, probe_subjects, max_rank=max_rank, fpirs=fpirs, engine=engine)
