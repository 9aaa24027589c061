"""The options that several commands share, the embedding of images for ``verify`` and its like, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from fused_arcface.base.text import listed
from fused_arcface.evaluation.distances import NAMES as DISTANCES

from .errors import check_file, check_folder, one_of
from .terminal import Problems, say, terminal

if TYPE_CHECKING:
    from ..data.embedding_sets import EmbeddingSet
    from ..data.sources import ImageSet
    from ..drawing import Drawing

_NET = (
    "The net: the folder of a training run, its model.pt or best.pt, or any file of weights together with --backbone."
)
Checkpoint = Annotated[Path | None, f"{_NET} For a folder, the newest checkpoint is evaluated."]
OneCheckpoint = Annotated[Path, _NET]
Backbone = Annotated[
    str | None, "Name of the net in a file of weights, iresnet50 for example. Default: the run's own net."
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1),
    "Side of the net's input images in pixels, for a file of weights. Default: the net's own, 112 for insightface's.",
]
DistanceName = Annotated[
    str,
    typer.Option(callback=one_of("--distance", DISTANCES)),
    f"Distance between two embeddings: {listed(DISTANCES, 'or')}.",
]
Order = Annotated[float, typer.Option(min=1.0), "Order of the p-norm, 1 or more; only --distance p-norm uses it."]
Shrinkage = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0),
    "Shrinkage of Mahalanobis' covariance, from 0 (none) to 1. Default: Ledoit and Wolf's estimate.",
]
Normalize = Annotated[
    bool,
    typer.Option("--normalize/--raw"),
    "Normalize the embeddings to length 1 before comparing them, or use them as they are.",
]
Flip = Annotated[bool, typer.Option("--flip"), "Add the embedding of the mirrored image to that of the image."]
Json = Annotated[Path | None, "JSON file to write the figures to. Default: none."]
Pictures = Annotated[Path | None, "Folder for pictures of the curves; it is created if missing. Default: none."]
Trust = Annotated[
    bool,
    typer.Option("--trust"),
    "Allow a checkpoint of an old format to run code when it is loaded. Use it only if you trust the author.",
]
Device = Annotated[str, "Device that the net runs on: cpu, cuda, or cuda:N for one of several GPUs."]
BatchSize = Annotated[int, typer.Option(min=1), "Number of images that the net sees at once."]
MaxPixels = Annotated[
    int,
    typer.Option(min=1),
    "Largest image that is decoded, as width times height in pixels. A larger one counts as unreadable.",
]
Workers = Annotated[int, typer.Option(min=0), "Number of processes that read images; 0 reads in this one."]
BadData = Annotated[
    str,
    typer.Option(callback=one_of("--bad-data", ("skip", "stop"))),
    "With skip, an image that is missing or cannot be read is reported and left out. With stop, it ends the command.",
]


def check_results(options: Mapping[str, Any]) -> None:
    """Raise an error unless the files and the folder for results that a command's options name can be written."""
    from ..data.embedding_sets import check_suffix

    for name in ("json", "save_embeddings", "predictions"):
        check_file(f"--{name.replace('_', '-')}", options.get(name))
    check_folder("--pictures", options.get("pictures"))
    check_suffix(options.get("save_embeddings"), "save_embeddings")


def embed_images(
    sets: list[ImageSet], options: Mapping[str, Any], *, save: Path | None = None, normalize: bool = False
) -> list[EmbeddingSet]:
    """Embed sets of images by the net that a command's options name, with a progress bar.

    With ``save`` the embeddings of the one set go to a file, in parts, so that an interrupted command resumes; see
    :func:`fused_arcface.app.embedding.embed_to_file`. There alone they may be normalized.

    Raises:
        DataError: if there is a problem in the data and ``bad_data`` is ``"stop"``, or no image can be read.
    """
    from ..data.embedding_sets import embed_set
    from ..embedder import load_embedder
    from ..embedding import embed_to_file
    from ..evaluating import lost
    from ..training.resolve import check_problems

    how = {name: options[name] for name in ("device", "image_size", "trust")}
    embedder = load_embedder(options["checkpoint"], options["backbone"], **how)
    console = terminal(stderr=True, soft_wrap=True)
    problems = Problems(console, "; skipped")

    def tell(problem: str) -> None:
        check_problems([problem], options.get("bad_data"))
        problems(problem)

    for note in dict.fromkeys(note for images in sets for note in images.notes):
        say(console, note, "yellow")
    for problem in dict.fromkeys(problem for images in sets for problem in images.problems):
        tell(problem)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=sum(len(images) for images in sets))
        how = {name: options[name] for name in ("flip", "batch_size", "workers")}
        how |= {"unreadable": tell, "done": lambda count: bar.advance(task, count)}
        if save is not None:
            (images,) = sets
            found = [embed_to_file(embedder, images, save, normalize=normalize, **how)]
        else:
            found = [embed_set(embedder.net, each, embedder.spec, device=options["device"], **how) for each in sets]
    problems.end()
    for images, embedded in zip(sets, found, strict=True):
        if gone := lost(images, embedded):
            say(console, f"left out: {gone}", "yellow")
    return found


def draw(console: Console, drawings: list[Drawing], folder: Path | None) -> None:
    """Write pictures into a folder, if one is wanted, and print their names."""
    from ..drawing import write_pictures

    for path in write_pictures(drawings, folder) if folder is not None else ():
        say(console, str(path))


def about(options: Mapping[str, Any], *names: str) -> dict[str, str | None]:
    """Return the values of the options that name what was evaluated, for the JSON file."""
    return {name: None if options[name] is None else str(options[name]) for name in names}


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures to a JSON file, if one is wanted, with the version of this package and the date."""
    from fused_arcface import __version__
    from fused_arcface.base.files import write_text

    from ..measure import machine

    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"fused_arcface": __version__, "date": machine.now(), **figures}, indent=1) + "\n")
