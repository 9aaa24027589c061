"""``convert``: class centers between checkpoints, one safetensors file, insightface's shards and other libraries'
files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import terminal


def convert(
    sources: Annotated[list[Path], typer.Argument(help="Where the class centers are; several are joined in order.")],
    destination: Annotated[Path, typer.Argument(help="A .safetensors file, or a directory of checkpoints.")],
    classes: Annotated[
        int | None, typer.Option(help="Grow to this many classes; the new ones are initialized.")
    ] = None,
    sub_centers: Annotated[
        int | None,
        typer.Option(min=1, help="Centers of each class, where the file has no word of it (SubCenterArcFaceLoss)."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of new class centers and of the head that resumes.")] = None,
) -> None:
    """Convert, join and grow sets of class centers.

    A source is a training run, a checkpoint or a directory of some; a
    directory of insightface's checkpoint_gpu_{rank}.pt,
    softmax_fc_gpu_{rank}.pt or rank_{rank}_softmax_weight.pt of any number of
    ranks; a safetensors file with weight (C, D); or a .pt file with weight
    (C, D), pytorch-metric-learning's W (D, C), or one such tensor.
    """
    from fused_arcface.checkpoint import CheckpointError
    from fused_arcface.checkpoint import convert as conversion

    error = terminal(stderr=True, soft_wrap=True)
    try:
        written = conversion.convert(
            sources,
            destination,
            num_classes=classes,
            seed=seed,
            sub_centers=sub_centers,
            noted=lambda note: error.print(note, style="yellow", markup=False, highlight=False),
        )
        found = conversion.read(written)
    except (CheckpointError, conversion.ConvertError, OSError) as wrong:
        error.print(str(wrong), style="bold red", markup=False)
        raise typer.Exit(1) from wrong
    for name, rows in found.tensors.items():
        terminal(soft_wrap=True).print(
            f"{written}: {name} {rows.shape} {str(rows.dtype).removeprefix('torch.')}", markup=False
        )
    terminal(soft_wrap=True).print(
        f"{found.num_classes} classes of {found.sub_centers} center{'s' if found.sub_centers > 1 else ''}", markup=False
    )
