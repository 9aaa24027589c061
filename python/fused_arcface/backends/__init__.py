"""Backends: implementations of the head's stages, chosen by name.

Each is a module with the functions of :mod:`fused_arcface.backends.reference` (same names, arguments and results) and
``unavailable()``, which says why it cannot run here, or None. Nothing outside this package imports one directly.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
_NOT_BUILT = {"cuda": "not part of this release"}
_DEVICE_TYPES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def load(name: str) -> ModuleType:
    """The backend's module, imported when first asked for."""
    return importlib.import_module(f".{name}", __name__)


@torch.compiler.assume_constant_result  # torch.compile need not trace an import
def _unavailable(name: str) -> str | None:
    reason: str | None = _NOT_BUILT[name] if name in _NOT_BUILT else load(name).unavailable()
    return reason


def available() -> dict[str, str | None]:
    """Each backend's name with None if it can be used on this machine, else the reason why not.

    >>> available()["reference"] is None
    True
    """
    return {name: _unavailable(name) for name in NAMES}


def fuses_margin(name: str) -> bool:
    """Whether the backend's ``margin_loss`` saves launches; otherwise plain PyTorch is as good and takes any margin."""
    return name == "triton"


def check_name(name: object) -> None:
    if name != "auto" and name not in NAMES:
        listed = ", ".join(map(repr, ("auto", *NAMES)))
        raise ValueError(f"backend must be one of {listed}; got {name!r}")


def select(name: str, device: torch.device) -> str:
    """The backend to run on ``device``: the one named, or for ``"auto"`` the fastest usable one.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on this device.
        RuntimeError: a named backend that cannot run on this machine, with the reason.
    """
    check_name(name)
    if name == "auto":
        fastest = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
        return fastest if fastest is not None and _unavailable(fastest) is None else "reference"
    reason = _unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if _DEVICE_TYPES.get(name, device.type) != device.type:
        raise ValueError(f"backend {name!r} needs tensors on {_DEVICE_TYPES[name]}; got {device}")
    return name
