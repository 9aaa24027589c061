"""``export``: a trained net for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import use
from .errors import check_file, explained
from .terminal import terminal


def export(
    checkpoint: use.Checkpoint,
    output: Annotated[
        Path,
        typer.Option(help="File for the net: .onnx for ONNX, or .pt2 for torch.export.load."),
    ],
    backbone: use.Backbone = None,
    image_size: use.ImageSize = None,
    trust: use.Trust = False,
) -> None:
    r"""Export a net as a file for ONNX or torch.export, and check it against PyTorch.

    The input "images" is (N, channels, size, size), fp32 in [-1, 1]. The
    output "embeddings" is (N, D). Nothing is written if the check finds a difference
    above 1e-5. ONNX needs pip install "fused_arcface\[export]".
    """
    from ..export import check_suffix
    from ..export import export as export_net

    console = terminal(soft_wrap=True)
    with explained():
        check_suffix(output)
        check_file("--output", output)
        embedder = use.load(checkpoint, backbone, image_size, "cpu", trust)
        difference = export_net(embedder, output)
    channels, size, _ = embedder.spec.shape
    shape = f"(N, {channels}, {size}, {size})"
    console.print(
        f"{output}: images {shape} in [-1, 1] to unit embeddings; at most {difference:.1e} from PyTorch",
        markup=False,
        highlight=False,
    )
