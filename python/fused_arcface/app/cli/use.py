"""The options that name a net, for ``embed``, ``similarity`` and ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .evaluation import Backbone as Backbone
from .evaluation import Device as Device
from .evaluation import ImageSize as ImageSize
from .evaluation import Trust as Trust

if TYPE_CHECKING:
    from ..embedder import Embedder

Checkpoint = Annotated[
    Path,
    typer.Option(
        help="The net: the folder of a training run, its model.pt or best.pt, or any file of weights together with "
        "--backbone.",
    ),
]


def load(checkpoint: Path, backbone: str | None, image_size: int | None, device: str, trust: bool) -> Embedder:
    """Load the net that the options name."""
    from ..embedder import load_embedder

    return load_embedder(checkpoint, backbone, device=device, image_size=image_size, trust=trust)
