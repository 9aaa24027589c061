"""The demands of all backends on NVIDIA GPUs on torch and the machine."""

from __future__ import annotations

import torch

_LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with asynchronous copies and with tensor cores for bf16 and tf32."""


def unavailable(device: torch.device | None = None) -> str | None:
    """Return why no such backend can run on a GPU, by default the current one, and what would help; or None."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs; this torch is built for AMD's"
    needed = ".".join(map(str, _LEAST_CAPABILITY))
    if torch.version.cuda is None:
        return (
            f"this torch ({torch.__version__}) is built without CUDA: for an NVIDIA GPU of compute capability "
            f">= {needed}, install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        )
    if not torch.cuda.is_available():
        return (
            f"torch sees no CUDA device: that takes an NVIDIA GPU of compute capability >= {needed} and a driver for "
            f"CUDA {torch.version.cuda} (nvidia-smi shows both)"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"a GPU of compute capability >= {needed} is needed; {torch.cuda.get_device_name(device)} has {found}"
    return None
