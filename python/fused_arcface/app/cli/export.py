"""``export``: a trained net for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from . import evaluation as shared
from .errors import check_file
from .terminal import say, terminal


def export(
    checkpoint: shared.OneCheckpoint,
    output: Annotated[Path, "File for the net: .onnx for ONNX, or .pt2 for torch.export.load."],
    backbone: shared.Backbone = None,
    image_size: shared.ImageSize = None,
    trust: shared.Trust = False,
) -> None:
    r"""Export a net as a file for ONNX or torch.export, and check it against PyTorch.

    The input "images" is (N, channels, size, size), fp32 in [-1, 1]. The
    output "embeddings" is (N, D). Nothing is written if the check finds a difference
    above 1e-5. ONNX needs pip install "fused_arcface\[export]".
    """
    from ..embedder import load_embedder
    from ..export import check_suffix
    from ..export import export as export_net

    check_suffix(output)
    check_file("--output", output)
    embedder = load_embedder(checkpoint, backbone, image_size=image_size, trust=trust)
    difference = export_net(embedder, output)
    channels, size, _ = embedder.spec.shape
    inputs = f"images (N, {channels}, {size}, {size}) in [-1, 1]"
    say(terminal(), f"{output}: {inputs} to unit embeddings; at most {difference:.1e} from PyTorch")
