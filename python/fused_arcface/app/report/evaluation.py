"""Pictures and reports of one evaluation: ROC, DET and CMC curves, histograms, the images that a net finds hardest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from fused_arcface.base.extras import require
from fused_arcface.evaluation.identification import Identification
from fused_arcface.evaluation.verification import Verification

from ..drawing import ONE, TWO, WIDTH, Drawing, panel, plain_ticks, set_title
from .answers import Answers
from .digest import Digest, as_comparisons
from .document import Report, Section, about
from .thumbnails import Thumbnails

Values = npt.ArrayLike


def roc_drawing(
    false_accepts: Values, true_accepts: Values, others: int, title: str, marked: Mapping[float, float] | None = None
) -> Drawing:
    """Return the drawing of a ROC curve of rates ``(points,)``, false accepts ascending.

    There are ``others`` pairs of two people, and the curve begins at one false accept among them. ``marked`` are true
    accept rates by false accept rate.
    """
    least = 1 / others

    def draw(plt: Any) -> Any:
        labels = {"xlabel": "false accept rate", "ylabel": "true accept rate"}
        figure, axis = panel(plt, 3.7, title, xscale="log", xlim=(least, 1), ylim=(0, 1.02), **labels)
        plain_ticks(axis.xaxis)
        # Nothing is interpolated: a rate holds until the next point.
        axis.step(false_accepts, true_accepts, where="post", color=ONE)
        for far, tar in (marked or {}).items():
            if far >= least:
                axis.plot(far, tar, "o", color=ONE, ms=5)
                axis.annotate(f"{tar:.3f}", (far, tar), (4, -13), textcoords="offset points", fontsize=9)
        return figure

    caption = (
        "ROC: the share of the pairs of one person that are accepted, by the share of the pairs of two people that are "
        f"accepted. It begins at one false accept in {others:,} pairs."
    )
    return Drawing("roc", caption, draw)


def det_drawing(found: Verification, title: str) -> Drawing:
    """Return the drawing of a DET curve: the false reject over the false accept rate, on normal-deviate axes."""

    def draw(plt: Any) -> Any:
        figure, axis = panel(plt, 4.2, title)
        rejects = 1 - found.true_accepts
        inner = (found.false_accepts > 0) & (rejects > 0)  # the ends lie infinitely far
        curve = require("sklearn.metrics", "eval").DetCurveDisplay(fpr=found.false_accepts[inner], fnr=rejects[inner])
        curve.plot(ax=axis, color=ONE)
        if 0 < found.eer < 1:
            deviate = require("scipy.stats", "eval").norm.ppf(found.eer)
            axis.plot(deviate, deviate, "o", color=ONE, ms=5)
            axis.annotate(f"equal, {found.eer:.3f}", (deviate, deviate), (6, 6), textcoords="offset points", fontsize=9)
        axis.set(xlabel="false accept rate", ylabel="false reject rate")
        if axis.get_legend() is not None:
            axis.get_legend().remove()
        return figure

    caption = "DET: the share of pairs of one person that are rejected, by the share of pairs of two that are accepted."
    return Drawing("det", caption, draw)


def histogram_drawing(edges: Values, counts: Mapping[str, Values], unit: str, title: str) -> Drawing:
    """Return the drawing of overlaid histograms, each as the share of its own kind.

    ``edges`` are ``(bins + 1,)``, the counts of each kind ``(bins,)``.
    """

    def draw(plt: Any) -> Any:
        figure, axis = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
        draw_histograms(axis, edges, counts)
        axis.set(xlabel=unit, ylabel="share of its kind")
        axis.legend()
        set_title(axis, title)
        return figure

    kinds = ", ".join(f"{name} ({int(np.sum(each)):,})" for name, each in counts.items())
    return Drawing("histogram", f"Histograms of the {unit}: {kinds}. Each kind sums to 1.", draw)


def draw_histograms(axis: Any, edges: Values, counts: Mapping[str, Values]) -> None:
    """Draw overlaid histograms, each as the share of its own kind; the axis has the range of the filled bins."""
    bounds = np.asarray(edges)
    filled = np.flatnonzero(np.sum([np.asarray(each) for each in counts.values()], axis=0))
    for (name, each), color in zip(counts.items(), (ONE, TWO, "#999999"), strict=False):
        share = np.asarray(each) / max(np.sum(each), 1)
        axis.stairs(share, bounds, fill=True, color=color, alpha=0.55, label=name)
    if len(filled):
        room = 0.04 * (bounds[filled[-1] + 1] - bounds[filled[0]])
        axis.set_xlim(max(bounds[0], bounds[filled[0]] - room), min(bounds[-1], bounds[filled[-1] + 1] + room))
    axis.set_ylim(bottom=0)


def verification_drawings(found: Verification, title: str = "") -> list[Drawing]:
    """Return the pictures of a verification: ``roc`` and ``det``."""
    roc = roc_drawing(found.false_accepts, found.true_accepts, found.num_pairs[1], title, found.tar)
    return [roc, det_drawing(found, title)]


def identification_drawings(found: Identification, title: str = "") -> list[Drawing]:
    """Return the picture of an identification: ``cmc``, the identification rate by rank."""

    def draw(plt: Any) -> Any:
        ranks, labels = np.arange(1, len(found.cmc) + 1), {"xlabel": "rank", "ylabel": "identification rate"}
        figure, axis = panel(plt, 3.7, title, xlim=(0.5, len(ranks) + 0.5), ylim=(0, 1.02), **labels)
        axis.plot(ranks, found.cmc, "o-", color=ONE, ms=4)
        axis.xaxis.get_major_locator().set_params(integer=True)
        return figure

    caption = f"CMC: the share of {found.num_mated:,} probes whose person is among the first people of the gallery."
    return [Drawing("cmc", caption, draw)]


def digest_sections(digest: Digest, more: Sequence[Drawing] = ()) -> list[Section]:
    """Return the sections of a verification that the terminal does not show: curves, and the hardest pairs.

    ``more`` are drawings to show after the curve and the histograms.
    """
    unit = "angle between two embeddings, degrees" if digest.cosine else "distance between two embeddings"
    kinds = {"one person": digest.same_counts, "two people": digest.different_counts}
    roc = roc_drawing(digest.false_accepts, digest.true_accepts, digest.num_pairs[1], "ROC")
    drawings = [roc, histogram_drawing(digest.edges, kinds, unit, "pairs of one person and of two"), *more]
    rule = "Pairs of one person that look least alike to the net, then pairs of two people that look most alike."
    return [
        Section("Curves", drawings=drawings),
        Section("Hardest pairs", rule, comparisons=as_comparisons(digest.hardest, digest.cosine)),
    ]


def verification_report(
    name: str,
    tables: Sequence[Table],
    digest: Digest | None,
    found: Verification | None,
    options: Mapping[str, Any],
) -> Report:
    """Return the report of ``verify`` on the set ``name``, with the terminal's tables.

    Digest and figures are None if all pairs are of one kind.
    """
    sections = [Section("Figures", tables=tables)]
    summary = "1:1 verification. All pairs are of one kind, so there are no rates and no curves."
    if digest is not None and found is not None:
        sections += digest_sections(digest, [det_drawing(found, "DET")])
        same, different = found.num_pairs
        summary = (
            f"1:1 verification: accuracy {found.accuracy:.4f}, equal error rate {found.eer:.4f}, on {same:,} pairs of "
            f"one person and {different:,} of two."
        )
    return Report(f"Verification on {name}", summary, [*sections, *about(options)])


def identification_report(
    name: str,
    tables: Sequence[Table],
    found: Identification,
    answers: Answers,
    thumbnails: Thumbnails,
    options: Mapping[str, Any],
) -> Report:
    """Return the report of ``identify`` on the set ``name``, with the terminal's tables.

    ``answers`` are the nearest gallery images of the probes.
    """
    unit = "angle to the nearest gallery image, degrees" if answers.cosine else "distance to the nearest gallery image"
    edges, counts = answers.histograms()
    drawings = [*identification_drawings(found, "CMC"), histogram_drawing(edges, counts, unit, "nearest gallery image")]
    rule = (
        "Each probe with the gallery image that it was taken for: probes of people in the gallery that were taken for "
        "another person, then probes of people who are not in the gallery. The most alike come first."
    )
    sections = [
        Section("Figures", tables=tables),
        Section("Curves", drawings=drawings),
        Section("Hardest probes", rule, comparisons=answers.hardest(thumbnails)),
        *about(options),
    ]
    summary = (
        f"1:N identification: rank 1 {found.rank(1):.4f} of {found.num_mated:,} probes, in a gallery of "
        f"{found.num_identities:,} people."
    )
    return Report(f"Identification on {name}", summary, sections)
