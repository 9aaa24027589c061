"""The template protocol of IJB-B and IJB-C between the embeddings and the figures that ``templates`` prints."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_arcface.base.reading import DataError
from fused_arcface.evaluation import (
    Identification,
    Pairs,
    Rates,
    Templates,
    identify_templates,
    pool_templates,
    verify_templates,
)

from .data.embedding_sets import EmbeddingSet
from .data.formats.templates import Subjects, TemplateSet
from .evaluating import both_kinds, identification_figures

RANKS = (1, 5, 10)


@dataclass(frozen=True)
class TemplateFigures:
    """The figures of one set of templates."""

    num_templates: int
    """Templates with an image that could be read."""
    rates: Rates | None
    """1:1, if the set has pairs."""
    searches: dict[str, Identification]
    """1:N by the name of the gallery."""
    left_out: list[str]
    """Parts of the set that could not be compared, in words."""


def evaluate_templates(
    found: TemplateSet, embedded: EmbeddingSet, *, scores: bool = True, norms: bool = True
) -> TemplateFigures:
    """Evaluate embeddings of a set's faces, 1:1 if the set has pairs, and 1:N if it has probes.

    Args:
        found: the set.
        embedded: embeddings of its faces, not normalized, in their order; faces may be missing.
        scores: weigh each face by the detector's score, if the set has it.
        norms: keep the norms of the embeddings, which weigh sharp faces more.

    Raises:
        DataError: if the embeddings are those of other images, or nothing is left to compare.
    """
    rows = _rows_of(found.images.paths, embedded.paths)
    templates = pool_templates(
        embedded.embeddings,
        found.templates[rows],
        found.media[rows],
        weights=found.scores[rows] if scores and found.scores is not None else None,
        normalize=not norms,
    )
    left_out: list[str] = []
    rates = _verify(found, found.pairs, templates, left_out) if found.pairs is not None else None
    searches = {}
    if found.probes is not None:
        probes = _present(found.probes, templates, "probes", left_out)
        for name, gallery in found.galleries.items():
            known = _present(gallery, templates, f"templates of gallery {name}", left_out)
            if not torch.isin(probes.subjects, known.subjects).any():
                raise DataError(f"{found.name}: no probe shows a person of gallery {name}")
            searches[name] = identify_templates(
                templates, known.templates, known.subjects, probes.templates, probes.subjects
            )
    return TemplateFigures(len(templates.ids), rates, searches, left_out)


def _rows_of(paths: list[str], embedded: list[str]) -> Tensor:
    """Return which of a set's faces were embedded; raise DataError if they are other faces, or in another order."""
    rows: list[int] = []
    for row, path in enumerate(paths):
        if len(rows) < len(embedded) and embedded[len(rows)] == path:
            rows.append(row)
    if len(rows) < len(embedded):
        raise DataError(
            f"embeddings must be of the {len(paths)} faces of the set, in its order: after {len(rows)} of them comes "
            f"{embedded[len(rows)]}, which is none of those that follow"
        )
    return torch.tensor(rows)


def _verify(found: TemplateSet, pairs: Pairs, templates: Templates, left_out: list[str]) -> Rates:
    both = templates.has(pairs.first) & templates.has(pairs.second)
    _note(both, "pairs: a template has", left_out)
    first, second, same = (each[both] for each in pairs)
    if not both_kinds(same):
        raise DataError(f"{found.name}: there are no pairs of both kinds whose images could be read")
    return verify_templates(templates, first, second, same)


def _present(of: Subjects, templates: Templates, what: str, left_out: list[str]) -> Subjects:
    there = templates.has(of.templates)
    _note(there, f"{what}: they have", left_out)
    return Subjects(of.templates[there], of.subjects[there])


def _note(there: Tensor, what: str, left_out: list[str]) -> None:
    if not there.all():
        left_out.append(f"{int((~there).sum())} of {len(there)} {what} no image that could be read")


def mean_figures(searches: dict[str, Identification]) -> dict[str, dict[str, float]]:
    """Return the means over the galleries: the rate at each rank, and TPIR by FPIR where all galleries have it."""
    every = list(searches.values())
    common = [fpir for fpir in every[0].tpir if all(fpir in each.tpir for each in every)]
    return {
        "rank": {str(rank): statistics.fmean(each.rank(rank) for each in every) for rank in RANKS},
        "tpir_at_fpir": {f"{fpir:g}": statistics.fmean(each.tpir[fpir] for each in every) for fpir in common},
    }


def template_figures(found: TemplateFigures) -> dict[str, Any]:
    """Return the figures for the JSON file."""
    figures: dict[str, Any] = {"templates": found.num_templates, "left_out": found.left_out}
    if found.rates is not None:
        same, different = found.rates.num_pairs
        figures["verification"] = {
            "pairs": {"same": same, "different": different},
            "eer": found.rates.eer,
            "tar_at_far": {f"{far:g}": tar for far, tar in found.rates.tar.items()},
        }
    if found.searches:
        galleries = {name: identification_figures(each) for name, each in found.searches.items()}
        figures["identification"] = {**galleries, "mean": mean_figures(found.searches)}
    return figures
