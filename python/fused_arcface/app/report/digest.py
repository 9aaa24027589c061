"""Digests of verifications: curves, histograms and hardest pairs for a report. A digest is kept with its run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fused_arcface.base.files import write_text
from fused_arcface.base.reading import file_errors, read_bytes
from fused_arcface.base.typed_json import typed
from fused_arcface.evaluation import Pairs, Verification

from .document import Comparison, Thumbnail

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

HARDEST = 6
"""Pairs of each kind that are shown."""
_POINTS = 300
"""Points of a thinned curve: more than a phone has pixels for."""
BINS = 90
"""Bins of a histogram."""
_MOST_BYTES = 1 << 24


class HardPair(NamedTuple):
    """A pair that a net finds hard."""

    same: bool
    """Both show one person."""
    score: float
    """The cosine, or the negated distance."""
    first: Thumbnail
    second: Thumbnail


@dataclass(frozen=True)
class Digest:
    """The parts of one verification that a report shows."""

    data: str
    """Name of the set."""
    cosine: bool
    """Scores are cosines, and histograms are over angles in degrees; otherwise they are over distances."""
    num_pairs: tuple[int, int]
    """Numbers of pairs of one identity and of two."""
    false_accepts: list[float]
    """Ascending points of the ROC curve; a rate holds until the next point."""
    true_accepts: list[float]
    edges: list[float]
    """(bins + 1,)"""
    same_counts: list[int]
    """(bins,) pairs of one person."""
    different_counts: list[int]
    """(bins,) pairs of two people."""
    hardest: list[HardPair] = field(default_factory=list)
    """Pairs of one person with the lowest scores, then pairs of two people with the highest."""
    step: int | None = None
    """Number of steps that the net was trained for."""

    def save(self, path: Path) -> None:
        """Write the digest as JSON, which :func:`read_digest` reads."""
        write_text(path, json.dumps(asdict(self)) + "\n")


def read_digest(path: Path) -> Digest | None:
    """Return the digest in a file, None if there is no such file; raise DataError if it is damaged."""
    if not path.is_file():
        return None
    content = read_bytes(path, _MOST_BYTES)
    with file_errors(path):
        found = typed(Digest, json.loads(content))
        return replace(found, hardest=_checked(found.hardest))


def read_hardest(values: Any) -> list[HardPair]:
    """Return pairs that were written as JSON; raise ValueError if they are something else."""
    return _checked(typed(list[HardPair], values))


def _checked(pairs: list[HardPair]) -> list[HardPair]:
    """Check that the thumbnails of pairs, which anybody may have written, hold their pictures themselves."""
    for source in (image.source for pair in pairs for image in (pair.first, pair.second)):
        if source and re.fullmatch("data:image/jpeg;base64,[A-Za-z0-9+/]+=*", source) is None:
            raise ValueError(f"a thumbnail must be a JPEG in a data: address; got {source[:40]!r}")
    return pairs


def digest_pairs(
    data: str,
    found: Verification,
    scores: Floats,
    pairs: Pairs,
    names: Sequence[str],
    thumbnail: Callable[[str], Thumbnail],
    *,
    cosine: bool,
    step: int | None = None,
) -> Digest:
    """Return the digest of a verification of pairs of the images ``names`` (M,).

    ``scores`` (P,) are negated distances, cos - 1 for the cosine distance. ``step`` is the number of steps that the net
    was trained for.
    """
    same, shown = pairs.same.numpy(), scores + cosine
    edges, counts = histograms(shown, cosine, {"same": same, "different": ~same})
    false_accepts, true_accepts = thinned_curve(found.false_accepts, found.true_accepts, found.num_pairs[1])
    return Digest(
        data=data,
        cosine=cosine,
        num_pairs=found.num_pairs,
        false_accepts=false_accepts.tolist(),
        true_accepts=true_accepts.tolist(),
        edges=edges.tolist(),
        same_counts=counts["same"],
        different_counts=counts["different"],
        hardest=hardest_pairs(shown, pairs, names, thumbnail),
        step=step,
    )


def angles(cosines: Floats) -> Floats:
    """Return the angles in degrees of cosines ``(P,)``.

    >>> angles(np.array([1.0, 0.0])).tolist()
    [0.0, 90.0]
    """
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def histograms(scores: Floats, cosine: bool, kinds: Mapping[str, Bools]) -> tuple[Floats, dict[str, list[int]]]:
    """Return the edges (bins + 1,) of bins of angles or distances, and the number of scores in each bin by kind.

    ``scores`` (P,) are cosines or negated distances. Each kind is (P,) bool.

    >>> edges, counts = histograms(np.array([1.0, 0.0]), True, {"all": np.array([True, True])})
    >>> edges[[0, -1]].tolist(), sum(counts["all"])
    ([0.0, 180.0], 2)
    """
    spread = angles(scores) if cosine else -scores
    # A negated inner product may be below 0.
    low, high = (0.0, 180.0) if cosine else (min(0.0, float(spread.min())), max(float(spread.max()), 1e-9))
    edges = np.linspace(low, high, BINS + 1)
    return edges, {name: np.histogram(spread[kind], edges)[0].tolist() for name, kind in kinds.items()}


def thinned_curve(false_accepts: Floats, true_accepts: Floats, others: int) -> tuple[Floats, Floats]:
    """Return points of a ROC curve at rates evenly spread on a logarithmic axis, from one false accept on.

    Each is exact: the greatest true accept rate with a false accept rate of at most that one. Both rates are
    ``(points,)``, false accepts ascending; there are ``others`` pairs of two people.

    >>> thinned_curve(np.array([0, 0.5, 1]), np.array([0.2, 0.6, 1]), others=2)[1][[0, -1]].tolist()
    [0.6, 1.0]
    """
    rates = np.logspace(-np.log10(others), 0, _POINTS)
    rates[[0, -1]] = 1 / others, 1.0  # not one rounding below
    places = np.searchsorted(false_accepts, rates * (1 + 1e-12), side="right") - 1
    return rates, true_accepts[places]


def hardest_pairs(
    scores: Floats, pairs: Pairs, names: Sequence[str], thumbnail: Callable[[str], Thumbnail], count: int = HARDEST
) -> list[HardPair]:
    """Return the pairs of one person with the lowest scores, then those of two people with the highest.

    There are at most ``count`` of each. The scores are ``(P,)``, the names of the images ``(M,)``.
    """
    same = pairs.same.numpy()
    order = np.argsort(scores, kind="stable")
    chosen = [*order[same[order]][:count], *order[::-1][~same[order[::-1]]][:count]]
    found = []
    for place in chosen:
        images = (thumbnail(names[int(rows[place])]) for rows in (pairs.first, pairs.second))
        found.append(HardPair(bool(same[place]), float(scores[place]), *images))
    return found


def as_comparisons(hardest: Sequence[HardPair], cosine: bool = True) -> list[Comparison]:
    """Return pairs as a report shows them, each with its kind and its score."""
    return [
        Comparison(first, second, f"{'one person' if same else 'two people'}, {measure(score, cosine)}")
        for same, score, first, second in hardest
    ]


def measure(score: float, cosine: bool) -> str:
    """Return a score in words.

    >>> measure(0.5, cosine=True), measure(-1.25, cosine=False)
    ('cosine 0.500, 60.0°', 'distance 1.25')
    """
    if not cosine:
        return f"distance {-score:.4g}"
    return f"cosine {score:.3f}, {float(angles(np.array(score))):.1f}°"
