"""``embed``: embeddings of images, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ..data.images import MAX_PIXELS
from . import use
from .errors import check_file, explained
from .terminal import MOST_PROBLEMS, terminal


def embed(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Any number of image files, folders (searched at any depth), .txt lists with a path on each line, and "
            ".rec files."
        ),
    ],
    checkpoint: use.Checkpoint,
    output: Annotated[Path, typer.Option(help="File for the embeddings and the names: .npz, .safetensors or .csv.")],
    backbone: use.Backbone = None,
    image_size: use.ImageSize = None,
    flip: Annotated[
        bool, typer.Option("--flip", help="Add the embedding of the mirrored image to that of the image.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images that the net sees at once.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that read images; 0 reads in this one.")] = 0,
    max_pixels: Annotated[
        int,
        typer.Option(
            min=1, help="Largest image that is decoded, as width times height in pixels. A larger one is left out."
        ),
    ] = MAX_PIXELS,
    device: use.Device = "cpu",
    trust: use.Trust = False,
) -> None:
    """Embed images and write the unit vectors and the names of the images to a file.

    An interrupted command resumes when you call it again. Images that cannot
    be read are reported and left out.
    """
    from ..data.unlabeled import read_images
    from ..embedding import check_output, embed_to_file

    console, error = terminal(soft_wrap=True), terminal(stderr=True, soft_wrap=True)
    told = 0

    def tell(problem: str) -> None:
        nonlocal told
        told += 1
        if told <= MOST_PROBLEMS:
            error.print(f"{problem}; left out", style="yellow", markup=False, highlight=False)

    with explained():
        check_output(output)
        check_file("--output", output)
        embedder = use.load(checkpoint, backbone, image_size, device, trust)
        found = read_images(images, max_pixels=max_pixels)
        for problem in found.problems:
            tell(problem)
        with Progress(console=error, transient=True, disable=not error.is_terminal) as bar:
            task = bar.add_task("images", total=len(found))
            embedded = embed_to_file(
                embedder,
                found,
                output,
                flip=flip,
                batch_size=batch_size,
                workers=workers,
                done=lambda count: bar.advance(task, count),
                unreadable=tell,
            )
    if told > MOST_PROBLEMS:
        error.print(f"and {told - MOST_PROBLEMS} more such problems; left out", style="yellow")
    count, dim = embedded.embeddings.shape
    lost = f", {len(found) - count} left out" if count < len(found) else ""
    console.print(f"{count} embeddings of dimension {dim} in {output}{lost}", markup=False, highlight=False)
