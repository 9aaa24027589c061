"""Weights of embedding nets in files: a run's ``model.pt`` and insightface's ``backbone.pth``.

The same tensors are read under the longer names that ``DataParallel``, ``torch.compile`` and training loops give them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fused_arcface.base import torch_files
from fused_arcface.base.reading import DataError

_CONTAINERS = ("state_dict", "net_state_dict", "state_dict_backbone", "backbone", "model")
"""Keys under which training loops keep the net's state beside other things."""
_PREFIXES = ("module.", "_orig_mod.", "state_dict.", "backbone.")
_HEADS = ("head.", "fc.")
"""Names of other modules that may stand beside a net of :data:`_BESIDE_HEADS`."""
_BESIDE_HEADS = (
    ("model.", "model."),
    ("net.", "net."),
    ("features.", "features.conv1."),
    ("features.", "features.module."),
)
"""Prefixes of the net's names in files of AdaFace, CVLface and MagFace, each with the prefix that tells such a file."""
_COUNTERS = ".num_batches_tracked"
"""Counters of batch normalization: files from before torch 0.4.1 lack them, and evaluation does not use them."""


class Misfit(DataError):
    """Raised for a file with some tensors that fit a net, and others that do not or are missing."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a net's file by their plain names. Nothing but tensors is read from the file.

    The state may lie under ``state_dict``, ``net_state_dict``, ``state_dict_backbone``, ``backbone`` or ``model``. The
    prefixes ``module.``, ``_orig_mod.``, ``state_dict.`` and ``backbone.`` are removed, in any order. If some names
    begin with ``backbone.``, the others are another module's and are left out, and so are AdaFace's ``head.`` beside
    ``model.`` and MagFace's ``fc.`` beside ``features.conv1.``. CVLface's names all begin with ``net.``.

    Raises:
        DataError: if the file cannot be read, is damaged, or holds no named tensors.
    """
    found: Any = torch_files.load(path)
    torch_files.check_sums(path)
    while isinstance(found, dict) and (key := next((k for k in _CONTAINERS if isinstance(found.get(k), dict)), None)):
        found = found[key]
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{path} has no weights of a net: it must hold tensors by name, as net.state_dict() gives them")
    state = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    while prefix := next((p for p in _PREFIXES if any(name.startswith(p) for name in state)), None):
        of_net = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        state = of_net if prefix == "backbone." else {name.removeprefix(prefix): state[name] for name in state}
    for prefix, first in _BESIDE_HEADS:
        beside = [name for name in state if not name.startswith(prefix)]
        if any(name.startswith(first) for name in state) and all(name.startswith(_HEADS) for name in beside):
            state = {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
            state = {name.removeprefix("module."): each for name, each in state.items()}
    for name, value in state.items():
        torch_files.check_stored(path, name, value)
    return state


def fit_state(net: nn.Module, state: dict[str, Tensor], path: Path, *, partial: bool = False) -> list[str]:
    """Set a net to the tensors of a file.

    Args:
        net: the net.
        state: what :func:`read_state` returned.
        path: the file, for messages.
        partial: take what fits. A tensor of the net that the file lacks, or has in another shape, stays as it is.

    Returns:
        Notes for the user: one line that says what did not fit, if anything did not.

    Raises:
        DataError: if no tensor fits.
        Misfit: if the file lacks a tensor of the net or has one of another shape, and ``partial`` is not set.

    >>> import torch
    >>> state = {"weight": torch.ones(1, 2), "extra": torch.ones(3)}
    >>> fit_state(nn.Linear(2, 1, bias=False), state, Path("net.pt"))
    ['net.pt: 1 of its 2 tensors are not used, because the net has none of that name: extra']
    """
    own = net.state_dict()
    fitting, wrong = set(), []
    for name, tensor in own.items():
        if name in state and state[name].shape == tensor.shape:
            fitting.add(name)
        elif name in state:
            wrong.append(f"{name} must be {tuple(tensor.shape)}; it is {tuple(state[name].shape)}")
        elif not name.endswith(_COUNTERS):
            wrong.append(f"{name} is missing")
    some = any(not name.endswith(_COUNTERS) for name in fitting)
    if wrong and not (partial and some):
        few = _some(wrong, 3, "; ", " more tensors do not fit")
        raise (Misfit if some else DataError)(f"{path} has no weights of this net: {few}")
    net.load_state_dict({name: state[name] if name in fitting else own[name] for name in own})
    notes = []
    if wrong:
        few = _some(wrong, 5, "; ", " more")
        taken = f"{len(fitting)} of the net's {len(own)} tensors are taken from it"
        notes.append(f"{taken}, the others begin with new weights: {few}")
    if unused := [name for name in state if name not in own]:
        few = _some(unused, 5, ", ", " more")
        notes.append(
            f"{len(unused)} of its {len(state)} tensors are not used, because the net has none of that name: {few}"
        )
    return [f"{path}: {'. '.join(notes)}"] if notes else []


def _some(texts: list[str], most: int, separator: str, more: str) -> str:
    """Return the first texts, and the number of the others.

    >>> _some(["a", "b", "c"], 2, ", ", " more")
    'a, b and 1 more'
    """
    rest = f" and {len(texts) - most}{more}" if len(texts) > most else ""
    return separator.join(texts[:most]) + rest
