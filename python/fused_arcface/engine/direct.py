"""The choice between an operator and the function behind it.

The dispatcher takes 2 to 5 µs to reach a function in Python, eight times in a step: a tenth of a small step on a CPU.
:func:`stages` leaves it out where nothing stands between the call and the function.
"""

from __future__ import annotations

import functools
import operator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import ops


def _plain_keys() -> tuple[set[int], set[int]]:
    """Return the keys of a plain tensor on the CPU, and those of a thread in which nothing watches, as bits.

    Every layer that handles operators has a key: transforms, modes, functionalization, tracing, views that are negated.
    A call with no other keys than these goes straight to the function.
    """

    def bits(*names: str) -> int:
        keys = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
        return int(functools.reduce(operator.or_, keys).raw_repr())

    try:
        # The first of each pair is without inference mode.
        tensor = {bits("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"), bits("CPU", "AutocastCPU")}
        return tensor, {bits("BackendSelect", "ADInplaceOrView"), bits("BackendSelect")}
    except _OTHER_TORCH:
        return set(), set()


_OTHER_TORCH = (AttributeError, TypeError)
"""The errors of a later torch that lacks private names which this module uses. Every call then takes the operators."""

_PLAIN_TENSOR, _PLAIN_THREAD = _plain_keys()

_FUNCTIONS = SimpleNamespace()
for _name, _function in ops.FUNCTIONS.items():
    _packet, _, _overload = _name.partition(".")
    if _packet != "update_centers":  # the operator also notes that a tensor was changed in place
        vars(_FUNCTIONS).setdefault(_packet, SimpleNamespace())
        setattr(vars(_FUNCTIONS)[_packet], _overload or "default", _function)


def stages(*tensors: Tensor | None) -> Any:
    """Return the namespace of the stages to call with these tensors and others made of them.

    It is ``torch.ops.fused_arcface``, or for plain tensors on the CPU a namespace of the functions behind its
    operators. A compiler, a transform, a mode, a tensor subclass or a profiler always sees the operators.
    """
    return _FUNCTIONS if goes_straight(*tensors) else torch.ops.fused_arcface


def is_readable(tensor: Tensor) -> bool:
    """Return true if a tensor is on the CPU and has values now.

    A profiler and a mode that only watches make no difference: torch.utils.checkpoint may run a forward pass with one
    and again without it, and both must save the same tensors.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        if torch._C._dispatch_keys(tensor).raw_repr() not in _PLAIN_TENSOR:
            return False
        thread = torch._C._dispatch_tls_local_include_set()
        if thread.has(torch._C.DispatchKey.Python):
            kinds = torch._C._TorchDispatchModeKey
            if any(torch._C._get_dispatch_mode(kind) for kind in (kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL)):
                return False
            thread = thread.remove(torch._C.DispatchKey.Python).remove(torch._C.DispatchKey.PythonTLSSnapshot)
        return thread.raw_repr() in _PLAIN_THREAD
    except _OTHER_TORCH:
        return False


def goes_straight(*tensors: Tensor | None) -> bool:
    """Return true if the dispatcher would call a function with these tensors at once, and nothing else would notice."""
    if torch.compiler.is_compiling() or torch.overrides.has_torch_function(tensors):
        return False
    try:
        if (
            torch._C._autograd._profiler_enabled()
            or torch._C._dispatch_tls_local_include_set().raw_repr() not in _PLAIN_THREAD
        ):
            return False
        # Not by all(): a generator costs as much as two of these checks.
        keys = [torch._C._dispatch_keys(each).raw_repr() for each in tensors if each is not None]
        return _PLAIN_TENSOR.issuperset(keys)
    except _OTHER_TORCH:
        return False
