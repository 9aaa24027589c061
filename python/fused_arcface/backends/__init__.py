"""Backends: implementations of the head's stages, chosen by name.

Each is a module with the functions of :mod:`fused_arcface.backends.plain_torch` (same names, arguments and results) and
``unavailable()``, which says why it cannot run here, or None. Nothing outside this package imports one directly.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
_DEVICE_TYPES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}

_FASTEST = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""By type of device, the backends that ``"auto"`` tries in turn. On the CPU from bench/NOTES.md; on GPUs not measured
yet: Triton reaches Hopper's own tensor core instructions, csrc/cuda those of Ampere."""

_NO_FP64 = ("cuda",)
"""Backends without fp64: tensor cores of such numbers are few, and none of a graphics card's."""


@functools.cache
def load(name: str) -> ModuleType:
    """The backend's module, imported when first asked for."""
    return importlib.import_module(f".{name}", __name__)


@torch.compiler.assume_constant_result  # torch.compile need not trace an import
def _unavailable(name: str) -> str | None:
    reason: str | None = load(name).unavailable()
    return reason


def available() -> dict[str, str | None]:
    """Each backend's name with None if it can be used on this machine, else the reason why not.

    >>> available()["reference"] is None
    True
    """
    return {name: _unavailable(name) for name in NAMES}


@torch.compiler.assume_constant_result
def _reference_for_want_of(able: tuple[str, ...]) -> str:
    """The reference, which stores the logits: where that is only for a backend that cannot run here, with a warning."""
    for name in able:
        warnings.warn(f"backend 'reference' is used, as {name!r} is not available: {_unavailable(name)}", stacklevel=4)
    return "reference"


def fuses_margin(name: str, dtype: torch.dtype) -> bool:
    """Whether the backend's ``margin_loss`` computes in ``dtype`` and saves launches; otherwise plain PyTorch is as
    good and takes any margin."""
    return name == "cpu" or (name in ("triton", "cuda") and dtype == torch.float32)


def has_negatives(name: str) -> bool:
    """Whether the backend takes :class:`fused_arcface.engine.ops.Negatives`: sub-centers and modulated negatives."""
    return name in ("reference", "cpu")


def knows_padding(name: str) -> bool:
    """Whether the backend's stages take classes that are padded, their number known to the device alone."""
    return name in ("reference", "triton", "cuda")


def check_name(name: object) -> None:
    if name != "auto" and name not in NAMES:
        listed = ", ".join(map(repr, ("auto", *NAMES)))
        raise ValueError(f"backend must be one of {listed}; got {name!r}")


def select(name: str, device: torch.device, dtype: torch.dtype = torch.float32, needs: str | None = None) -> str:
    """The backend to run on ``device``: the one named, or for ``"auto"`` the fastest usable one that computes in
    ``dtype``, as ``ops.compute_dtype`` has it, and has what is needed.

    Args:
        needs: what the call has that only backends with :func:`has_negatives` do, for the message; None: nothing.

    Raises:
        TypeError: a named backend that has no kernels for ``dtype``.
        ValueError: an unknown name, or a backend that cannot run on this device, or does not have what is needed.
        RuntimeError: a named backend that cannot run on this machine, with the reason.
    """
    check_name(name)
    lacks_dtype = _NO_FP64 if dtype == torch.float64 else ()
    if name == "auto":
        # Lists and a loop: torch.compile of torch 2.8 traces no generator.
        fastest = [each for each in _FASTEST.get(device.type, ()) if each not in lacks_dtype]
        able = [each for each in fastest if needs is None or has_negatives(each)]
        for each in able:
            if _unavailable(each) is None:
                return each
        return _reference_for_want_of(tuple(able))
    if needs is not None and not has_negatives(name):
        able_names = " and ".join(repr(each) for each in NAMES if has_negatives(each))
        raise ValueError(f"backend {name!r} does not have {needs}: {able_names} do")
    reason = _unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if _DEVICE_TYPES.get(name, device.type) != device.type:
        raise ValueError(f"backend {name!r} needs tensors on {_DEVICE_TYPES[name]}; got {device}")
    if name in lacks_dtype:
        raise TypeError(f"backend {name!r} needs embeddings and weight of float32, bfloat16 or float16; got float64")
    return name
