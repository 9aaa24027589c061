"""Class centers in the files of other projects: the names of the files, of the tensors, and their layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import torch_files
from ..base.dtypes import WEIGHT_DTYPES, names

INSIGHTFACE = {
    "checkpoint_gpu_{rank}.pt": re.compile(r"checkpoint_gpu_(\d+)\.pt"),
    "softmax_fc_gpu_{rank}.pt": re.compile(r"softmax_fc_gpu_(\d+)\.pt"),
    "rank_{rank}_softmax_weight.pt": re.compile(r"rank[_:](\d+)_softmax_weight\.pt"),
}
"""Names of insightface's shards: everything of a rank, its head alone, and before 2022 the tensor alone."""

_CONTAINERS = ("state_dict_softmax_fc", "HEAD", "state_dict", "net_state_dict", "model_state_dict", "model", "head")
"""Keys of the head's state in files of insightface, CurricularFace, Lightning and MagFace, Face_Pytorch, landmark
solutions, fast-reid, and opensphere."""
_DEEPEST = 3  # levels of containers inside each other
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
    notes: list[str]
    """Sentences for the user: what is left out beside momentum, and a layout that may be wrong."""


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
    use these names in the other layout. So a name counts only where nothing else says which side is D. First comes
    ``embedding_dim``, then a net in the file: its last tensor must have the length of one side, and none of its tensors
    the length of the other one. A layout that may be wrong is in the notes.

    Args:
        path: path of the file.
        embedding_dim: D, where it is known.

    Raises:
        DataError: if it cannot be opened.
        TensorFileError: if the file is of another kind, or has several sets of class centers.
    """
    content = torch_files.load(path)
    whole = content if isinstance(content, dict) else {"weight": content}
    found = centers_of(path, whole, embedding_dim)
    beside = path.with_name(f"{path.stem}_mom{path.suffix}").is_file()
    return found._replace(momentum=beside or found.momentum)


def centers_of(path: Path, content: dict[Any, Any], embedding_dim: int | None = None) -> Found:
    """Return the class centers among the content of a file; see :func:`centers`."""
    states = _states(content, _DEEPEST)
    named = [(state, name, *each) for state in states for name, each in of_state(state).items()]
    if embedding_dim is not None and not named and len(states[-1]) == 1:
        named = [(states[-1], str(name), each, False) for name, each in states[-1].items()]
    chosen = [each for each in named if each[-1]] or named  # a net's own layer may have one of the other names
    if len(chosen) > 1:
        listed = ", ".join(name for _, name, *_ in chosen)
        raise torch_files.TensorFileError(f"{path} must hold one set of class centers; it has {listed}")
    state, name, weight, by_column = chosen[0] if chosen else (states[-1], "", None, False)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise torch_files.TensorFileError(
            f"{path} must hold floating-point class centers: weight (C, D), W or kernel (D, C), or a tensor "
            f"(C, D); it has {', '.join(map(str, list(state)[:10]))}"
        )
    torch_files.check_stored(path, name, weight)
    if weight.dtype not in WEIGHT_DTYPES:
        rule = f"{name} must have one of the dtypes {names(WEIGHT_DTYPES)}"
        raise torch_files.TensorFileError(f"{path}: {rule}; it is {names((weight.dtype,))}")
    turned, notes = _layout(weight, state, name, by_column, embedding_dim)
    if len(named) > 1:
        listed = ", ".join(each for _, each, *_ in named if each != name)
        notes.append(f"{name} is read as the class centers. {listed} is left out")
    if margin := _margin_state(state):
        listed = ", ".join(f"{each}={value:.6g}" for each, value in margin.items())
        notes.append(f"the state of its margin is left out: {listed}")
    notes = [f"{path}: {note}" for note in notes]
    return Found(weight.T if turned else weight, _has_momentum(state, content, weight), notes)


def _layout(
    weight: Tensor, state: dict[Any, Any], name: str, by_column: bool, embedding_dim: int | None
) -> tuple[bool, list[str]]:
    """Return whether the centers are columns, and a note if that may be wrong.

    The name says ``by_column``. A net in the state may say more, and ``embedding_dim`` says it for certain.
    """
    turned = _is_turned(weight, embedding_dim)
    if turned is not None:
        return turned, []
    by_net = _is_turned(weight, _width_of_net(state, name, weight))
    turned = by_column if by_net is None else by_net
    count, dim = weight.shape[::-1] if turned else weight.shape
    if count == dim:
        side = "columns" if turned else "rows"
        return turned, [f"{name} {tuple(weight.shape)} has two equal sides. Its {side} are read as the centers"]
    if turned != by_column or (by_net is None and dim > count):
        read_as = f"{name} {tuple(weight.shape)} is read as {count} centers of {dim} numbers"
        return turned, [f"{read_as}. If that is wrong, give --embedding-dim"]
    return turned, []


def _states(content: dict[Any, Any], depth: int) -> list[dict[Any, Any]]:
    """Return the dicts that may have a head's tensors: the content itself, and those that lie in it."""
    inner = [content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)]
    if not inner and len(content) == 1:  # TFace's: a head for each set of data
        inner = [each for each in content.values() if isinstance(each, dict)]
    return [content, *(state for each in inner if depth > 0 for state in _states(each, depth - 1))]


def _is_turned(weight: Tensor, dim: int | None) -> bool | None:
    """Return whether a tensor is (D, rows) if D is ``dim``; None if that does not tell its sides apart."""
    rows, columns = weight.shape
    return None if (dim == rows) == (dim == columns) else dim == rows


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
    return by_column | by_class


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
