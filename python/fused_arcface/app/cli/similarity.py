"""``similarity``: do two images show one person?"""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated

import typer

from fused_arcface.base.reading import NoSuchData
from fused_arcface.base.suggest import missing_path

from . import evaluation as shared
from .errors import explained
from .terminal import say, terminal


def similarity(
    first: Annotated[Path, typer.Argument(metavar="A", help="An image.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another image.")],
    checkpoint: shared.OneCheckpoint,
    backbone: shared.Backbone = None,
    image_size: shared.ImageSize = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=-1.0,
            max=1.0,
            help="Smallest cosine, from -1 to 1, at which two images count as one person. Default: the "
            "threshold of the run's last verification.",
            show_default=False,
        ),
    ] = None,
    far: Annotated[
        float | None,
        typer.Option(
            help="False accept rate, 0.001 for example, for which the run's threshold is taken. Default: the threshold "
            "of the best accuracy.",
            show_default=False,
        ),
    ] = None,
    device: shared.Device = "cpu",
    trust: shared.Trust = False,
) -> None:
    """Compute the cosine of two images' embeddings and decide if they show one person.

    The decision needs a threshold: --threshold, or one that the run keeps
    from --verify-data or from the command verify.
    """
    from ..embedder import load_embedder

    with explained():
        if threshold is not None and far is not None:
            raise ValueError("--threshold and --far can't be given together")
        for image in (first, second):
            if not image.exists():
                raise NoSuchData(missing_path(image))
            if image.is_dir():
                raise ValueError(f"{image} must be an image file; it is a folder")
        embedder = load_embedder(checkpoint, backbone, device=device, image_size=image_size, trust=trust)
        one, other = embedder([first, second]).double().cpu()
        cosine = float(one @ other)
        lines = [f"cosine {cosine:.4f}"]
        kept = embedder.thresholds
        if threshold is None and kept is not None:
            point = kept.at(far)
            threshold = point.threshold
            source = (
                f"{point.name} on {kept.data}: {point.accuracy:.1%} of its pairs right, "
                f"{point.false_accept_rate:.2%} of two people accepted"
            )
            if far is not None and kept.pairs_of_two is not None and far * kept.pairs_of_two < 1:
                source += f"; its {kept.pairs_of_two} pairs of two people are too few to measure this rate"
        else:
            source = "as given"
        if threshold is None and far is not None:
            raise ValueError(f"--far needs the thresholds of a run, and {checkpoint} has none; {_how(checkpoint)}")
        if threshold is None:
            lines.append(f"No verdict, because {checkpoint} has no thresholds; {_how(checkpoint)}")
        else:
            verdict = "one person" if cosine >= threshold else "two people"
            shown = "accepts nobody" if math.isinf(threshold) else f"{threshold:.4f}"
            lines.append(f"{verdict}: threshold {shown} ({source})")
    for line in lines:
        say(terminal(), line)


def _how(checkpoint: Path) -> str:
    """Say how a net without thresholds gets one: a run keeps those of ``verify``, other files of weights do not."""
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    own = "give one with --threshold, 0.3 for example"
    if not (run / "config.toml").is_file():
        return own
    command = f"fused-arcface verify --data PEOPLE --checkpoint {shlex.quote(str(run))}"
    return f"{own}, or measure some on labeled images: {command}"
