"""A trained net as a file for other programs: ONNX, checked by onnxruntime, or a program of ``torch.export``."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_arcface.base.extras import require
from fused_arcface.base.files import write_bytes

from .embedder import Embedder

TOLERANCE = 1e-5
"""Largest difference from PyTorch that an element of a unit embedding may have."""
_ONNX, _PROGRAM = ".onnx", ".pt2"
_BATCHES = (1, 3)
_TRACED = 2  # torch.export takes batches of 0 and 1 for fixed numbers
_Net = Callable[[Tensor], Tensor]


class ExportError(RuntimeError):
    """An exported net that does not compute what PyTorch does."""


class _UnitEmbeddings(nn.Module):
    """The part of an embedder that computes: input tensors to unit embeddings."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.net(images).float())


def check_suffix(path: Path) -> None:
    """Raise ValueError unless a net can be exported to a file of this name, ``.onnx`` or ``.pt2``."""
    if path.suffix not in (_ONNX, _PROGRAM):
        raise ValueError(f"a net must be exported to a .onnx or a .pt2 file; got {path}")


@torch.no_grad()
def export(embedder: Embedder, path: Path) -> float:
    """Write a net that takes any number of images; the file appears after the result was checked.

    The input ``images`` is ``(N, channels, size, size)`` fp32 in [-1, 1]. The output ``embeddings`` is ``(N, D)``, with
    rows of norm 1.

    Args:
        embedder: the net with its preprocessing, on any device; it is exported for the CPU.
        path: ``.onnx``, or ``.pt2`` for a program that ``torch.export.load`` reads.

    Returns:
        The largest difference from PyTorch, over batches of 1 and 3 random images.

    Raises:
        ValueError: if the path has another suffix.
        ExportError: if the difference is above :data:`TOLERANCE`.
        MissingExtra: if onnx, onnxscript or onnxruntime is not installed.
    """
    check_suffix(path)
    if path.suffix == _ONNX:
        for library in ("onnx", "onnxscript", "onnxruntime"):
            require(library, "export")
    net = _UnitEmbeddings(embedder.net.cpu()).eval()
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(_TRACED, *embedder.spec.shape, generator=generator) * 2 - 1
    program = torch.export.export(net, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    content, exported = (_as_onnx if path.suffix == _ONNX else _as_program)(program)
    batches = [torch.rand(count, *embedder.spec.shape, generator=generator) * 2 - 1 for count in _BATCHES]
    differences = [float((exported(images) - net(images)).abs().max()) for images in batches]
    difference = float(np.max(differences))  # NaN if one of them is
    if not difference <= TOLERANCE:
        raise ExportError(f"{path} differs from PyTorch by {difference:g}, more than {TOLERANCE:g}; it was not written")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return difference


def _as_onnx(program: torch.export.ExportedProgram) -> tuple[bytes, _Net]:
    """Return the content of an ONNX file, and the net that onnxruntime makes of it."""
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["embeddings"]}
    with _quiet():
        exported = torch.onnx.export(program, **names, dynamo=True, verbose=False)
    assert exported is not None
    content = exported.model_proto.SerializeToString()
    session = require("onnxruntime", "export").InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(["embeddings"], {"images": images.numpy()})[0])


def _as_program(program: torch.export.ExportedProgram) -> tuple[bytes, _Net]:
    """Return the content of a file for ``torch.export.load``, and the net that it makes of it."""
    file = io.BytesIO()
    torch.export.save(program, file)
    content = file.getvalue()
    file.seek(0)
    return content, torch.export.load(file).module()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of torch and onnxscript about their own parts and about libraries that a net does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
