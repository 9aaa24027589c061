"""1:N identification (who is it?): ranks, the cumulative match characteristic, and the open set.

A gallery holds known people. A probe is mated if its identity is in the gallery. If the gallery has several images of
an identity, the nearest one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .distances import Cosine, Distance
from .search import Engine, choose_engine, nearest
from .verification import Floats, check_rates

FPIRS = (1e-1, 1e-2, 1e-3)
"""False positive identification rates that are reported."""


@dataclass(frozen=True)
class Identification:
    """The figures of one identification."""

    cmc: Floats
    """Closed set, (ranks,): share of the mated probes whose identity is among the nearest 1, 2, … of the gallery."""
    tpir: dict[float, float]
    """Open set, true positive identification rate (rank 1, above the threshold) by false positive identification rate;
    empty without non-mated probes."""
    num_gallery: int
    """Images in the gallery."""
    num_identities: int
    """Identities in the gallery."""
    num_mated: int
    """Number of probes with an identity that is in the gallery."""
    num_unmated: int
    """Number of probes with another identity."""
    engine: str
    """The library that searched: ``"torch"`` or ``"faiss"``."""
    nearest: Tensor
    """(N,) int64, the row of the gallery that is nearest to each probe."""
    distances: Tensor
    """(N,), the distance of each probe to that row."""

    def rank(self, r: int) -> float:
        """Return the rank-r identification rate, or the rate of the last rank if there are fewer than r."""
        return float(self.cmc[min(r, len(self.cmc)) - 1])


def identify(
    gallery: Tensor,
    gallery_labels: Tensor,
    probes: Tensor,
    probe_labels: Tensor,
    *,
    distance: Distance = Cosine(),
    max_rank: int = 20,
    fpirs: Sequence[float] = FPIRS,
    engine: Engine = "auto",
) -> Identification:
    """Search every probe in a gallery.

    Args:
        gallery: embeddings (G, D).
        gallery_labels: identities (G,) int64.
        probes: embeddings (N, D).
        probe_labels: identities (N,) int64; a probe with a label that is not among ``gallery_labels`` is not mated.
        distance: distance that embeddings are compared by.
        max_rank: last rank of the curve, at most the number of identities.
        fpirs: false positive identification rates to report.
        engine: search engine, see :func:`fused_arcface.evaluation.nearest`.

    An identity at the same distance as the right one counts as nearer: embeddings that are all alike identify nobody.

    Raises:
        ValueError: if shapes do not fit, no probe is mated, or a rate is outside [0, 1].

    >>> people = torch.eye(3)
    >>> identify(people, torch.arange(3), people + 0.1, torch.arange(3)).rank(1)
    1.0
    """
    for name, rows, labels in (("gallery", gallery, gallery_labels), ("probe", probes, probe_labels)):
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"{name}_labels must be ({len(rows)},); got {tuple(labels.shape)}")
    if max_rank < 1:
        raise ValueError(f"max_rank must be >= 1; got {max_rank}")
    check_rates("fpirs", fpirs)
    mated = torch.isin(probe_labels, gallery_labels)
    if not mated.any():
        raise ValueError(
            f"probes must show at least one identity of the gallery; got {len(probe_labels.unique())} identities, none "
            f"of the gallery's {len(gallery_labels.unique())}"
        )
    _, images_of = gallery_labels.unique(return_counts=True)
    max_rank = min(max_rank, len(images_of))
    # This many images show max_rank + 1 identities or all, so no match within max_rank is cut off.
    k = max_rank * int(images_of.max()) + 1
    distances, rows = nearest(probes, gallery, k, distance, engine)
    identities = gallery_labels[rows]
    ranks = _ranks(distances[mated], identities[mated], probe_labels[mated])
    cmc = np.array([(ranks <= r).double().mean().item() for r in range(1, max_rank + 1)])
    tpir = _tpir(-distances[mated, 0], ranks == 1, -distances[~mated, 0], fpirs) if not mated.all() else {}
    return Identification(
        cmc=cmc,
        tpir=tpir,
        num_gallery=len(gallery),
        num_identities=len(images_of),
        num_mated=int(mated.sum()),
        num_unmated=int((~mated).sum()),
        engine=choose_engine(engine, distance),
        nearest=rows[:, 0].clone(),
        distances=distances[:, 0].clone(),
    )


def _ranks(distances: Tensor, identities: Tensor, labels: Tensor) -> Tensor:
    """Return the rank ``(N,)`` of the right identity in the ascending lists ``(N, k)``; k + 1 where it is missing."""
    right = identities == labels[:, None]
    own = distances.masked_fill(~right, torch.inf).amin(1)
    none = torch.iinfo(torch.int64).min
    ahead = identities.masked_fill(right | (distances > own[:, None]), none).sort(1).values
    new = torch.ones_like(ahead, dtype=torch.bool)
    new[:, 1:] = ahead[:, 1:] != ahead[:, :-1]
    ranks = 1 + (new & (ahead != none)).sum(1)
    return ranks.masked_fill(~right.any(1), distances.shape[1] + 1)


def _tpir(mated: Tensor, right: Tensor, unmated: Tensor, fpirs: Sequence[float]) -> dict[float, float]:
    """Return the rates, given the best scores of mated ``(N,)`` and non-mated probes ``(U,)``.

    ``right`` ``(N,)`` marks the mated probes with the right identity first.
    """
    falsely = unmated.sort(descending=True).values
    rates = {}
    for fpir in fpirs:
        # The largest number of non-mated probes that may pass. Scores above that of the next one pass.
        passing = int((torch.arange(len(falsely) + 1, dtype=torch.float64) / len(falsely) <= fpir).sum()) - 1
        threshold = falsely[passing] if passing < len(falsely) else -torch.inf
        rates[fpir] = float((right & (mated > threshold)).double().mean())
    return rates


def split_gallery(
    labels: Tensor, *, gallery_images: int = 1, unknown: float = 0.2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Split labeled images into gallery and probes: rows ``(G,)`` and ``(N,)`` int64.

    Args:
        labels: identities (M,).
        gallery_images: number of images of each known identity in the gallery, drawn at random; the others are mated
            probes. An identity without further images is left unknown.
        unknown: share of the identities to keep out of the gallery, in [0, 1); their images are non-mated probes.
        seed: seed of both choices.

    Raises:
        ValueError: if an option is out of range, or no mated probe is left.

    >>> gallery, probes = split_gallery(torch.tensor([0, 0, 1, 1]), unknown=0.5)
    >>> len(gallery), len(probes)
    (1, 3)
    """
    if gallery_images < 1:
        raise ValueError(f"gallery_images must be >= 1; got {gallery_images}")
    if not 0 <= unknown < 1:
        raise ValueError(f"unknown must be in [0, 1); got {unknown}")
    generator = np.random.default_rng(seed)
    rows_of = {int(label): np.flatnonzero(labels.cpu().numpy() == label) for label in labels.unique().tolist()}
    kept_out = set(generator.permutation(list(rows_of))[: round(unknown * len(rows_of))].tolist())
    gallery = [
        generator.permutation(rows)[:gallery_images]
        for label, rows in rows_of.items()
        if label not in kept_out and len(rows) > gallery_images
    ]
    if not gallery:
        raise ValueError(f"labels must hold an identity with more than gallery_images={gallery_images} images")
    chosen = torch.as_tensor(np.sort(np.concatenate(gallery)))
    probes = torch.ones(len(labels), dtype=torch.bool)
    probes[chosen] = False
    return chosen, probes.nonzero()[:, 0]
