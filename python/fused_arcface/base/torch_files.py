"""Tensors from torch's ``.pt`` files of any version, and the class centers that other projects keep in them. Nothing
but tensors and plain containers is taken from such a file."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reading import DataError, check_regular


class TensorFileError(DataError):
    """A file that is no file of tensors, or whose tensors are not those that are sought."""


def load(path: str | os.PathLike[str]) -> Any:
    """Return what a ``.pt`` file holds: tensors, mapped from the file where torch can do that, in plain containers.

    Raises:
        DataError: if it cannot be opened, or is a Git LFS pointer.
        TensorFileError: if it is a file of another kind, or holds other objects.
    """
    check_regular(path)
    try:
        _check_uncompressed(path)
        # The format from before torch 1.6 is no archive and cannot be mapped, nor can a file whose name is no UTF-8.
        mapped = zipfile.is_zipfile(path) and _is_utf8(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except TensorFileError:
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error):
            raise TensorFileError(f"{path} cannot be read as a file of tensors: another kind, or damaged") from None
        raise TensorFileError(
            f"{path} holds other objects than tensors, which are not loaded: save the state_dict() of what is in it"
        ) from None
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise TensorFileError(f"{path} cannot be read as a file of tensors: {lines[0]}") from None


def _check_uncompressed(path: str | os.PathLike[str]) -> None:
    """Check that an archive unpacks to no more than its size: torch stores its files without compression."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise TensorFileError(f"{path} must have its tensors uncompressed, as torch.save writes them")


def check_stored(path: str | os.PathLike[str], name: str, tensor: Tensor) -> None:
    """Check that the file has an element for each one of a tensor's shape.

    By strides of 0 a file of some bytes can claim any size.

    Raises:
        TensorFileError: it has not.

    >>> check_stored("a.pt", "weight", torch.zeros(1, 4).expand(10**12, 4))
    Traceback (most recent call last):
    ...
    fused_arcface.base.torch_files.TensorFileError: a.pt: weight is (1000000000000, 4), of which the file has 16 bytes
    """
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise TensorFileError(f"{path}: {name} is {tuple(tensor.shape)}, of which the file has {stored} bytes")


def _is_utf8(path: str | os.PathLike[str]) -> bool:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def centers(path: Path) -> tuple[Tensor, bool]:
    """Return the class centers ``(rows, D)`` of a ``.pt`` file, and whether it has momentum of them as well.

    Known are pytorch-metric-learning's ``state_dict()`` with ``W`` (D, rows); a dict with ``weight`` (rows, D), or
    ``weight_activated`` as insightface calls it without sampling, alone or as ``state_dict_softmax_fc``; and the bare
    tensor of insightface's ``rank_{rank}_softmax_weight.pt``, whose momentum lies in a file beside it.

    Raises:
        DataError: it cannot be opened.
        TensorFileError: a file of another kind.
    """
    found = load(path)
    momentum = path.with_name(f"{path.stem}_mom{path.suffix}").is_file()
    if isinstance(found, dict):
        state = found.get("state_dict_softmax_fc", found)
        momentum = momentum or _has_momentum(state, found)
        found = state
    weight = _of_state(found) if isinstance(found, dict) else found
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        keys = f"; it has {', '.join(map(str, list(found)[:10]))}" if isinstance(found, dict) else ""
        raise TensorFileError(
            f"{path} must hold floating-point class centers: weight (C, D), pytorch-metric-learning's W (D, C), or a "
            f"tensor (C, D){keys}"
        )
    check_stored(path, "weight", weight)
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
