"""Every Triton kernel and configuration, compiled ahead of time: what can be known of them without a GPU.

Shared memory past the architecture's limit compiles, and fails at the launch; registers past the file's size spill to
memory; and a product whose operands do not suit the tensor cores runs without them. ``pytest -s`` shows the table.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from triton_aot import SHARED_LIMIT, Launch, compiled, recorded

from fused_arcface.backends.triton import stages
from fused_arcface.margins import CombinedMargin, CosFace, parameters

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

TENSOR_CORES = {80: r"mma\.sync", 86: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}

MOST_STACK = 448
"""Bytes. The flash passes of D > 128 hold an accumulator of 128 registers a thread and spill around their loops."""

MARGIN = CombinedMargin(1.2, 0.3, 0.1, "fold")

LEAST_STACK = 32
"""Bytes that CUDA's sine and cosine keep for the reduction of a huge argument."""


def _step(
    algorithm: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    D: int,
    shifted: bool = False,
    margin: Callable[..., torch.Tensor] = MARGIN,
    N: int = 4096,
    C: int = 1_000_000,
) -> None:
    """A training step, on tensors without memory."""
    x = torch.empty(N, D, dtype=dtype, device="meta")
    w = torch.empty(C, D, dtype=weight_dtype, device="meta")
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", algorithm)
        if shifted:
            stages.class_max(x, w, target)
        shift = torch.empty(N, dtype=FP64, device="meta") if shifted else None
        total, _, centre_sum = stages.class_stats(x, w, target, 64.0, shift, True)
        cosine = stages.target_cosine(x, w, target)
        if total.dtype == FP32:
            numbers = parameters(margin)
            assert numbers is not None
            stages.margin_loss(total, cosine, 64.0, *numbers)
        stages.weight_grad(x, w, target, 64.0, total.double(), total, cosine)
        stages.embedding_grad(stages.unit_embedding_grad(w, target, centre_sum, total, cosine), x)


DEFAULT_STEPS = {
    90: [("chunks", BF16, BF16, 512), ("flash", BF16, BF16, 256), ("chunks", FP32, FP32, 512)],
    80: [("chunks", BF16, BF16, 512)],
    100: [("chunks", BF16, BF16, 512)],
}
"""By architecture, what users get without asking: each algorithm on Hopper, elsewhere the one of the usual D = 512."""

FULL_STEPS = [
    *itertools.product(["chunks"], [BF16, FP16, FP32], [BF16, FP16, FP32], [512], [False, True]),
    *itertools.product(["flash"], [BF16], [BF16, FP32], [7, 64, 128, 256, 512], [False, True]),
    *itertools.product(["chunks"], [BF16, FP32], [BF16], [7, 513, 2048], [False]),
    ("chunks", FP64, FP64, 512, True),
]


def _check(launch: Launch, arch: int) -> str:
    """Compiles a launch, checks what it takes, and gives its row of the table."""
    resources = compiled(launch, arch)
    row = f"sm_{arch:<4}{resources.registers:>4} registers {resources.stack:>4} B stack {resources.shared:>7} B shared"
    row += f"  {launch.label}"
    assert resources.shared <= SHARED_LIMIT[arch], row
    assert resources.stack <= (MOST_STACK if launch.has_dot else LEAST_STACK), row
    if launch.has_dot:
        assert resources.has_instruction(TENSOR_CORES[arch]), row
    if launch.has_loop:
        assert resources.has_instruction(r"cp\.async"), f"operands are not loaded ahead: {row}"
    return row


def _check_all(steps: list[Callable[[], None]], arch: int) -> None:
    launches = dict.fromkeys(launch for step in steps for launch in recorded(step, arch))
    rows = [_check(launch, arch) for launch in launches]
    assert rows
    print("\n" + "\n".join(rows))


@pytest.mark.parametrize("arch", list(DEFAULT_STEPS))
def test_default_configurations(arch: int) -> None:
    _check_all([functools.partial(_step, *arguments) for arguments in DEFAULT_STEPS[arch]], arch)


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_sizes_of_one(algorithm: str) -> None:
    """Triton makes a constant of an argument that is 1: the kernels must be right to it for each of them."""
    _check_all([functools.partial(_step, algorithm, BF16, BF16, 1, N=1, C=1)], 90)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", list(SHARED_LIMIT))
def test_all_configurations(arch: int) -> None:
    steps = [functools.partial(_step, *arguments) for arguments in FULL_STEPS]
    margins = [
        *(CombinedMargin(1.2, 0.3, 0.1, boundary) for boundary in ("none", "hard", "fold", "clip", "easy")),
        CombinedMargin(gradient="straight_through"),
        CosFace(),
    ]
    steps += [functools.partial(_step, "chunks", BF16, BF16, 512, margin=margin) for margin in margins]
    _check_all(steps, arch)
