"""The stages on NVIDIA GPUs: the compiled kernels of csrc/cuda, given raw addresses. Shapes: backends/torch.py.

For compute capability 8.0 and later; Triton is not needed. Products have the embeddings' dtype. Those of fp32 are three
tf32 products in place of one, or one where ``torch.set_float32_matmul_precision`` is ``"high"`` or ``"medium"``. fp64
is refused (backends.select). Compute capability 9.0 has kernels of its own, which ``FUSED_ARCFACE_HOPPER=0`` turns off
(hopper.py). Every stage only launches kernels on the current stream: it does not wait, and torch allocates all memory.
Its result is the same to the bit in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.precision import allows_tf32
from ..engine.terms import PLAIN, CenterStep, Negatives, RowGradients
from . import hopper, native, nvidia
from .registry import ClassPass

# O(N·D): the launches of plain PyTorch are fast enough.
from .torch import finish_negatives  # noqa: F401

_kernels: Any = None if native.unavailable() else getattr(native.module, "cuda", None)


@dataclass(frozen=True)
class ChunkConfig:
    """The number of classes that are worked on at once, as bytes of memory for them."""

    exponential_bytes: int
    """Size of the (N, classes) exponentials between the two products of a forward pass."""
    center_bytes: int
    """Size of the packed centers in 16 bits. Those of fp32 products take twice as much."""
    gradient_bytes: int = 0
    """Size of the (N, classes) gradient between the two products of a backward pass."""

    def centers(self, precision: str) -> int:
        """Return the size of the packed centers for products of that precision."""
        return self.center_bytes * (2 if precision in ("float32", "tf32") else 1)


# 24 MiB of exponentials, written once and read once, and 9 MiB of centers stay in the smallest L2 that matters, A100's
# 40 MB. At D = 512 9 MiB are 72 tiles of 128 classes in 16 bits. The kernels take as many as fill the multiprocessors
# (waves.h): 54 on 108 of them, 66 on 132. The second product of a backward pass has only four blocks for each tile, so
# its chunk needs 72 MiB at N = 4096: a gradient of 4 bytes a logit through memory takes 1.3 ps on an H100, under
# products of some 8 ps, and 96 blocks for 264 places would take twice as long. fp32 centers take 18 MiB for as many
# tiles: products three times as long leave the time to read them from memory.
CHUNKS = ChunkConfig(exponential_bytes=24 << 20, center_bytes=9 << 20, gradient_bytes=72 << 20)


def unavailable(device: torch.device | None = None) -> str | None:
    """Return why this backend cannot run on a GPU, by default the current one; or None."""
    if native.unavailable() is not None:
        return native.unavailable()
    if _kernels is None:
        return (
            "this build has no CUDA kernels: with the CUDA toolkit's nvcc on the PATH, run "
            "FUSED_ARCFACE_CUDA=ON pip install . in a checkout of the sources"
        )
    reason = nvidia.unavailable(device)
    if reason is not None:
        return reason
    index = None if device is None else device.index
    return _cannot_start(torch.cuda.current_device() if index is None else index)


@functools.cache
def _cannot_start(index: int) -> str | None:
    """Return why no kernel can start on a GPU, or None. The first call for a GPU loads one."""
    driver, runtime, error = _kernels.readiness(index)
    if not error:
        return None
    build = "FUSED_ARCFACE_CUDA=ON pip install . in a checkout of the sources"
    if driver < runtime:
        known, needed = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
        return (
            f"the driver is for CUDA {known}, and this build of the kernels for CUDA {needed} ({error}): update the "
            f"driver, or with nvcc {known} on the PATH run {build}"
        )
    return (
        f"the kernels cannot start on {torch.cuda.get_device_name(index)}: {error}. This build may have none for this "
        f"GPU: with an nvcc that knows it on the PATH, run {build}"
    )


def _device(tensor: Tensor) -> tuple[tuple[int, int], int]:
    """Return (device index, current stream there), and the number of the device's multiprocessors."""
    index = tensor.device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    return (index, stream), torch.cuda.get_device_properties(index).multi_processor_count


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device)


def describe() -> str:
    """Return a text that says if Hopper's kernels are in use, and the reason if not; "" if the backend cannot run."""
    return "" if unavailable() else hopper.describe(_kernels.HOPPER, torch.cuda.get_device_capability())


def leads(device: torch.device) -> ClassPass | None:
    """Return the passes for which no backend is faster: those of Hopper's kernels, where they are in use.

    ``bench/results`` has the measurements. A sample of the classes is not among them: with a tenth of 1 000 000
    classes an H200 took 6.8 ms for a step, and 6.2 with ``triton``, which draws the sample in one launch.
    """
    return hopper.takes(_kernels.HOPPER, torch.cuda.get_device_capability(device))


def _hopper_config(embeddings: Tensor, weight: Tensor) -> hopper.HopperConfig | None:
    """Return the configuration of Hopper's kernels for a pass over plain negatives, or None if they do not take it."""
    if hopper.asked() is None:  # before the device is asked
        return None
    return hopper.choose(_kernels.HOPPER, _capability(weight), embeddings, weight)


def _precision(embeddings: Tensor) -> str:
    """Return the precision of the portable kernels' products: the embeddings' dtype.

    Centers of another dtype are rounded to it once where it has 16 bits. tf32 rounds fp32 operands too.
    """
    if embeddings.dtype != torch.float32:
        return "bfloat16" if embeddings.dtype == torch.bfloat16 else "float16"
    return "tf32" if allows_tf32() else "float32"


def _run_pass(
    kernel: Callable[..., int],
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    arguments: tuple[Any, ...],
    negatives: Negatives,
    stored_bytes: int,
) -> None:
    """Run a pass over the classes in a workspace of torch's: the first call asks how many bytes it needs.

    ``arguments`` are the kernel's arguments after the scale. ``stored_bytes`` is the memory between its two products,
    or 0 if it has one product.
    """
    stream, multiprocessors = _device(weight)
    # Bound to names: a temporary's memory would be another's before the kernel reads it.
    target, negatives = target.contiguous(), negatives.contiguous(torch.float32)
    # If the options have the address of a scale on the device, the kernel takes that scale and not the number.
    number, device_scale = (1.0, scale.double()) if isinstance(scale, Tensor) else (scale, None)
    rule = negatives.sub_centers, native.address(negatives.threshold), native.address(negatives.coefficients)
    config = _hopper_config(embeddings, weight) if negatives.plain else None
    if config is None:
        precision = _precision(embeddings)
        settings = stored_bytes, CHUNKS.centers(precision), multiprocessors, 1, True
    else:
        precision = "hopper"
        settings = 0, config.center_bytes, multiprocessors, config.cluster, config.ordered
    options = (*settings, rule, native.address(device_scale))
    shared = native.matrix(embeddings), native.matrix(weight), target.data_ptr(), number

    def run(workspace: int) -> int:
        return kernel(precision, *shared, *arguments, options, workspace, stream)

    workspace = torch.empty(run(0), dtype=torch.uint8, device=weight.device)
    run(workspace.data_ptr())


def _run_class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    shift: Tensor | None,
    results: tuple[Tensor, Tensor | None, Tensor | None],
    class_count: Tensor | None,
    negatives: Negatives,
) -> None:
    """Fill the maxima (N,), and the sums (N,) and the sums of the centers (N, D) where they are wanted."""
    if embeddings.shape[0] > 0:
        shift = None if shift is None else shift.contiguous()
        arguments = tuple(map(native.address, (shift, *results, class_count)))
        stored_bytes = 0 if results[2] is None else CHUNKS.exponential_bytes
        _run_pass(_kernels.class_stats, embeddings, weight, target, scale, arguments, negatives, stored_bytes)


def _empty_rows(embeddings: Tensor) -> Tensor:
    return torch.empty(embeddings.shape[0], dtype=torch.float32, device=embeddings.device)


def class_max(
    embeddings: Tensor, weight: Tensor, target: Tensor, class_count: Tensor | None = None, negatives: Negatives = PLAIN
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.class_max`."""
    maximum = _empty_rows(embeddings)
    _run_class_stats(embeddings, weight, target, 1.0, None, (maximum, None, None), class_count, negatives)
    return maximum


def class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    shift: Tensor | None,
    with_center_sum: bool,
    class_count: Tensor | None = None,
    negatives: Negatives = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement :func:`fused_arcface.backends.torch.class_stats`."""
    total, maximum = _empty_rows(embeddings), _empty_rows(embeddings)
    shape = embeddings.shape if with_center_sum else (0,)
    center_sum = torch.empty(shape, dtype=torch.float32, device=embeddings.device)
    results = maximum, total, center_sum if with_center_sum else None
    _run_class_stats(embeddings, weight, target, scale, shift, results, class_count, negatives)
    return total, maximum, center_sum


def weight_grad(
    embeddings: Tensor, weight: Tensor, target: Tensor, gradients: RowGradients, negatives: Negatives = PLAIN
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.weight_grad`."""
    if embeddings.shape[0] == 0:
        return torch.zeros_like(weight)
    scale, *rows = gradients.contiguous()
    d_weight = torch.empty_like(weight)
    arguments = *map(native.address, rows), native.matrix(d_weight)
    _run_pass(_kernels.weight_grad, embeddings, weight, target, scale, arguments, negatives, CHUNKS.gradient_bytes)
    return d_weight


def update_centers(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    gradients: RowGradients,
    step: CenterStep,
    negatives: Negatives = PLAIN,
) -> None:
    """Implement :func:`fused_arcface.backends.torch.update_centers`."""
    scale, *rows = gradients.contiguous()
    arguments = *map(native.address, rows), native.center_step(step, weight), step.active.data_ptr()
    _run_pass(_kernels.update_centers, embeddings, weight, target, scale, arguments, negatives, CHUNKS.gradient_bytes)


def target_cosine(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.target_cosine`."""
    cosine, target = _empty_rows(embeddings), target.contiguous()
    stream, _ = _device(embeddings)
    _kernels.target_cosine(
        native.matrix(embeddings), native.matrix(weight), target.data_ptr(), cosine.data_ptr(), stream
    )
    return cosine


def unit_embedding_grad(
    weight: Tensor, target: Tensor, mean_center: Tensor, negative_coefficient: Tensor, target_coefficient: Tensor
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.unit_embedding_grad`."""
    target, mean_center = target.contiguous(), mean_center.contiguous()
    negative_coefficient, target_coefficient = negative_coefficient.contiguous(), target_coefficient.contiguous()
    d_unit = torch.empty_like(mean_center)
    stream, _ = _device(weight)
    _kernels.unit_embedding_grad(
        native.matrix(weight),
        target.data_ptr(),
        mean_center.data_ptr(),
        negative_coefficient.data_ptr(),
        target_coefficient.data_ptr(),
        mean_center.shape[0],
        d_unit.data_ptr(),
        stream,
    )
    return d_unit


def embedding_grad(d_unit: Tensor, embeddings: Tensor) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.embedding_grad`."""
    d_unit, d_embeddings = d_unit.contiguous(), torch.empty_like(embeddings)
    stream, _ = _device(embeddings)
    _kernels.embedding_grad(d_unit.data_ptr(), native.matrix(embeddings), native.matrix(d_embeddings), stream)
    return d_embeddings


def margin_loss(
    negative_lse: Tensor,
    target_cosine: Tensor,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    boundary: str,
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implement :func:`fused_arcface.backends.torch.margin_loss`."""
    negative_lse, target_cosine = negative_lse.contiguous(), target_cosine.contiguous()
    loss, lse, d_lse, d_cosine = results = tuple(torch.empty_like(negative_lse) for _ in range(4))
    stream, _ = _device(negative_lse)
    _kernels.margin_loss(
        negative_lse.data_ptr(),
        target_cosine.data_ptr(),
        negative_lse.shape[0],
        scale,
        (m1, m2, m3),
        boundary,
        gradient == "straight_through",
        tuple(map(Tensor.data_ptr, results)),
        stream,
    )
    return loss, lse, d_lse, d_cosine
