"""``identify``: 1:N, who is it? A trained net searches a gallery."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.table import Table

from fused_arcface.evaluation.search import Engine

from ..data import formats
from ..data.formats.embeddings import EMBEDDING_FILES
from ..data.images import MAX_PIXELS
from . import evaluation as shared
from . import reporting
from .errors import WrongOption, one_of
from .tables import plain_table
from .terminal import terminal

if TYPE_CHECKING:
    from fused_arcface.evaluation import Identification

    from ..data.sources import ImageSet
    from ..report.document import Report


def identify(
    data: Annotated[str | None, f"Labeled images to split into gallery and probes: {formats.listed()}."] = None,
    checkpoint: shared.Checkpoint = None,
    backbone: shared.Backbone = None,
    image_size: shared.ImageSize = None,
    gallery: Annotated[str | None, "Labeled images of the known people; needs --probes and replaces --data."] = None,
    probes: Annotated[
        str | None, "Labeled images to look for in --gallery. Images with the same label show the same person."
    ] = None,
    embeddings: Annotated[
        Path | None, f"Saved embeddings with labels, {EMBEDDING_FILES}, to split and score instead of images."
    ] = None,
    save_embeddings: Annotated[
        Path | None, f"File, {EMBEDDING_FILES}, to save the embeddings of --data to. Default: none."
    ] = None,
    gallery_images: Annotated[
        int, typer.Option(min=1), "Number of images of each identity in the gallery, when the command splits."
    ] = 1,
    unknown: Annotated[
        float,
        typer.Option(min=0.0, max=1.0),
        "Share of the identities, 0 to 1, kept out of the gallery, when the command splits.",
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0), "Seed of the split."] = 0,
    bad_data: shared.BadData = "skip",
    ranks: Annotated[int, typer.Option(min=1), "Highest rank of the identification curve (CMC)."] = 20,
    engine: Annotated[
        str,
        typer.Option(callback=one_of("--engine", get_args(Engine))),
        "Search engine: torch, faiss, or auto (faiss if it is installed and supports the distance). All are exact.",
    ] = "auto",
    distance: shared.DistanceName = "cosine",
    p: shared.Order = 3.0,
    shrinkage: shared.Shrinkage = None,
    normalize: shared.Normalize = True,
    flip: shared.Flip = False,
    predictions: Annotated[
        Path | None, ".csv file to write each probe's nearest gallery images and their scores to. Default: none."
    ] = None,
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
    """Identify people never seen in training: rank 1, 5 and 10, open-set TPIR at FPIR.

    Rank k counts the probes of people in the gallery whose person is among
    the k nearest. The probes of other people set the threshold of TPIR at
    FPIR. Mahalanobis' covariance is fitted on the gallery.
    """
    settings = dict(locals())
    from fused_arcface.evaluation import identify as search
    from fused_arcface.evaluation import make_distance, split_gallery
    from fused_arcface.evaluation.search import choose_engine

    from ..data.embedding_sets import EmbeddingSet
    from ..data.pair_sets import read_labeled
    from ..evaluating import described, identification_figures, prepared, split_set, two_sets, with_labels_by_name
    from ..predictions import write_predictions
    from ..report.answers import Answers
    from ..report.evaluation import identification_drawings, identification_report
    from ..report.thumbnails import Thumbnails

    given = [data is not None, gallery is not None and probes is not None, embeddings is not None]
    if sum(given) != 1 or (embeddings is None) == (checkpoint is None) or (gallery is None) != (probes is None):
        raise WrongOption(
            "one of --data, --gallery with --probes, and --embeddings must be given, images with --checkpoint"
        )
    if save_embeddings is not None and data is None:
        raise WrongOption("--save-embeddings goes with --data")
    page = reporting.ReportFile(report, no_report, reporting.beside("identify", json, pictures))
    sources: list[ImageSet] = []
    shared.check_results(settings)
    if distance != "mahalanobis":  # any engine can search by that one
        choose_engine(engine, make_distance(distance, order=p))
    if gallery is not None and probes is not None:
        sources = two_sets(gallery, probes, max_pixels)
        split = with_labels_by_name(sources, shared.embed_images(sources, settings))
    else:
        if embeddings is not None:
            labeled = EmbeddingSet.load(embeddings)
        else:
            assert data is not None
            sources = [read_labeled(data, max_pixels=max_pixels)]
            assert sources[0].labels is not None
            split_gallery(sources[0].labels, gallery_images=gallery_images, unknown=unknown)  # checks both options
            (labeled,) = shared.embed_images(sources, settings)
        if save_embeddings is not None:
            labeled.save(save_embeddings)
        split = split_set(labeled, gallery_images, unknown, seed)
    known, sought = prepared(split.gallery, normalize), prepared(split.probes, normalize)
    chosen = make_distance(distance, order=p, gallery=known, shrinkage=shrinkage)
    found = search(
        known,
        split.gallery_labels,
        sought,
        split.probe_labels,
        distance=chosen,
        max_rank=ranks,
        engine=engine,  # type: ignore[arg-type]
    )
    name = Path(data or probes or str(embeddings)).name
    console = terminal()
    table = _table(found, f"{name}, {distance}")
    console.print(table)
    about = {**shared.about(settings, "data", "gallery", "probes", "checkpoint", "embeddings"), "flip": flip}
    shared.write_json(json, {**about, **described(chosen, distance, normalize), **identification_figures(found)})
    compared = split._replace(gallery=known, probes=sought)
    if predictions is not None:
        write_predictions(predictions, compared, chosen, engine)  # type: ignore[arg-type]
    shared.draw(console, identification_drawings(found, name), pictures)

    def make_report() -> Report:
        answers = Answers(compared, found, cosine=distance == "cosine")
        return identification_report(name, [table], found, answers, Thumbnails(sources), settings)

    reporting.say_report(console, page.write(make_report))


def _table(found: Identification, title: str) -> Table:
    table = plain_table(title, "")
    table.add_row("people in the gallery", str(found.num_identities))
    table.add_row("images of them there", str(found.num_gallery))
    table.add_row("probes of them", str(found.num_mated))
    table.add_row("probes of others", str(found.num_unmated))
    for r in (1, 5, 10):
        table.add_row(f"rank {r}", f"{found.rank(r):.4f}" if r <= len(found.cmc) else "beyond the curve")
    for fpir, rate in found.tpir.items():
        table.add_row(f"TPIR at FPIR {fpir:g}", f"{rate:.4f}")
    return table
