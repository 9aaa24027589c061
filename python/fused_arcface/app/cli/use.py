"""The options that name a net, for ``embed``, ``similarity`` and ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..embedder import Embedder

Checkpoint = Annotated[
    Path,
    typer.Option(
        help="The net: the folder of a training run, its model.pt or best.pt, or any file of weights together with "
        "--backbone.",
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="Name of the net in a file of weights, iresnet50 for example. Default: the run's own net.",
        show_default=False,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Side of the net's input images in pixels, for a file of weights. Default: the net's own, 112 for "
        "insightface's.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="Device of the net: cpu, cuda or cuda:N.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Allow a checkpoint of an old format to run code when it is loaded. Use it only if you trust the author.",
    ),
]


def load(checkpoint: Path, backbone: str | None, image_size: int | None, device: str, trust: bool) -> Embedder:
    """Load the net that the options name."""
    from ..embedder import load_embedder

    return load_embedder(checkpoint, backbone, device=device, image_size=image_size, trust=trust)
