"""What ``verify`` and ``identify`` share: their options, the embedding of images, and how they end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    import torch

    from ..evaluation import Distance
    from ..evaluation.embedding_sets import EmbeddingSet
    from ..evaluation.pair_sets import ImageSet

Checkpoint = Annotated[Path | None, typer.Option(help="Folder of a training run, whose newest net is evaluated.")]
DistanceName = Annotated[
    str, typer.Option("--distance", help="cosine, euclidean, p-norm, inner-product or mahalanobis.")
]
Order = Annotated[float, typer.Option("--p", help="Of the p-norm, at least 1.")]
Shrinkage = Annotated[
    float | None, typer.Option(help="Of Mahalanobis' covariance, 0 to 1; Ledoit and Wolf's by default.")
]
Normalize = Annotated[bool, typer.Option("--normalize/--raw", help="Embeddings of norm 1, or as the net gives them.")]
Flip = Annotated[bool, typer.Option("--flip", help="Add the embedding of the mirrored image.")]
Json = Annotated[Path | None, typer.Option("--json", help="File for the figures.")]
Pictures = Annotated[Path | None, typer.Option(help="Folder for pictures of the curves.")]
Device = Annotated[str, typer.Option(help="Of the net: cpu, cuda, cuda:1.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images that the net sees at once.")]
MaxPixels = Annotated[
    int, typer.Option(min=1, help="Pixels of the largest image that is decoded; others cannot be read.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Errors in what the user gave end the command with their message and status 1."""
    from ..checkpoint import CheckpointError
    from ..data import DataError, ImageError
    from ..training.runs import RunError

    try:
        yield
    except (DataError, ImageError, RunError, CheckpointError, OSError, ValueError) as wrong:
        Console(stderr=True, soft_wrap=True).print(str(wrong), style="bold red", markup=False)
        raise typer.Exit(1) from wrong


def embed_images(
    checkpoint: Path, sets: list[ImageSet], *, flip: bool, device: str, batch_size: int, workers: int
) -> list[EmbeddingSet]:
    """Embeddings of sets of images by a run's net, with a bar."""
    import torch

    from ..evaluation import embed_set
    from ..training.runs import load_backbone

    try:
        torch.empty(0, device=device)
    except (
        AssertionError,
        NotImplementedError,
        RuntimeError,
    ) as error:  # torch's for a device that is none, or missing
        raise typer.BadParameter(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    net, spec = load_backbone(checkpoint, device)
    console = Console(stderr=True, soft_wrap=True)
    for problem in dict.fromkeys(problem for images in sets for problem in images.problems):
        console.print(f"{problem}; skipped", style="yellow", markup=False, highlight=False)
    with Progress(transient=True) as bar:
        task = bar.add_task("images", total=sum(len(images) for images in sets))
        return [
            embed_set(
                net,
                images,
                spec,
                flip=flip,
                batch_size=batch_size,
                device=device,
                workers=workers,
                done=lambda count: bar.advance(task, count),
            )
            for images in sets
        ]


def prepared(embeddings: torch.Tensor, normalize: bool) -> torch.Tensor:
    """As they are compared."""
    import torch.nn.functional as F

    return F.normalize(embeddings) if normalize else embeddings


def described(distance: Distance, name: str, normalize: bool) -> dict[str, Any]:
    """How embeddings were compared, for the file of figures."""
    from ..evaluation import Mahalanobis

    found: dict[str, Any] = {"distance": name, "normalized": normalize}
    if name == "p-norm":
        found["p"] = distance.p
    if isinstance(distance, Mahalanobis):
        found["shrinkage"] = distance.shrinkage
    return found


def check_output(json: Path | None) -> None:
    """The file's folder exists from here on; that it cannot is said before anything is computed."""
    if json is None:
        return
    try:
        json.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--json {json} cannot be written: {error}") from None


def write_json(path: Path, figures: dict[str, Any]) -> None:
    from .. import __version__
    from ..benchmark import machine

    path.write_text(
        json.dumps({"fused_arcface": __version__, "date": machine.now(), **figures}, indent=1) + "\n", encoding="utf-8"
    )
