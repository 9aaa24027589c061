"""``templates``: the protocol of IJB-B and IJB-C, 1:1 and 1:N of templates of many images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from ..data.formats.embeddings import EMBEDDING_FILES
from ..data.images import MAX_PIXELS
from . import evaluation as shared
from .errors import WrongOption
from .tables import add_rates, plain_table
from .terminal import say, terminal

if TYPE_CHECKING:
    from ..templates import TemplateFigures


def templates(
    data: Annotated[
        str, "Folder of the set, as insightface packs IJB-B and IJB-C: faces in loose_crop, lists in meta."
    ],
    checkpoint: shared.Checkpoint = None,
    backbone: shared.Backbone = None,
    image_size: shared.ImageSize = None,
    embeddings: Annotated[
        Path | None, f"Saved embeddings of the set's faces, {EMBEDDING_FILES}, to score without the net."
    ] = None,
    save_embeddings: Annotated[
        Path | None,
        f"File, {EMBEDDING_FILES}, to save the embeddings to. An interrupted command then resumes "
        "when it is called again. Default: none.",
    ] = None,
    flip: Annotated[bool, "Add the embedding of the mirrored image to that of the image."] = True,
    scores: Annotated[bool, "Weigh each image by the face detector's score."] = True,
    norms: Annotated[bool, "Keep the norms of the embeddings: sharp images count more then."] = True,
    bad_data: shared.BadData = "skip",
    json: shared.Json = None,
    device: shared.Device = "cpu",
    batch_size: shared.BatchSize = 64,
    workers: shared.Workers = 0,
    trust: shared.Trust = False,
    max_pixels: shared.MaxPixels = MAX_PIXELS,
) -> None:
    """Evaluate templates of many images, as IJB-B and IJB-C do: 1:1 pairs and 1:N galleries.

    Images are averaged within a photo or video, and these are added up
    over the template. The defaults are those of insightface's evaluation.
    """
    settings = dict(locals())
    from fused_arcface.base.extras import require

    from ..data.embedding_sets import EmbeddingSet
    from ..data.formats.templates import read_templates
    from ..templates import evaluate_templates, template_figures

    if (embeddings is None) == (checkpoint is None):
        raise WrongOption("--checkpoint or --embeddings must be given, not both")
    if save_embeddings is not None and checkpoint is None:
        raise WrongOption("--save-embeddings goes with --checkpoint")
    require("sklearn.metrics", "eval")
    shared.check_results(settings)
    read = read_templates(data, max_pixels)
    if embeddings is not None:
        embedded = EmbeddingSet.load(embeddings)
    else:
        (embedded,) = shared.embed_images([read.images], settings, save=save_embeddings)
    found = evaluate_templates(read, embedded, scores=scores, norms=norms)
    console = terminal()
    _print(console, found, f"{Path(data).name}, {len(embedded.paths)} images in {found.num_templates} templates")
    for text in found.left_out:
        say(console, f"left out: {text}")
    if read.scores is None and scores:
        console.print("The set has no detector's scores: each image counts alike.", highlight=False)
    about = {
        **shared.about(settings, "data", "checkpoint", "embeddings"),
        "flip": flip if embeddings is None else None,
        "scores": scores and read.scores is not None,
        "norms": norms,
    }
    shared.write_json(json, {**about, **template_figures(found)})


def _print(console: Console, found: TemplateFigures, title: str) -> None:
    from ..templates import RANKS, mean_figures

    if found.rates is not None:
        table = plain_table(f"{title}, 1:1", "")
        same, different = found.rates.num_pairs
        table.add_row("pairs of one person", str(same))
        table.add_row("pairs of two people", str(different))
        add_rates(table, found.rates.eer, found.rates.tar, different)
        console.print(table)
    if found.searches:
        table = plain_table(f"{title}, 1:N", *found.searches, "mean")
        every, mean = list(found.searches.values()), mean_figures(found.searches)
        table.add_row("people in the gallery", *(str(each.num_identities) for each in every), "")
        table.add_row("probes of them", *(str(each.num_mated) for each in every), "")
        table.add_row("probes of others", *(str(each.num_unmated) for each in every), "")
        for rank in RANKS:
            rates = [each.rank(rank) for each in every]
            table.add_row(f"rank {rank}", *(f"{rate:.4f}" for rate in [*rates, mean["rank"][str(rank)]]))
        for fpir, rate in mean["tpir_at_fpir"].items():
            rates = [each.tpir[float(fpir)] for each in every]
            table.add_row(f"TPIR at FPIR {fpir}", *(f"{each:.4f}" for each in [*rates, rate]))
        console.print(table)
