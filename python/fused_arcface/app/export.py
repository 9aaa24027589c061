"""A trained net as a file for other programs: ONNX, checked by onnxruntime, or a program of ``torch.export``."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
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
    """Raise unless a net can be exported to a file of this name.

    Raises:
        ValueError: if the suffix is not ``.onnx`` or ``.pt2``.
    """
    if path.suffix not in (_ONNX, _PROGRAM):
        raise ValueError(f"a net must be exported to a .onnx or a .pt2 file; got {path}")


@torch.no_grad()
def export(embedder: Embedder, path: Path) -> float:
    """Write a net with any number of images as input; the file appears when it was checked.

    The input ``images`` is ``(N, channels, size, size)`` fp32 in [-1, 1], the output ``embeddings`` ``(N, D)`` of norm
    1.

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
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"net{path.suffix}"
        if path.suffix == _ONNX:
            with _quiet(), _naming(file):
                torch.onnx.export(
                    program,
                    f=str(file),
                    input_names=["images"],
                    output_names=["embeddings"],
                    external_data=False,
                    dynamo=True,
                    verbose=False,
                )
        else:
            content = io.BytesIO()  # torch gives no error of a full disk
            torch.export.save(program, content)
            write_bytes(file, content.getbuffer())
        differences = [
            _difference(file, net, torch.rand(count, *embedder.spec.shape, generator=generator) * 2 - 1)
            for count in _BATCHES
        ]
        difference = float(np.max(differences))  # NaN if one of them is
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{path} differs from PyTorch by {difference:g}, more than {TOLERANCE:g}; it was not written"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, file.read_bytes())
    return difference


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Name the file in an error of the operating system that names none: a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(file)) from error


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


def _difference(file: Path, net: nn.Module, images: Tensor) -> float:
    """Return the largest difference between what a file's net and PyTorch give for images."""
    if file.suffix == _ONNX:
        session: Any = require("onnxruntime", "export").InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (found,) = session.run(["embeddings"], {"images": images.numpy()})
        embeddings = torch.from_numpy(found)
    else:
        embeddings = torch.export.load(file).module()(images)
    return float((embeddings - net(images)).abs().max())
