"""``convert``: class centers between checkpoints, safetensors files and other projects' files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fused_arcface.base.text import counted

from .evaluation import Trust
from .terminal import say, terminal


def convert(
    sources: Annotated[
        list[Path], typer.Argument(), "Files or folders of class centers. Their classes are joined in this order."
    ],
    destination: Annotated[
        Path, typer.Argument(), "A .safetensors file, or a folder of checkpoints, which is made if it is missing."
    ],
    classes: Annotated[
        int | None,
        "Number of classes to grow to; the new ones get initial centers. Default: as many as the sources have.",
    ] = None,
    sub_centers: Annotated[
        int | None,
        typer.Option(min=1),
        "Number of centers of each class, for a file that does not store it (SubCenterArcFaceLoss). "
        "Default: the source's, otherwise 1.",
    ] = None,
    embedding_dim: Annotated[
        int | None,
        typer.Option(min=1),
        "D, for a .pt file of another project that does not say which side of its tensor is D.",
    ] = None,
    dominant: Annotated[
        Path | None,
        "A .safetensors file with dominant (C,): keep this one of the centers of each class. "
        "fused_arcface.sub_centers finds it.",
    ] = None,
    seed: Annotated[
        int | None,
        "Seed of new class centers and of the head that resumes, 0 or more. Default: the source's, otherwise 0.",
    ] = None,
    center_storage: Annotated[
        Path | None,
        "With a folder of checkpoints: a new folder for a file of the class centers, as train "
        "--center-storage uses it. Default: they are in the checkpoint.",
    ] = None,
    trust: Trust = False,
) -> None:
    """Convert, join and grow sets of class centers.

    A source is a training run, a checkpoint or a directory of checkpoints; a
    directory of insightface's checkpoint_gpu_{rank}.pt,
    softmax_fc_gpu_{rank}.pt or rank_{rank}_softmax_weight.pt of any number of
    ranks; a safetensors file with weight (C, D); or a .pt file with weight
    (C, D), pytorch-metric-learning's W (D, C), the head of AdaFace, CVLface,
    ElasticFace, MagFace, CurricularFace, FaceX-Zoo, face.evoLVe, TFace,
    InsightFace_Pytorch, Face_Pytorch, UniFace or opensphere, a checkpoint of
    Lightning, or one such tensor.
    """
    from fused_arcface.checkpoint.convert import convert as convert_centers
    from fused_arcface.checkpoint.sources import read

    console = terminal(soft_wrap=True)
    written = convert_centers(
        sources,
        destination,
        num_classes=classes,
        seed=seed,
        sub_centers=sub_centers,
        embedding_dim=embedding_dim,
        dominant=dominant,
        trust=trust,
        center_storage=center_storage,
        noted=lambda note: say(terminal(stderr=True), note, "yellow"),
    )
    found = read(written)
    for name, rows in found.tensors.items():
        console.print(f"{written}: {name} {rows.shape} {str(rows.dtype).removeprefix('torch.')}", markup=False)
    console.print(f"{found.num_classes} classes of {counted(found.sub_centers, 'center')}", markup=False)
