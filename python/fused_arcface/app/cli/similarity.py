"""``similarity``: do two images show one person?"""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated

import typer

from fused_arcface.base.reading import NoSuchData
from fused_arcface.base.suggest import missing_path

from ..thresholds import KeptThresholds
from . import evaluation as shared
from .terminal import say, terminal


def similarity(
    first: Annotated[Path, typer.Argument(metavar="A"), "An image."],
    second: Annotated[Path, typer.Argument(metavar="B"), "Another image."],
    checkpoint: shared.OneCheckpoint,
    backbone: shared.Backbone = None,
    image_size: shared.ImageSize = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1.0, max=1.0),
        "Smallest cosine, from -1 to 1, at which two images count as one person. Default: the "
        "threshold of the run's last verification.",
    ] = None,
    far: Annotated[
        float | None,
        "False accept rate, 0.001 for example, for which the run's threshold is taken. Default: the threshold "
        "of the best accuracy.",
    ] = None,
    device: shared.Device = "cpu",
    trust: shared.Trust = False,
) -> None:
    """Compute the cosine of two images' embeddings and decide if they show one person.

    The decision needs a threshold: --threshold, or one that the run keeps
    from --verify-data or from the command verify.
    """
    from ..embedder import load_embedder

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
    source, kept = "as given", embedder.thresholds
    if threshold is None and kept is not None:
        threshold, source = kept.at(far).threshold, _source(kept, far)
    elif far is not None:
        raise ValueError(f"--far needs the thresholds of a run, and {checkpoint} has none; {_how(checkpoint)}")
    say(terminal(), f"cosine {cosine:.4f}")
    if threshold is None:
        say(terminal(), f"No verdict, because {checkpoint} has no thresholds; {_how(checkpoint)}")
    else:
        verdict = "one person" if cosine >= threshold else "two people"
        shown = "accepts nobody" if math.isinf(threshold) else f"{threshold:.4f}"
        say(terminal(), f"{verdict}: threshold {shown} ({source})")


def _source(kept: KeptThresholds, far: float | None) -> str:
    """Say where a run's threshold comes from, and how good it was there."""
    point = kept.at(far)
    rates = f"{point.accuracy:.1%} of its pairs right, {point.false_accept_rate:.2%} of two people accepted"
    text = f"{point.name} on {kept.data}: {rates}"
    if far is not None and kept.pairs_of_two is not None and far * kept.pairs_of_two < 1:
        text += f"; its {kept.pairs_of_two} pairs of two people are too few to measure this rate"
    return text


def _how(checkpoint: Path) -> str:
    """Say how a net without thresholds gets one: a run keeps those of ``verify``, other files of weights do not."""
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    own = "give one with --threshold, 0.3 for example"
    if not (run / "config.toml").is_file():
        return own
    command = f"fused-arcface verify --data PEOPLE --checkpoint {shlex.quote(str(run))}"
    return f"{own}, or measure some on labeled images: {command}"
