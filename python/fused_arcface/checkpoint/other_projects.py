"""Class centers in the files of other projects: the names of the files, of the tensors, and their layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import torch_files

INSIGHTFACE = {
    "checkpoint_gpu_{rank}.pt": re.compile(r"checkpoint_gpu_(\d+)\.pt"),
    "softmax_fc_gpu_{rank}.pt": re.compile(r"softmax_fc_gpu_(\d+)\.pt"),
    "rank_{rank}_softmax_weight.pt": re.compile(r"rank[_:](\d+)_softmax_weight\.pt"),
}
"""Names of insightface's shards: everything of a rank, its head alone, and before 2022 the tensor alone."""

_CONTAINERS = ("state_dict_softmax_fc", "HEAD", "state_dict", "net_state_dict", "model_state_dict", "model", "head")
"""Keys of the head's state in files of insightface, CurricularFace, Lightning and MagFace, Face_Pytorch, landmark
solutions, fast-reid, and opensphere."""
_DEEPEST = 3  # containers in each other
_OPTIMIZERS = ("state_optimizer", "OPTIMIZER", "optimizer", "optimizer_states")
"""Keys of the optimizer's state, or a list of them, in the same files."""
_BY_CLASS = (
    "weight",
    "weight_activated",
    "head.weight",
    "partial_fc.weight",  # CVLface
    "loss.weight",  # UniFace
    "w",  # opensphere
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
ElasticFace, CurricularFace, InsightFace_Pytorch and TFace."""
_OF_MARGINS = ("t", "batch_mean", "batch_std", "norm_mean", "norm_std")
"""Last parts of the names of a margin's state: CurricularFace's, AdaFace's, and what AdaFace's are called here."""


class Found(NamedTuple):
    """The class centers of a file, and what else is known of them."""

    weight: Tensor
    """(rows, D)"""
    momentum: bool
    """If true, the file, or one beside it, has their momentum as well."""
    margin_state: dict[str, float]
    """Numbers that belong to the margin, by name, such as AdaFace's running mean."""
    stored: tuple[int, int] | None
    """The shape in the file, if only the tensor's name says which side is D."""


def centers(path: Path, embedding_dim: int | None = None) -> Found:
    """Return the class centers of a ``.pt`` file.

    These files are known:

    - pytorch-metric-learning's ``state_dict()`` with ``W`` (D, rows);
    - a dict with ``weight`` (rows, D), or ``weight_activated`` as insightface calls it without sampling, alone or as
      ``state_dict_softmax_fc``;
    - insightface's ``rank_{rank}_softmax_weight.pt``, a tensor alone, with its momentum in a file beside it;
    - ``kernel`` (D, rows) of ElasticFace and InsightFace_Pytorch, of CurricularFace under ``HEAD``, of TFace under the
      name of the data, and of AdaFace as ``head.kernel`` in a checkpoint of Lightning;
    - ``fc.weight`` (D, rows) of MagFace, beside the net's ``features``;
    - ``head.weight`` (rows, D) in a checkpoint of Lightning, and the other names of ``_BY_CLASS``, alone or in one of
      ``_CONTAINERS``;
    - with ``embedding_dim`` one tensor of any name, as TFace's PartialFC is saved under the name of the data.

    Names may begin with ``module.``, as ``DataParallel`` calls them. Other projects, such as FaceX-Zoo and face.evoLVe,
    use these names in the other layout. So the names count only where nothing else says which side is D: neither
    ``embedding_dim``, nor a net in the file, whose last tensor has the length D, and no other one the length of the
    other side.

    Args:
        path: path of the file.
        embedding_dim: D, where it is known.

    Raises:
        DataError: if it cannot be opened.
        TensorFileError: if the file is of another kind, or has several sets of class centers.
    """
    content = torch_files.load(path)
    whole = content if isinstance(content, dict) else {"weight": content}
    state = _head_state(whole)
    named = of_state(state)
    if embedding_dim is not None and not named and len(state) == 1:
        named = {str(key): (each, False) for key, each in state.items()}
    if len(named) > 1:
        raise torch_files.TensorFileError(f"{path} must hold one set of class centers; it has {', '.join(named)}")
    name, (weight, by_column) = next(iter(named.items()), ("", (None, False)))
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        keys = f"; it has {', '.join(map(str, list(state)[:10]))}" if isinstance(content, dict) else ""
        raise torch_files.TensorFileError(
            f"{path} must hold floating-point class centers: weight (C, D), W or kernel (D, C), or a tensor "
            f"(C, D){keys}"
        )
    torch_files.check_stored(path, "weight", weight)
    rows, columns = weight.shape
    sides = [dim for dim in (embedding_dim, _width_of_net(state, name, weight)) if (dim == rows) != (dim == columns)]
    if sides:
        by_column = sides[0] == rows
    beside = path.with_name(f"{path.stem}_mom{path.suffix}").is_file()
    return Found(
        weight.T if by_column else weight,
        beside or _has_momentum(state, whole, weight),
        _margin_state(state),
        None if sides else (rows, columns),
    )


def _head_state(content: dict[Any, Any]) -> dict[Any, Any]:
    """Return the dict with the head's tensors: the content itself, or one that lies in it."""
    for _ in range(_DEEPEST):
        inner = [content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)]
        if not inner and len(content) == 1:  # TFace's: a head for each set of data
            inner = [each for each in content.values() if isinstance(each, dict)]
        if not inner:
            break
        content = inner[0]
    return content


def of_state(state: dict[Any, Any]) -> dict[str, tuple[Tensor, bool]]:
    """Return the class centers among a head's or a model's tensors, and whether their name says (D, rows), by name.

    Empty ones are left out.
    """
    tensors = {
        str(name).removeprefix("module."): each
        for name, each in state.items()
        if isinstance(each, Tensor) and each.dim() == 2 and each.numel()
    }
    by_class = {name: (each, False) for name, each in tensors.items() if name in _BY_CLASS}
    by_column = {name: (each, True) for name, each in tensors.items() if name.rpartition(".")[2] in _BY_COLUMN}
    # MagFace's net lies under "features"; elsewhere fc is the net's last layer.
    if (
        any(re.match(r"(module\.)?features\.(module\.)?conv1\.", str(name)) for name in state)
        and "fc.weight" in tensors
    ):
        by_column["fc.weight"] = tensors["fc.weight"], True
    return by_column or by_class


def _width_of_net(state: dict[Any, Any], name: str, weight: Tensor) -> int | None:
    """Return D, as the net beside a head's tensor has it; None if there is no net, or it has both sides' lengths."""
    owner = name.rpartition(".")[0]
    of_head = re.compile(rf"(module\.)?{re.escape(owner)}\.")
    others = ((str(key), each) for key, each in state.items() if isinstance(each, Tensor) and each.dim())
    lengths = [each.shape[0] for key, each in others if not of_head.match(key)]
    sides = set(weight.shape) & set(lengths)
    return lengths[-1] if owner and len(sides) == 1 and lengths[-1] in sides else None


def _margin_state(state: dict[Any, Any]) -> dict[str, float]:
    """Return the numbers of a margin's state that are not 0, by the last part of their names."""
    found = {}
    for name, each in state.items():
        last = str(name).rpartition(".")[2]
        plain = isinstance(each, Tensor) and each.layout == torch.strided and not (each.is_meta or each.is_quantized)
        if last in _OF_MARGINS and plain and each.numel() == 1 and each.is_floating_point() and each.any():
            found[last] = float(each)
    return found


def _has_momentum(state: dict[Any, Any], found: dict[Any, Any], weight: Tensor) -> bool:
    """Return whether momentum of the centers is saved, in the head's state or in an optimizer's."""
    if any(str(name).endswith("_mom") for name in state):
        return True
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
