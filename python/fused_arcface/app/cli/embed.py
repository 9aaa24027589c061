"""``embed``: embeddings of images, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..data.formats.embeddings import SUFFIXES
from ..data.images import MAX_PIXELS
from . import evaluation as shared
from .errors import check_file
from .terminal import say, terminal


def embed(
    images: Annotated[
        list[str],
        typer.Argument(),
        "Any number of image files, folders (searched at any depth), .txt lists with a path on each line, and "
        ".rec files.",
    ],
    checkpoint: shared.OneCheckpoint,
    output: Annotated[Path, f"File for the embeddings and the names: {', '.join(SUFFIXES)} or .csv."],
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
    settings = dict(locals())
    from ..data.unlabeled import read_images
    from ..embedding import check_output

    check_output(output)
    check_file("--output", output)
    found = read_images(images, max_pixels=max_pixels)
    (embedded,) = shared.embed_images([found], settings, save=output, normalize=True)
    count, dim = embedded.embeddings.shape
    lost = f", {len(found) - count} left out" if count < len(found) else ""
    say(terminal(), f"{count} embeddings of dimension {dim} in {output}{lost}")
