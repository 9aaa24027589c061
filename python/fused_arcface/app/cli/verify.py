"""``verify``: 1:1, is it the same person? Accuracy and rates of a trained net on pairs of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..data import formats
from ..data.formats.embeddings import EMBEDDING_FILES
from ..data.images import MAX_PIXELS
from . import evaluation as shared
from . import reporting
from .errors import WrongOption
from .tables import add_rates, plain_table
from .terminal import say, terminal

if TYPE_CHECKING:
    from torch import Tensor

    from fused_arcface.evaluation import Verification
    from fused_arcface.evaluation.thresholds import OperatingPoint

    from ..data.sources import ImageSet
    from ..report.document import Report
    from ..thresholds import KeptThresholds
    from ..training.runs import RunFolder

    Means = tuple[float | None, float | None]


def verify(
    data: Annotated[
        str | None,
        f"Pairs to verify: {formats.listed(pairs=True)}; or labeled images to make pairs from: "
        f"{formats.listed()}. A .txt, .csv or .tsv file counts as one of pairs.",
    ] = None,
    checkpoint: shared.Checkpoint = None,
    backbone: shared.Backbone = None,
    image_size: shared.ImageSize = None,
    images: Annotated[
        Path | None, "Folder of the images that a file of pairs names. Default: the folder of that file."
    ] = None,
    embeddings: Annotated[
        Path | None, f"Saved embeddings, {EMBEDDING_FILES}, to score instead of --data and --checkpoint."
    ] = None,
    save_embeddings: Annotated[
        Path | None, f"File, {EMBEDDING_FILES}, to save the embeddings to. Default: none."
    ] = None,
    distance: shared.DistanceName = "cosine",
    p: shared.Order = 3.0,
    shrinkage: shared.Shrinkage = None,
    gallery: Annotated[
        Path | None, "Saved embeddings to fit Mahalanobis' covariance on. Default: the embeddings that are scored."
    ] = None,
    normalize: shared.Normalize = True,
    flip: shared.Flip = False,
    folds: Annotated[int, typer.Option(min=2), "Number of folds of the cross-validated accuracy."] = 10,
    pairs: Annotated[
        int,
        typer.Option(min=1),
        "Maximum number of pairs of one person, and of two people, to make from labeled images.",
    ] = 20_000,
    seed: Annotated[int, typer.Option(min=0), "Seed for choosing these pairs."] = 0,
    bad_data: shared.BadData = "skip",
    json: shared.Json = None,
    pictures: shared.Pictures = None,
    report: reporting.ReportBeside = None,
    no_report: reporting.NoReport = False,
    device: shared.Device = "cpu",
    batch_size: shared.BatchSize = 64,
    workers: shared.Workers = 0,
    trust: shared.Trust = False,
    max_pixels: shared.MaxPixels = MAX_PIXELS,
) -> None:
    """Verify pairs of people never seen in training: accuracy over folds, TAR at FAR, EER, thresholds.

    TAR at FAR x is the highest true accept rate whose false accept rate is at
    most x. Embeddings are normalized unless --raw is given. A score is the
    negated distance; with the cosine distance, thresholds are cosines.
    """
    settings = dict(locals())
    from fused_arcface.base.extras import require
    from fused_arcface.evaluation import make_distance, mean_scores, pair_scores, verify_scores
    from fused_arcface.evaluation.thresholds import operating_points
    from fused_arcface.evaluation.verification import check_folds

    from ..data.embedding_sets import EmbeddingSet, check_suffix
    from ..data.pair_sets import read_pair_set
    from ..evaluating import LEFT_OUT, both_kinds, described, prepared, verification_figures, with_pairs
    from ..report.digest import digest_pairs
    from ..report.evaluation import verification_drawings, verification_report
    from ..report.thumbnails import Thumbnails
    from ..thresholds import KeptThresholds, as_json, of_cosine_distance
    from ..training.runs import RunFolder

    if (embeddings is None) == (data is None or checkpoint is None):
        raise WrongOption("--data and --checkpoint must be given, or --embeddings alone")
    require("sklearn.metrics", "eval")
    page = reporting.ReportFile(report, no_report, reporting.beside("verify", json, pictures))
    read: ImageSet | None = None
    shared.check_results(settings)
    check_suffix(gallery, "gallery")
    fitted = None if gallery is None else EmbeddingSet.load(gallery).embeddings
    if embeddings is not None:
        scored = with_pairs(EmbeddingSet.load(embeddings), embeddings, pairs, seed)
    else:
        assert data is not None
        read = read_pair_set(data, images, most=pairs, seed=seed, max_pixels=max_pixels)
        assert read.pairs is not None
        if both_kinds(read.pairs.same):
            check_folds(folds, len(read.pairs.same))
        (scored,) = shared.embed_images([read], settings)
    if save_embeddings is not None:
        scored.save(save_embeddings)
    assert scored.pairs is not None
    rows = prepared(scored.embeddings, normalize)
    fitted = rows if fitted is None else prepared(fitted, normalize)
    chosen = make_distance(distance, order=p, gallery=fitted, shrinkage=shrinkage)
    scores = pair_scores(rows, scored.pairs, chosen)
    same = scored.pairs.same
    found = verify_scores(same, scores, folds=folds) if both_kinds(same) else None
    cosine = distance == "cosine" and normalize
    points = operating_points(same, scores) if found is not None else []
    points = of_cosine_distance(points) if cosine else points
    name = Path(data or str(embeddings)).name
    console = terminal()
    means = mean_scores(same, scores)
    tables = [_table(found, same, means, f"{name}, {distance}", cosine)]
    figures = verification_figures(found, same, means)
    if found is not None:
        of = "cosine" if cosine else "score"
        tables.append(_threshold_table(points, of))
        figures["thresholds"] = {"of": of, "points": as_json(points)}
    console.print(*tables)
    if found is None:
        say(console, f"Left out, because all pairs are of one kind: {', '.join(LEFT_OUT)}.")
    run = RunFolder(checkpoint) if checkpoint is not None else None
    if found is not None and cosine and not flip and run is not None and run.config.is_file():
        say(console, _keep(KeptThresholds(name, found.accuracy, points, pairs_of_two=found.num_pairs[1]), run))
    about = {**shared.about(settings, "data", "checkpoint", "embeddings"), "flip": flip}
    shared.write_json(json, {**about, **described(chosen, distance, normalize), **figures})
    if found is not None:
        shared.draw(console, verification_drawings(found, name), pictures)

    def make_report() -> Report:
        digest = None
        if found is not None and scored.pairs is not None:
            thumbnails, of_cosine = Thumbnails([] if read is None else [read]), distance == "cosine"
            digest = digest_pairs(name, found, scores, scored.pairs, scored.paths, thumbnails, cosine=of_cosine)
        return verification_report(name, tables, digest, found, settings)

    reporting.say_report(console, page.write(make_report))


def _table(found: Verification | None, same: Tensor, means: Means, title: str, cosine: bool) -> Table:
    """Return a table of the figures; with ``cosine`` means are of cosines, as the thresholds are."""
    different = int((~same).sum())
    table = plain_table(title, "")
    table.add_row("pairs of one person", str(int(same.sum())))
    table.add_row("pairs of two people", str(different))
    for kind, mean in zip(("one person", "two people"), means, strict=True):
        if mean is not None:
            shown = ("cosine", 1 + mean) if cosine else ("score", mean)
            table.add_row(f"mean {shown[0]}, {kind}", f"{shown[1]:.4f}")
    if found is not None:
        table.add_row(
            f"accuracy, {len(found.fold_accuracy)} folds", f"{found.accuracy:.4f} ± {found.accuracy_deviation:.4f}"
        )
        add_rates(table, found.eer, found.tar, different)
    return table


def _threshold_table(points: list[OperatingPoint], of: str) -> Table:
    from ..thresholds import as_text

    table = plain_table("Thresholds", f"{of} >=", "accuracy", "FAR", "TAR")
    for row in as_text(points):
        table.add_row(*row)
    return table


def _keep(kept: KeptThresholds, folder: RunFolder) -> str:
    """Write thresholds into a run's folder, and say so. A folder that cannot be written is not an error."""
    from ..training.runs import RunError

    try:
        folder.check_files()
        kept.save(folder.thresholds)
    except RunError as error:
        return f"{error}; the thresholds of this verification are not kept"
    except OSError as error:
        return f"{folder.thresholds} cannot be written: {error.strerror}; the run keeps its thresholds"
    return f"similarity uses these thresholds from now on: {folder.thresholds}"
