"""The choice, within the backend ``cuda``, of its kernels for compute capability 9.0 alone (csrc/cuda/hopper).

They take bf16 embeddings of 512 columns, and are on unless ``FUSED_ARCFACE_HOPPER`` in the environment is 0. On an H100
they are three to four times as fast as the portable kernels (``bench/results/h100``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .registry import ClassPass

CAPABILITY = (9, 0)
"""The only compute capability that has their instructions: no other GPU runs machine code for sm_90a."""
_COLUMNS = 512
_MOST_CLASSES = 2**31 - 1
"""The kernels count classes in 32 bits."""


@dataclass(frozen=True)
class HopperConfig:
    """Settings that a measurement on a GPU has to decide."""

    cluster: int = 2
    """Blocks that fetch for each other, 1 or 2. Two read half as much out of L2 and wait for each other."""
    ordered: bool = True
    """If true, a tile's second product waits for the next tile's first, and runs under that one's exponentials. In a
    pass without second products, the products of two warpgroups take turns."""
    center_bytes: int = 33 << 20
    """Size of one launch's packed centers, if centers are not plain bf16 rows, and of its fp32 gradient, if the kernel
    cannot write the gradient's dtype or strides. 33,792 packed centers are four blocks of 64 for each of 132
    multiprocessors."""


CONFIGS = {
    "1": HopperConfig(),
    "cluster-1": HopperConfig(cluster=1),
    "unordered": HopperConfig(ordered=False),
    "cluster-1-unordered": HopperConfig(cluster=1, ordered=False),
}
"""The values of ``FUSED_ARCFACE_HOPPER`` beside 0. "1" is the default, the others are for benchmarks."""


def asked() -> HopperConfig | None:
    """Return the configuration that the environment asks for, or None if it turns the kernels off."""
    name = os.environ.get("FUSED_ARCFACE_HOPPER") or "1"
    if name == "0":
        return None
    if name not in CONFIGS:
        raise ValueError(f"FUSED_ARCFACE_HOPPER must be 0 or one of {', '.join(CONFIGS)}; got {name!r}")
    return CONFIGS[name]


def takes(built: bool, capability: tuple[int, int]) -> ClassPass | None:
    """Return the passes that the kernels take on such a GPU, or None if they are not in use."""
    is_used = built and capability == CAPABILITY and asked() is not None
    return ClassPass(torch.bfloat16, _COLUMNS) if is_used else None


def choose(built: bool, capability: tuple[int, int], embeddings: Tensor, weight: Tensor) -> HopperConfig | None:
    """Return the configuration for a pass over these inputs, or None if the portable kernels take it."""
    fits = takes(built, capability) == ClassPass(embeddings.dtype, weight.shape[1]) and weight.shape[0] <= _MOST_CLASSES
    return asked() if fits else None


def describe(built: bool, capability: tuple[int, int]) -> str:
    """Return a text that says if the kernels are in use, and the reason if not."""
    if not built:
        return "not built: that takes nvcc 12.8 or later"
    if capability != CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (CAPABILITY, capability))
        return f"not used: they need a GPU of compute capability {needed}; this one has {found}"
    if asked() is None:
        return "off: FUSED_ARCFACE_HOPPER=0 is set"
    return "on for bf16 embeddings of 512 columns"
