"""``embed``: embeddings of images, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ..data.formats.embeddings import SUFFIXES
from ..data.images import MAX_PIXELS
from . import evaluation as shared
from .errors import check_file, explained
from .terminal import Problems, say, terminal


def embed(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Any number of image files, folders (searched at any depth), .txt lists with a path on each line, and "
            ".rec files."
        ),
    ],
    checkpoint: shared.OneCheckpoint,
    output: Annotated[
        Path, typer.Option(help=f"File for the embeddings and the names: {', '.join(SUFFIXES)} or .csv.")
    ],
    backbone: shared.Backbone = None,
    image_size: shared.ImageSize = None,
    flip: shared.Flip = False,
    batch_size: shared.BatchSize = 64,
    workers: shared.Workers = 0,
    max_pixels: shared.MaxPixels = MAX_PIXELS,
    device: shared.Device = "cpu",
    trust: shared.Trust = False,
) -> None:
    """Embed images and write the unit vectors and the names of the images to a file.

    An interrupted command resumes when you call it again. Images that cannot
    be read are reported and left out.
    """
    from ..data.unlabeled import read_images
    from ..embedder import load_embedder
    from ..embedding import check_output, embed_to_file

    error = terminal(stderr=True, soft_wrap=True)
    tell = Problems(error, "; left out")
    with explained():
        check_output(output)
        check_file("--output", output)
        embedder = load_embedder(checkpoint, backbone, device=device, image_size=image_size, trust=trust)
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
    tell.end()
    count, dim = embedded.embeddings.shape
    lost = f", {len(found) - count} left out" if count < len(found) else ""
    say(terminal(), f"{count} embeddings of dimension {dim} in {output}{lost}")
