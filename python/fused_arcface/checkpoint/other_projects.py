"""Class centers in the files of insightface and pytorch-metric-learning: the names of the files and their layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base import torch_files

INSIGHTFACE = {
    "checkpoint_gpu_{rank}.pt": re.compile(r"checkpoint_gpu_(\d+)\.pt"),
    "softmax_fc_gpu_{rank}.pt": re.compile(r"softmax_fc_gpu_(\d+)\.pt"),
    "rank_{rank}_softmax_weight.pt": re.compile(r"rank[_:](\d+)_softmax_weight\.pt"),
}
"""Names of insightface's shards: all that a rank has, its head alone, and before 2022 the bare tensor."""


def centers(path: Path) -> tuple[Tensor, bool]:
    """Return the class centers ``(rows, D)`` of a ``.pt`` file, and whether it has momentum of them as well.

    Known are pytorch-metric-learning's ``state_dict()`` with ``W`` (D, rows); a dict with ``weight`` (rows, D), or
    ``weight_activated`` as insightface calls it without sampling, alone or as ``state_dict_softmax_fc``; and the bare
    tensor of insightface's ``rank_{rank}_softmax_weight.pt``, whose momentum lies in a file beside it.

    Raises:
        DataError: it cannot be opened.
        TensorFileError: a file of another kind.
    """
    found = torch_files.load(path)
    momentum = path.with_name(f"{path.stem}_mom{path.suffix}").is_file()
    if isinstance(found, dict):
        state = found.get("state_dict_softmax_fc", found)
        momentum = momentum or _has_momentum(state, found)
        found = state
    weight = _of_state(found) if isinstance(found, dict) else found
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        keys = f"; it has {', '.join(map(str, list(found)[:10]))}" if isinstance(found, dict) else ""
        raise torch_files.TensorFileError(
            f"{path} must hold floating-point class centers: weight (C, D), pytorch-metric-learning's W (D, C), or a "
            f"tensor (C, D){keys}"
        )
    torch_files.check_stored(path, "weight", weight)
    return weight, momentum


def _of_state(state: dict[Any, Any]) -> object:
    if isinstance(state.get("W"), Tensor) and state["W"].dim() == 2:
        return state["W"].T
    weights = [state.get(name) for name in ("weight", "weight_activated")]
    # The one that is not in use is empty.
    return next((each for each in weights if isinstance(each, Tensor) and each.numel()), None)


def _has_momentum(state: Any, found: dict[Any, Any]) -> bool:
    """Return whether momentum of the centers is saved, in their own state or in an optimizer's beside it."""
    own = isinstance(state, dict) and any(str(name).endswith("_mom") for name in state)
    optimizer = found.get("state_optimizer")
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    weight = _of_state(state) if isinstance(state, dict) else None
    return own or (
        isinstance(states, dict)
        and isinstance(weight, Tensor)
        and any(
            isinstance(tensor, Tensor) and tensor.shape == weight.shape
            for each in states.values()
            if isinstance(each, dict)
            for tensor in each.values()
        )
    )
