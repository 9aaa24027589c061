"""Steps of ``verify`` and ``identify`` between the embeddings and the figures that the commands print."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_arcface.base.reading import DataError
from fused_arcface.evaluation import Mahalanobis, balanced_pairs, split_gallery

from .data.embedding_sets import EmbeddingSet
from .data.pair_sets import read_labeled
from .data.sources import ImageSet
from .predictions import Search

if TYPE_CHECKING:
    from fused_arcface.evaluation import Distance, Identification, Verification

    Means = tuple[float | None, float | None]

LEFT_OUT = ["accuracy", "equal error rate", "TAR at FAR"]
"""Figures that need pairs of both kinds."""


def both_kinds(same: Tensor) -> bool:
    """Return true if some pairs (P,) bool show one person and others two: the rates compare the two kinds."""
    return bool(same.any() and not same.all())


def prepared(embeddings: Tensor, normalize: bool) -> Tensor:
    """Return embeddings as they are compared."""
    return F.normalize(embeddings) if normalize else embeddings


def with_pairs(saved: EmbeddingSet, path: Path, most: int, seed: int) -> EmbeddingSet:
    """Return saved embeddings with their pairs, or with pairs of their labels; raise DataError if they have neither."""
    if saved.pairs is not None:
        return saved
    if saved.labels is None:
        raise DataError(f"{path} must hold labels (M,), or pairs (P, 2) and same (P,), to be verified")
    return replace(saved, pairs=balanced_pairs(saved.labels, most, seed))


def split_set(labeled: EmbeddingSet, gallery_images: int, unknown: float, seed: int) -> Search:
    """Split a set into gallery and probes; raise DataError if it has no labels."""
    if labeled.labels is None:
        raise DataError("embeddings must have labels (M,) to be split into gallery and probes")
    known, sought = split_gallery(labeled.labels, gallery_images=gallery_images, unknown=unknown, seed=seed)
    rows, labels, paths = labeled.embeddings, labeled.labels, labeled.paths
    names = ([paths[row] for row in each.tolist()] for each in (known, sought))
    return Search(rows[known], labels[known], rows[sought], labels[sought], *names)


def two_sets(gallery: str, probes: str, max_pixels: int) -> list[ImageSet]:
    """Open gallery and probes; raise ValueError if they share an image."""
    sources = [read_labeled(each, max_pixels=max_pixels) for each in (gallery, probes)]
    files = [{str(Path(path).resolve()) for path in source.paths} for source in sources]
    if shared := files[0] & files[1]:
        raise ValueError(
            "probes must not hold images of the gallery, where each would find itself; got "
            f"{len(shared)} of them, {min(shared)} for example"
        )
    return sources


def with_labels_by_name(sources: list[ImageSet], found: list[EmbeddingSet]) -> Search:
    """Return gallery and probes, with the same label for people of the same name."""
    number_of: dict[str, int] = {}
    labels: list[Tensor] = []
    for source, embedded in zip(sources, found, strict=True):
        assert embedded.labels is not None
        numbers = torch.tensor([number_of.setdefault(name, len(number_of)) for name in source.names])
        labels.append(numbers[embedded.labels])
    gallery, probes = found
    return Search(gallery.embeddings, labels[0], probes.embeddings, labels[1], gallery.paths, probes.paths)


def lost(images: ImageSet, embedded: EmbeddingSet) -> str:
    """Say how many images of a set could not be read, and how many pairs went with them."""
    unread = len(images) - len(embedded.paths)
    text = f"{unread} of {len(images)} images cannot be read" if unread else ""
    if unread and images.pairs is not None and embedded.pairs is not None:
        pairs = len(images.pairs.same)
        text += f", so that {pairs - len(embedded.pairs.same)} of {pairs} pairs are not scored"
    return text


def described(distance: Distance, name: str, normalize: bool) -> dict[str, Any]:
    """Return how embeddings were compared, for the file of figures."""
    found: dict[str, Any] = {"distance": name, "normalized": normalize}
    if name == "p-norm":
        found["p"] = distance.p
    if isinstance(distance, Mahalanobis):
        found["shrinkage"] = distance.shrinkage
    return found


def verification_figures(found: Verification | None, same: Tensor, means: Means) -> dict[str, Any]:
    """Return the figures of a verification for the JSON file; without rates if ``found`` is None."""
    figures: dict[str, Any] = {
        "pairs": {"same": int(same.sum()), "different": int((~same).sum())},
        "mean_score": {"same": means[0], "different": means[1]},
    }
    if found is None:
        return {**figures, "left_out": LEFT_OUT}
    for name in ("accuracy", "accuracy_deviation", "accuracy_standard_error", "eer"):
        figures[name] = getattr(found, name)
    figures["fold_accuracy"] = found.fold_accuracy.tolist()
    return {**figures, "tar_at_far": {f"{far:g}": tar for far, tar in found.tar.items()}}


def identification_figures(found: Identification) -> dict[str, Any]:
    """Return the figures of an identification for the JSON file."""
    return {
        "gallery": {"images": found.num_gallery, "identities": found.num_identities},
        "probes": {"mated": found.num_mated, "unmated": found.num_unmated},
        "engine": found.engine,
        "rank": {str(r): found.rank(r) for r in (1, 5, 10)},
        "cmc": found.cmc.tolist(),
        "tpir_at_fpir": {f"{fpir:g}": rate for fpir, rate in found.tpir.items()},
    }
