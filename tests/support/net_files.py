"""Weights of nets in files, as the commands read them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fused_arcface.app.nets.weights import fit_state, read_state


def load_weights(net: nn.Module, path: Path, *, partial: bool = False) -> list[str]:
    """Load the weights of a file into a net. Return the notes for the user."""
    return fit_state(net, read_state(path), path, partial=partial)
