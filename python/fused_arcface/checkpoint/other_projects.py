"""Class centers in the files of other projects: the names of the files, of the tensors, and their layouts."""

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
"""Names of insightface's shards: everything of a rank, its head alone, and before 2022 the tensor alone."""

_CONTAINERS = ("state_dict_softmax_fc", "HEAD", "state_dict", "model_state_dict", "model")
"""Keys of the head's state in files of insightface, CurricularFace, Lightning and MagFace, landmark solutions, and
fast-reid."""
_OPTIMIZERS = ("state_optimizer", "OPTIMIZER", "optimizer", "optimizer_states")
"""Keys of the optimizer's state, or a list of them, in the same files."""
_BY_CLASS = (
    "weight",
    "weight_activated",
    "head.weight",
    "projection.weight",  # WeSpeaker
    "__L__.weight",  # voxceleb_trainer
    "speaker_loss.weight",  # ECAPA-TDNN
    "criterion.weight",  # open-metric-learning
    "heads.weight",  # fast-reid
    "metric_classify.weight",  # Kaggle's landmark solutions
)
"""Names of centers (rows, D)."""
_BY_COLUMN = ("W", "kernel")
"""Last parts of the names of centers (D, rows): the first is pytorch-metric-learning's, the second is used by AdaFace,
ElasticFace, CurricularFace and InsightFace_Pytorch."""


def centers(path: Path) -> tuple[Tensor, bool]:
    """Return the class centers ``(rows, D)`` of a ``.pt`` file, and whether it has their momentum as well.

    These files are known:

    - pytorch-metric-learning's ``state_dict()`` with ``W`` (D, rows);
    - a dict with ``weight`` (rows, D), or ``weight_activated`` as insightface calls it without sampling, alone or as
      ``state_dict_softmax_fc``;
    - insightface's ``rank_{rank}_softmax_weight.pt``, a tensor alone, with its momentum in a file beside it;
    - ``kernel`` (D, rows) of ElasticFace and InsightFace_Pytorch, of CurricularFace under ``HEAD``, and of AdaFace as
      ``head.kernel`` in a checkpoint of Lightning;
    - ``fc.weight`` (D, rows) of MagFace, beside the net's ``features``;
    - ``head.weight`` (rows, D) in a checkpoint of Lightning, and the other names of ``_BY_CLASS``, alone or in one of
      ``_CONTAINERS``.

    Names may begin with ``module.``, as ``DataParallel`` calls them.

    Raises:
        DataError: if it cannot be opened.
        TensorFileError: if the file is of another kind, or has several sets of class centers.
    """
    found = torch_files.load(path)
    momentum = path.with_name(f"{path.stem}_mom{path.suffix}").is_file()
    weight: object = found
    if isinstance(found, dict):
        state = next((found[key] for key in _CONTAINERS if isinstance(found.get(key), dict)), found)
        named = of_state(state)
        if len(named) > 1:
            raise torch_files.TensorFileError(f"{path} must hold one set of class centers; it has {', '.join(named)}")
        weight = next(iter(named.values()), None)
        momentum = momentum or _has_momentum(state, found, weight)
        found = state
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        keys = f"; it has {', '.join(map(str, list(found)[:10]))}" if isinstance(found, dict) else ""
        raise torch_files.TensorFileError(
            f"{path} must hold floating-point class centers: weight (C, D), W or kernel (D, C), or a tensor "
            f"(C, D){keys}"
        )
    torch_files.check_stored(path, "weight", weight)
    return weight, momentum


def of_state(state: dict[Any, Any]) -> dict[str, Tensor]:
    """Return the class centers (rows, D) among a head's or a model's tensors, by name. Empty ones are left out."""
    tensors = {
        str(name).removeprefix("module."): each
        for name, each in state.items()
        if isinstance(each, Tensor) and each.dim() == 2 and each.numel()
    }
    by_class = {name: each for name, each in tensors.items() if name in _BY_CLASS}
    by_column = {name: each.T for name, each in tensors.items() if name.rpartition(".")[2] in _BY_COLUMN}
    # MagFace's net lies under "features"; elsewhere fc is the net's last layer.
    if (
        any(re.match(r"(module\.)?features\.(module\.)?conv1\.", str(name)) for name in state)
        and "fc.weight" in tensors
    ):
        by_column["fc.weight"] = tensors["fc.weight"].T
    return by_column or by_class


def _has_momentum(state: dict[Any, Any], found: dict[Any, Any], weight: object) -> bool:
    """Return whether momentum of the centers is saved, in the head's state or in an optimizer's."""
    if any(str(name).endswith("_mom") for name in state):
        return True
    if not isinstance(weight, Tensor):
        return False
    optimizers = [found.get(key) for key in _OPTIMIZERS]
    optimizers += [each for listed in optimizers if isinstance(listed, list) for each in listed]
    states = [each["state"] for each in optimizers if isinstance(each, dict) and isinstance(each.get("state"), dict)]
    return any(
        isinstance(tensor, Tensor) and tensor.shape in (weight.shape, weight.T.shape)
        for of_parameters in states
        for each in of_parameters.values()
        if isinstance(each, dict)
        for tensor in each.values()
    )
