"""Every Triton kernel and configuration, compiled ahead of time: what can be known of them without a GPU.

Shared memory past the architecture's limit compiles, and fails at the launch; registers past the file's size spill to
memory; and a product whose operands do not suit the tensor cores runs without them. ``pytest -s`` shows the table.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, get_args

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed here")

from support.triton_aot import SHARED_LIMIT, Launch, Resources, compiled, recorded

from fused_arcface.backends import triton as backend
from fused_arcface.backends.triton import chunks, stages
from fused_arcface.engine.terms import CenterStep, Negatives, RowGradients
from fused_arcface.margins import Boundary, CombinedMargin, CosFace, parameters

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

TENSOR_CORES = {80: r"mma\.sync", 86: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}

MOST_STACK = 896
"""Bytes. Accumulators of 128 registers a thread make the flash passes of D > 128 spill around their loops, and the
chunks with changed negatives too: 664 with Triton 3.7.1, 880 with 3.9.0."""

MOST_LOCAL_IN_LOOP = 2
"""Reloads of spilled registers in a turn: none with Triton 3.4 and 3.7, two in one kernel with 3.6."""

MOST_IN_EPILOGUE = {"class_stats_kernel": 1400, "class_gradient_kernel": 1100}
"""Instructions of a thread after the products of a 128x256 tile that needs no masks: 1136 and 857 with Triton 3.7.1."""

SPILLS_ARE_KNOWN = Version(version("triton")) < Version("3.8")
"""The bounds above are for Triton 3.4 to 3.7. Newer ones spill more in the flash passes of D > 128:
slower, not wrong."""

MARGIN = CombinedMargin(1.2, 0.3, 0.1, "fold")

LEAST_STACK = 32
"""Bytes that CUDA's sine and cosine keep for the reduction of a huge argument."""


def _step(
    algorithm: str,
    dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype = BF16,
    D: int = 512,
    shifted: bool = False,
    margin: Callable[..., torch.Tensor] = MARGIN,
    N: int = 4096,
    C: int = 1_000_000,
    momentum: torch.dtype | None = None,
    sub_centers: int = 1,
    changed: bool = False,
) -> None:
    """A training step, on tensors without memory; given the dtype of its momentum a sampled one with CenterSGD."""
    x = torch.empty(N, D, dtype=dtype, device="meta")
    w = torch.empty(C, D, dtype=weight_dtype, device="meta")
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", algorithm)
        threshold = torch.empty(N, device="meta") if changed else None
        change = torch.empty(4, dtype=FP64, device="meta") if changed else None
        negatives = Negatives(sub_centers, threshold, change)
        if shifted:
            stages.class_max(x, w, target, None, negatives)
        shift = torch.empty(N, dtype=FP64, device="meta") if shifted else None
        step = None if momentum is None else _center_step(w, momentum)
        count = None if step is None else torch.empty((), dtype=torch.int64, device="meta")
        classes = None if step is None else step.classes
        total, _, center_sum = stages.class_stats(x, w, target, 64.0, shift, True, count, negatives, classes)
        cosine = backend.target_cosine(x, w, target)
        if total.dtype == FP32:
            numbers = parameters(margin)
            assert numbers is not None
            backend.margin_loss(total, cosine, 64.0, *numbers)
        backward = x, w, target, RowGradients(64.0, total.double(), total, cosine)
        if step is None:
            stages.weight_grad(*backward, negatives)
        else:
            stages.class_max(x, w, target, count, negatives, classes)
            stages.update_centers(*backward, step, negatives)
        backend.embedding_grad(backend.unit_embedding_grad(w, target, center_sum, total, cosine), x)


def _center_step(weight: torch.Tensor, momentum: torch.dtype) -> CenterStep:
    C, D = weight.shape
    units = torch.empty(C, -(-D // 64), device="meta") if momentum == torch.int8 else None
    classes = torch.empty(C // 2 + 1, dtype=torch.int64, device="meta")
    buffer = torch.empty(C, D, dtype=momentum, device="meta")
    return CenterStep(
        classes, buffer, units, 0.1, 0.9, 1e-4, 1 << 62, 0, torch.empty((), dtype=torch.bool, device="meta")
    )


DEFAULT_STEPS = {
    90: [
        {"algorithm": "chunks", "D": 512},
        {"algorithm": "chunks", "D": 512, "momentum": torch.int8},
        {"algorithm": "flash", "D": 256},
        {"algorithm": "chunks", "D": 512, "dtype": FP32, "weight_dtype": FP32},
        {"algorithm": "flash", "D": 512, "changed": True},
        {"algorithm": "chunks", "D": 512, "changed": True},
        {"algorithm": "flash", "D": 512, "sub_centers": 3, "changed": True, "C": 999_999},
    ],
    80: [{"algorithm": "chunks", "D": 512}],
    100: [{"algorithm": "chunks", "D": 512}],
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
    row += f" {resources.local_in_loop:>3} local in loop  {launch.label}"
    assert resources.shared <= SHARED_LIMIT[arch], row
    if launch.has_dot:
        assert resources.has_instruction(TENSOR_CORES[arch]), row
    if SPILLS_ARE_KNOWN or not launch.has_dot:
        assert resources.stack <= (MOST_STACK if launch.has_dot else LEAST_STACK), row
        assert resources.local_in_loop <= MOST_LOCAL_IN_LOOP, row
    assert resources.repeated_tiles == [], row
    constants = dict(launch.constants)
    is_usual = constants.get("threshold_ptr", "given") is None and not constants.get("HAS_SHIFT")
    if SPILLS_ARE_KNOWN and launch.kernel.__name__ in MOST_IN_EPILOGUE and launch.has_dot and is_usual:
        assert resources.stack == 0, f"the chunks spill: {row}"
    if launch.has_dot and arch == 90:
        _check_products(launch, resources, row)
    if launch.has_loop:
        assert resources.has_instruction(r"cp\.async"), f"operands are not loaded ahead: {row}"
    return row


def _check_products(launch: Launch, resources: Resources, row: str) -> None:
    """Check the products of a kernel for Hopper: as many as its tile needs, and the next under way meanwhile."""
    constants, options = dict(launch.constants), dict(launch.options)
    assert resources.products(options["num_warps"]) == launch.multiply_adds, row
    most = MOST_IN_EPILOGUE.get(launch.kernel.__name__)
    if most is None:
        return
    if launch.has_loop and constants["WIDTH"] % constants["BLOCK_D"] == 0:
        assert 1 in resources.pendings, f"no product is under way in the loop: {row}"
    if constants.get("threshold_ptr", "given") is None and not constants.get("HAS_SHIFT"):
        assert resources.epilogue <= most, f"{resources.epilogue} instructions after the products: {row}"


@pytest.mark.slow
def test_the_check_finds_products_that_are_computed_twice() -> None:
    """64 rows by eight warps, which Triton puts below each other unless the scores are split."""
    for launch in recorded(functools.partial(_step, "flash-chained"), 90):
        if launch.has_dot:
            resources = compiled(launch, 90)
            assert resources.repeated_tiles == ["64x64 by 8x1 warps of 16x32"]
            assert resources.products(8) == 3 * launch.multiply_adds // 2


def _check_all(steps: list[Callable[[], None]], arch: int) -> None:
    launches = dict.fromkeys(launch for step in steps for launch in recorded(step, arch))
    rows = [_check(launch, arch) for launch in launches]
    assert rows
    print("\n" + "\n".join(rows))


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(DEFAULT_STEPS))
def test_default_configurations(arch: int) -> None:
    _check_all([functools.partial(_step, **options) for options in DEFAULT_STEPS[arch]], arch)


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
@pytest.mark.slow
def test_sizes_of_one(algorithm: str) -> None:
    """Triton makes a constant of an argument that is 1: the kernels must be right to it for each of them."""
    steps = [functools.partial(_step, algorithm, D=1, N=1, C=1, momentum=momentum) for momentum in (None, torch.int8)]
    _check_all(steps, 90)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", list(SHARED_LIMIT))
def test_all_configurations(arch: int) -> None:
    steps = [functools.partial(_step, *arguments) for arguments in FULL_STEPS]
    margins = [
        *(CombinedMargin(1.2, 0.3, 0.1, boundary) for boundary in get_args(Boundary)),
        CombinedMargin(gradient="straight_through"),
        CosFace(),
    ]
    steps += [functools.partial(_step, "chunks", margin=margin) for margin in margins]
    steps += [
        functools.partial(_step, algorithm, dtype, weight, D, momentum=momentum)
        for algorithm, dtype, weight in (("chunks", BF16, BF16), ("chunks", FP32, FP32), ("flash", BF16, FP32))
        for D in (7, 128, 513)
        for momentum in (FP32, BF16, torch.int8)
        if algorithm == "chunks" or D < 513
    ]
    steps += [
        functools.partial(_step, algorithm, dtype, dtype, D, shifted, sub_centers=count, changed=True, C=999_999)
        for algorithm, dtype in (("chunks", BF16), ("chunks", FP16), ("chunks", FP32), ("flash", BF16))
        for D, shifted, count in ((512, False, 1), (128, True, 1), (512, True, 3))
    ]
    steps += [
        functools.partial(_step, "chunks-copied", D=512),
        functools.partial(_step, "flash", D=256, weight_dtype=FP32, momentum=FP32),
    ]
    _check_all(steps, arch)


class _Live(TorchDispatchMode):
    """Bytes of all tensors alive that were made under it, at their most, and of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.most, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.tensors = [each for each in self.tensors if each() is not None] + [weakref.ref(leaf) for leaf in made]
        alive = [tensor for each in self.tensors if (tensor := each()) is not None]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in alive}
        self.most = max(self.most, sum(storages.values()))
        self.largest = max([self.largest, *(leaf.untyped_storage().nbytes() for leaf in made)])
        return result


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
@pytest.mark.parametrize("N", [1024, 4096])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_memory_of_a_step_as_planned(
    dtype: torch.dtype, N: int, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stages allocate at C = 1 000 000, D = 512, counted on tensors without memory: at most 120 MB beyond the
    weight and its gradient, which leaves 8 for a product that older versions of torch cannot add in place."""
    monkeypatch.setattr(chunks, "multiply", lambda *_, **__: None)  # the library's, into memory that is there
    C, D = 1_000_000, 512
    with _Live() as live:
        launches = recorded(functools.partial(_step, algorithm, dtype, dtype, D, N=N, C=C), 90)
    assert launches
    weight, embeddings = C * D * dtype.itemsize, N * D * dtype.itemsize
    extra = live.most - 2 * weight - embeddings
    print(f"\n{algorithm}, {dtype}, N = {N}: {extra / 1e6:.0f} MB beyond the weight and its gradient")
    assert live.largest == weight
    assert 0 < extra <= 120e6 < N * C


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
@pytest.mark.parametrize("weight_dtype", [BF16, FP32])
def test_memory_of_a_sampled_step(weight_dtype: torch.dtype, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of CenterSGD on half of the classes copies none but a panel's: all 500 000 would be 0.5 or 1 GB."""
    monkeypatch.setattr(chunks, "multiply", lambda *_, **__: None)
    C, D, N = 1_000_000, 512, 1024
    with _Live() as live:
        assert recorded(functools.partial(_step, algorithm, BF16, weight_dtype, D, N=N, C=C, momentum=torch.int8), 90)
    given = C * D * (weight_dtype.itemsize + 1) + C * D // 64 * 4 + (C // 2 + 1) * 8 + N * D * 2
    print(f"\n{algorithm}, centers in {weight_dtype}: {(live.most - given) / 1e6:.0f} MB beyond centers and momentum")
    assert 0 < live.most - given <= 120e6
