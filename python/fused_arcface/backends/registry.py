"""The backends: a row for each that says what it is and can do, and the choice between them.

A backend is a module with the functions of :mod:`fused_arcface.backends.torch` (same names, arguments and results) and
``unavailable(device)``, which returns the reason why it cannot run there, or None. Nothing else in the package imports
one.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch

from ..base.compiler import constant_result
from ..base.dtypes import FLOAT_DTYPES, WEIGHT_DTYPES, names

_NO_FP64 = tuple(each for each in FLOAT_DTYPES if each != torch.float64)


@dataclass(frozen=True)
class Backend:
    """The facts about one backend."""

    name: str
    device_type: str | None
    """The type of device that it runs on; None: any."""
    priority: int
    """``"auto"`` takes the usable backend with the greatest. 0: only if there is no other."""
    features: frozenset[str]
    """Subset of ``FEATURES``."""
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    """The dtypes of embeddings and class centers that it has kernels for."""
    leads: bool = False
    """If true, the backend comes before all others for the passes that its module's ``leads(device)`` returns."""


class ClassPass(NamedTuple):
    """The facts about a call's passes over the classes that decide which backend is the fastest."""

    dtype: torch.dtype
    """The dtype of the embeddings, as autocast wants them, and of the products."""
    columns: int
    """The dimension D of embeddings and class centers."""
    sampled: bool = False
    """If true, a step takes a sample of the classes."""


FEATURES = {
    "sub_centers": "several centers for each class",
    "modulated_negatives": "margins that change the negatives",
    "turned_negatives": "margins that change the negatives, with the sine of their angles too",
    "binary_losses": "a logistic loss for each class in place of the softmax",
    "padding": "a sample of the classes whose number only the device knows",
    "gathering": "a sample of the class centers read where they are, without a copy of them all",
    "permutation": "the keyed permutation of a sampled step in one launch",
    "late_scale": "the sums for a scale that is known after the pass over the classes",
    "fused_margin": "a margin_loss in one launch; elsewhere plain PyTorch is as good and takes any margin",
    "fused_margin_fp64": "the same in fp64",
}
"""The features that not every backend has."""

_NEGATIVES = frozenset({"sub_centers", "modulated_negatives"})
_TURNED = _NEGATIVES | {"turned_negatives"}

# The order is that of lists and messages.
# The priorities are measured: on the CPU in bench/NOTES.md, on GPUs by an H100 and an H200 (bench/results). Triton is
# faster there than csrc/cuda, except for csrc/cuda's kernels for compute capability 9.0: cuda.leads() says where.
# Tensor cores for fp64 are few, and a graphics card has none: csrc/cuda has no fp64.
BACKENDS = (
    Backend("torch", None, 0, _TURNED | {"binary_losses", "padding"}, WEIGHT_DTYPES),
    Backend("cpu", "cpu", 1, _TURNED | {"binary_losses", "late_scale", "fused_margin", "fused_margin_fp64"}),
    Backend("triton", "cuda", 2, _NEGATIVES | {"padding", "gathering", "permutation", "fused_margin"}),
    Backend("cuda", "cuda", 1, _TURNED | {"padding", "fused_margin"}, _NO_FP64, leads=True),
)
ALIASES = {"reference": "torch"}
"""Earlier names of backends, which are accepted everywhere."""

NAMES = tuple(each.name for each in BACKENDS)
_ROWS = {each.name: each for each in BACKENDS}
_BY_PRIORITY = tuple(sorted(BACKENDS, key=lambda each: -each.priority))


class _ByName(dict[str, str | None]):
    """A table by the names of backends that knows the earlier names as well."""

    def __missing__(self, name: str) -> str | None:
        return self[ALIASES[name]]


@functools.cache
def load(name: str) -> ModuleType:
    """Return the backend's module. It is imported when it is first asked for."""
    return importlib.import_module(f".{canonical(name)}", __package__)


@constant_result  # torch.compile need not trace an import
def _unavailable(name: str, device: torch.device | None = None) -> str | None:
    """Return why a backend cannot run on a device of its type, by default on the current one; or None."""
    reason: str | None = load(name).unavailable(device)
    return reason


def available() -> dict[str, str | None]:
    """Return each backend's name with None if it can be used on this machine, else with the reason why not.

    >>> available()["torch"] is None
    True
    """
    return _ByName({name: _unavailable(name) for name in NAMES})


def describe(name: str) -> str:
    """Return what a backend that is available says of itself on this machine; "" if it says nothing."""
    module = load(name)
    return str(module.describe()) if hasattr(module, "describe") else ""


def canonical(name: str) -> str:
    """Return today's name of a backend that may be given by an earlier one."""
    return ALIASES.get(name, name)


def has(name: str, feature: str) -> bool:
    """Return true if the backend has the feature, one of ``FEATURES``."""
    return feature in _ROWS[canonical(name)].features


def device_type(name: str) -> str | None:
    """Return the type of device that the backend runs on; None: any."""
    return _ROWS[canonical(name)].device_type


def check_name(name: object) -> str:
    """Return today's name of a backend, or ``"auto"``.

    Raises:
        ValueError: if no backend has the name.
    """
    if not isinstance(name, str) or (name != "auto" and canonical(name) not in NAMES):
        listed = ", ".join(map(repr, ("auto", *NAMES)))
        raise ValueError(f"backend must be one of {listed}; got {name!r}")
    return canonical(name)


@constant_result
def _fall_back(reasons: tuple[str, ...]) -> str:
    """Return the backend that runs everywhere, with a warning for each reason."""
    for reason in reasons:
        warnings.warn(f"backend 'torch' is used, plain PyTorch by blocks of classes, as {reason}", stacklevel=4)
    return "torch"


def _lacks(row: Backend, needs: Mapping[str, str]) -> list[str]:
    """Return the texts of the features that a call needs and the backend does not have."""
    return [text for feature, text in needs.items() if feature not in row.features]


@constant_result
def _leads(name: str, device: torch.device) -> ClassPass | None:
    if _unavailable(name, device) is not None:
        return None
    passes: ClassPass | None = load(name).leads(device)
    return passes


def _order(device: torch.device, needs: Mapping[str, str], of_classes: ClassPass | None) -> tuple[Backend, ...]:
    """Return the backends, the fastest first. One that leads does so for plain negatives alone."""
    if of_classes is None or needs:
        return _BY_PRIORITY
    for row in _BY_PRIORITY:
        if row.leads and row.device_type == device.type and _leads(row.name, device) == of_classes:
            return (row, *(each for each in _BY_PRIORITY if each is not row))
    return _BY_PRIORITY


def _fastest(
    device: torch.device,
    dtype: torch.dtype,
    needs: Mapping[str, str],
    of_classes: ClassPass | None,
    weight_dtype: torch.dtype,
) -> str:
    """Return the fastest usable backend that has what the call needs."""
    reasons: list[str] = []
    for row in _order(device, needs, of_classes):
        if row.device_type != device.type or dtype not in row.dtypes or weight_dtype not in row.dtypes:
            continue
        lacks = _lacks(row, needs)
        reason = None if lacks else _unavailable(row.name, device)
        if lacks:
            reasons.append(f"{row.name!r} does not have {' and '.join(lacks)}")
        elif reason is not None:
            reasons.append(f"{row.name!r} is not available: {reason}")
        else:
            return row.name
    return _fall_back(tuple(reasons))


def select(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    needs: Mapping[str, str] = MappingProxyType({}),
    of_classes: ClassPass | None = None,
    weight_dtype: torch.dtype = torch.float32,
) -> str:
    """Return the name of the backend to run on ``device``: the one named, or for ``"auto"`` the fastest usable one.

    Args:
        name: A backend's name or ``"auto"``.
        device: The device of the tensors.
        dtype: The dtype that sums are kept in, as :func:`fused_arcface.base.dtypes.compute_dtype` returns it.
        needs: The features of ``FEATURES`` that the call needs, each with its text in messages.
        of_classes: The call's passes over the classes; ``"auto"`` chooses by them. If None, it chooses by priority.
        weight_dtype: The dtype of the class centers.

    Raises:
        TypeError: if a named backend has no kernels for ``dtype`` or ``weight_dtype``.
        ValueError: if the name is unknown, or the backend cannot run on this device or lacks a feature.
        RuntimeError: if a named backend cannot run on this machine, with the reason.
    """
    name = check_name(name)
    if name == "auto":
        return _fastest(device, dtype, needs, of_classes, weight_dtype)
    row = _ROWS[name]
    lacks = _lacks(row, needs)
    if lacks:
        able = " and ".join([repr(each.name) for each in BACKENDS if not _lacks(each, needs)])
        raise ValueError(f"backend {name!r} does not have {' and '.join(lacks)}: {able} do")
    reason = _unavailable(name, device if device.type == row.device_type else None)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if row.device_type not in (None, device.type):
        raise ValueError(f"backend {name!r} needs tensors on {row.device_type}; got {device}")
    for each in (dtype, weight_dtype):
        if each not in row.dtypes:
            got = names((each,))
            raise TypeError(f"backend {name!r} needs embeddings and weight of {names(row.dtypes)}; got {got}")
    return name
