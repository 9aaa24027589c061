"""Exact nearest neighbors: every probe against the whole gallery, block by block, with torch or faiss."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from ..base.extras import require
from .distances import Distance

Engine = Literal["auto", "torch", "faiss"]

# Distances held at once: 2²⁴ floats, 64 MiB.
_HELD = 2**24


def choose_engine(engine: str, distance: Distance) -> Literal["torch", "faiss"]:
    """Return the engine to search with; ``"auto"`` takes faiss if it is installed and knows the distance.

    Raises:
        ValueError: if the engine is unknown, or faiss does not know the distance.
        MissingExtra: if faiss was named and is not installed.
    """
    if engine not in ("auto", "torch", "faiss"):
        raise ValueError(f"engine must be auto, torch or faiss; got {engine!r}")
    known = distance.p in (None, 2.0)
    if engine == "faiss":
        if not known:
            raise ValueError(f"engine faiss must be used with Euclidean distances or inner products; got {distance}")
        require("faiss", "faiss")
        return "faiss"
    return "faiss" if engine == "auto" and known and faiss_installed() else "torch"


def faiss_installed() -> bool:
    """Return whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


@torch.no_grad()
def nearest(
    probes: Tensor, gallery: Tensor, k: int, distance: Distance, engine: Engine = "auto"
) -> tuple[Tensor, Tensor]:
    """Find the k nearest of a gallery for each probe, exactly.

    Args:
        probes: embeddings (N, D).
        gallery: embeddings (G, D), G >= 1.
        k: number of neighbors, at least 1; at most G are found.
        distance: distance to compare by, see :mod:`fused_arcface.evaluation.distances`.
        engine: library to search with: ``"torch"``, ``"faiss"`` (IndexFlat, on the CPU), or ``"auto"``, see
            :func:`choose_engine`.

    Returns:
        Distances ``(N, k)``, ascending, and rows of the gallery ``(N, k)`` int64. The distances of the chosen rows are
        computed again from differences, so that the engines agree up to rounding.

    Raises:
        ValueError: if shapes, k or engine are wrong, or embeddings are not finite.

    >>> from fused_arcface.evaluation import Euclidean
    >>> nearest(torch.tensor([[1.0]]), torch.tensor([[5.0], [2.0], [0.5]]), 2, Euclidean())
    (tensor([[0.5000, 1.0000]]), tensor([[2, 1]]))
    """
    if probes.dim() != 2 or gallery.dim() != 2 or probes.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"probes and gallery must be (N, D) and (G, D); got {tuple(probes.shape)} and {tuple(gallery.shape)}"
        )
    if k < 1 or len(gallery) == 0:
        raise ValueError(f"k and the gallery's size must be >= 1; got k={k} and {tuple(gallery.shape)}")
    if not probes.isfinite().all() or not gallery.isfinite().all():
        raise ValueError("probes and gallery must be finite")
    chosen = choose_engine(engine, distance)
    k = min(k, len(gallery))
    gallery = distance.transform(gallery.float())
    index = _faiss_index(gallery, distance) if chosen == "faiss" else None
    distances, rows = [], []
    for block in probes.float().split(max(1, _HELD // len(gallery))):
        block = distance.transform(block)
        if index is not None:
            found = torch.as_tensor(index.search(block.cpu().contiguous().numpy(), k)[1], device=block.device)
        else:
            found = distance.matrix_of_transformed(block, gallery).topk(k, largest=False).indices
        exact = distance.of_transformed(block.repeat_interleave(k, 0), gallery[found.flatten()]).view(-1, k)
        exact, order = exact.sort(dim=1, stable=True)
        distances.append(exact)
        rows.append(found.gather(1, order))
    if not distances:
        return gallery.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=gallery.device)
    return torch.cat(distances), torch.cat(rows)


def _faiss_index(gallery: Tensor, distance: Distance) -> Any:
    faiss = require("faiss", "faiss")
    make = faiss.IndexFlatIP if distance.p is None else faiss.IndexFlatL2
    index = make(gallery.shape[1])
    index.add(gallery.cpu().contiguous().numpy())
    return index
