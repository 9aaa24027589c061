"""The PTX that nvcc makes of csrc/cuda, in the interpreter of tests/support/ptx: nvcc's own code, its host code and
backends/cuda.py, over the CPU's tensors.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.cases import Case, make_inputs
from support.cuda_cases import CORE, Setting, check
from support.negatives_cases import check_stages
from support.ptx import host
from support.ptx.machine import Machine
from support.ptx.program import parse
from torch import Tensor

from fused_arcface.backends import cuda
from fused_arcface.backends import torch as plain_torch
from fused_arcface.base import keyed_random
from fused_arcface.engine.terms import CenterStep, RowGradients

pytestmark = [
    pytest.mark.full,
    pytest.mark.emulation,
    pytest.mark.skipif(host.missing() is not None, reason=str(host.missing())),
]

FP32, BF16, FP16 = "float32", "bfloat16", "float16"
ONE_TILE = cuda.ChunkConfig(0, 0)
SCALE = 12.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[host.Gpu]:
    with host.in_place(monkeypatch) as gpu:
        yield gpu


@dataclass(frozen=True)
class Formula:
    """The passes of a problem in fp64, from csrc/arguments.h: sums, maxima and gradients over an N x C matrix."""

    x: Tensor
    w: Tensor
    target: Tensor

    def cosines(self) -> Tensor:
        return F.normalize(self.x.double(), eps=1e-12) @ F.normalize(self.w.double(), eps=1e-12).T

    def is_target(self) -> Tensor:
        return F.one_hot(self.target.clamp(min=0), len(self.w)).bool() & (self.target >= 0)[:, None]

    def stats(self) -> tuple[Tensor, Tensor, Tensor]:
        cosines = self.cosines().masked_fill(self.is_target(), -torch.inf)
        exponentials = (SCALE * cosines).exp()
        return exponentials.sum(1), cosines.amax(1), exponentials @ F.normalize(self.w.double())

    def gradients(self) -> RowGradients:
        """Upstream numbers of any size, to multiply the exponentials and to stand in the target's place."""
        rows = torch.arange(len(self.x))
        lse = self.stats()[0].log()
        return RowGradients(SCALE, lse, 0.5 + (rows % 7) / 4, -1.5 + (rows % 3) / 4)

    def weight_grad(self) -> Tensor:
        _, lse, negative, positive = self.gradients()
        by_cosine = negative.double()[:, None] * (SCALE * self.cosines() - lse[:, None]).exp()
        by_cosine = torch.where(self.is_target(), positive.double()[:, None], by_cosine)
        d_unit = by_cosine.T @ F.normalize(self.x.double())
        unit, norm = F.normalize(self.w.double()), self.w.double().norm(dim=1, keepdim=True)
        return (d_unit - unit * (unit * d_unit).sum(1, keepdim=True)) / norm


def problem(N: int, C: int, D: int, dtype: str) -> Formula:
    x, w, target, _ = make_inputs(Case(N, C, D, dtype, dtype))
    target[4::5] = -1  # in another shard
    target[0] = C - 1
    return Formula(x, w, target)


def compare(name: str, got: Tensor, right: Tensor, tolerance: float) -> None:
    error = ((got.double() - right).abs().max() / right.abs().max()).item()
    assert error <= tolerance, f"{name}: error {error:.1e}, allowed {tolerance:.1e}"


TOLERANCES = {FP32: (1e-5, 2e-5), "tf32": (1e-2, 1e-2), BF16: (2e-6, 2.0**-7), FP16: (2e-6, 2.0**-7)}
"""Of sums and maxima, and of what the second products give: their 16-bit operands are rounded, 2⁻⁹ each. tf32 rounds
those of the first as well: a cosine to 2⁻¹¹, an exponential by the scale times that. In fp32 a sum is cut off 3·D/8
times."""


def check_stats(given: Formula, precision: str) -> None:
    sums, rest = TOLERANCES[precision]
    got = cuda.class_stats(given.x, given.w, given.target, SCALE, None, True)
    for name, mine, right, tolerance in zip(
        ("sum", "maximum", "center sum"), got, given.stats(), (sums, sums, rest), strict=True
    ):
        compare(name, mine, right, tolerance)


def check_gradient(given: Formula, precision: str) -> None:
    got = cuda.weight_grad(given.x, given.w, given.target, given.gradients())
    compare("weight_grad", got, given.weight_grad(), TOLERANCES[precision][1])


BATCHES = [
    # Two chunks of classes, five stages of depth and two tiles of columns; one of each; neither.
    ((5, 131, 136), BF16, True),
    ((17, 33, 65), FP16, False),
    ((3, 130, 40), FP32, False),
    ((5, 9, 7), "tf32", True),
]
FULL_BATCHES = [
    (shape, precision, chunks)
    for shape, chunks in (
        ((1, 2, 3), True),
        ((5, 131, 136), True),
        ((130, 140, 33), False),  # two tiles of rows
        ((17, 257, 65), False),
        ((128, 128, 128), False),
        ((129, 300, 513), True),
    )
    for precision in TOLERANCES
    if (shape, precision, chunks) not in BATCHES
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "precision", "chunks"),
    [*BATCHES, *(pytest.param(*each, marks=pytest.mark.full) for each in FULL_BATCHES)],
)
def test_passes_agree_with_the_formula(
    shape: tuple[int, int, int], precision: str, chunks: bool, gpu: host.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunks:
        monkeypatch.setattr(cuda, "CHUNKS", ONE_TILE)
    given = problem(*shape, FP32 if precision == "tf32" else precision)
    monkeypatch.setattr(cuda, "_precision", lambda x: precision)
    check_stats(given, precision)
    check_gradient(given, precision)


QUICK = [
    Setting(Case(33, 150, 40, BF16, BF16)),
    Setting(Case(9, 97, 33, FP16, FP16, geometry="zero_rows")),
    Setting(Case(9, 97, 33, BF16, FP32, geometry="tiny"), "high"),
    Setting(Case(9, 97, 33, FP32, FP32, geometry="late", layout="transposed")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [*QUICK, *(pytest.param(each, marks=pytest.mark.full) for each in CORE if each not in QUICK)],
    ids=str,
)
def test_loss_and_gradients_agree_with_the_reference(
    setting: Setting, gpu: host.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of a step by way of backends/cuda.py: the rows' stages too."""
    if setting.chunks:
        monkeypatch.setattr(cuda, "CHUNKS", ONE_TILE)
    check(setting, "cpu")
    assert {name for name, _ in gpu.launches if "margin_loss_kernel" in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "sub_centers", "sine", "classes"),
    [
        (torch.bfloat16, 3, 0.4, 20),
        *(
            pytest.param(dtype, *rest, marks=pytest.mark.full)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for rest in ((1, 0.0, 260), (3, None, 87), (16, 0.4, 17))
        ),
    ],
)
def test_negatives_that_are_not_plain(
    dtype: torch.dtype, sub_centers: int, sine: float | None, classes: int, gpu: host.Gpu
) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 2.0**-7
    check_stages(cuda, dtype, tolerance, sub_centers, sine is not None, classes, "cpu", sine or 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "momentum_dtype",
    [torch.int8, *(pytest.param(each, marks=pytest.mark.full) for each in (None, torch.float32, torch.bfloat16))],
)
def test_step_of_the_centers(momentum_dtype: torch.dtype | None, gpu: host.Gpu) -> None:
    """In place, with padding among the classes. Random bits are the reference's: numbers differ by a unit at most."""
    given = problem(12, 40, 70, FP32)
    classes = torch.tensor([*range(0, 40, 3), 40, 40])
    w, target = given.w.bfloat16(), torch.where(given.target < 0, -1, given.target % 14)
    buffer = units = None
    if momentum_dtype == torch.int8:
        buffer = torch.randint(-127, 128, w.shape, dtype=torch.int8)
        units = torch.full((40, 2), 0.01)
    elif momentum_dtype is not None:
        buffer = (0.1 * w.float()).to(momentum_dtype)
    key = keyed_random.rounding_key(3, 4)
    results = []
    for backend in (cuda, plain_torch):
        weight = w.clone()
        moments = [None if each is None else each.clone() for each in (buffer, units)]
        step = CenterStep(classes, *moments, 0.1, 0.9, 5e-4, key, 1000, torch.tensor(True))
        backend.update_centers(given.x, weight, target, given.gradients(), step)
        results.append((weight, moments[0]))
    for got, right in zip(*results, strict=True):
        if got is not None:
            unit = 1 if got.dtype == torch.int8 else 2.0**-7 * right.abs().max()
            difference = (got.double() - right.double()).abs()
            others = (difference > 1e-5 * right.double().abs() + 1e-6).double().mean()
            assert difference.max() <= unit and others < 0.01
            assert torch.equal(got[1::3], w[1::3] if got is results[0][0] else buffer[1::3])
    assert not torch.equal(results[0][0], w)


def test_sine_and_cosine_of_a_large_angle(gpu: host.Gpu) -> None:
    """Past 105615 CUDA reduces the angle with a table on the thread's stack: local memory, and a constant array."""
    factor = 100003.0
    angle = torch.tensor([math.pi / 2, math.pi]) * factor  # in fp32, as the kernel has it
    assert (angle > 105615).all()
    loss, *_ = cuda.margin_loss(torch.zeros(2), torch.tensor([0.0, -1.0]), 1.0, factor, 0.0, 0.0, "none", "exact")
    torch.testing.assert_close(loss.double(), F.softplus(-torch.cos(angle.double())), rtol=1e-6, atol=1e-6)


@pytest.mark.full
def test_every_instruction_of_every_kernel_is_known() -> None:
    kernels = host.programs().kernels
    # Six products in four precisions, rows of three dtypes packed for four precisions, three kernels that all
    # precisions share, four of rows.
    assert len(kernels) == 4 * 6 + 4 * 3 + 3 + 4
    for name, kernel in kernels.items():
        host.programs().machine(name, kernel.most_threads)


def test_no_launch_asks_for_more_than_a_block_may_have(gpu: host.Gpu) -> None:
    check_stats(problem(5, 131, 136, BF16), BF16)
    geometry = {re.sub(r".*\d([a-z_]+_kernel).*", r"\1", name): rest for name, rest in gpu.launches}
    # gemm.h: four stages of two tiles of 128 rows of 64 bytes; two tiles of classes by one of rows.
    assert geometry["class_stats_kernel"] == (1, 2, 1, 128, 1, 1, 65536)


# What the tests above would miss if the interpreter were too lenient: each of these changes of nvcc's text is noticed.


RACE = "without a barrier between"
OUTSIDE = "outside of all memory"
OPEN = "copy is not waited for"
WRONG = r"error \S+, allowed|nan"


@dataclass(frozen=True)
class Mutant:
    name: str
    kernel: str
    old: str
    """A regular expression."""
    new: str
    how: str = WRONG
    """A regular expression that the error has."""
    which: int | None = 0
    """Of the places where the text has it, counted from the end where negative; None: all."""
    full: bool = True
    shape: tuple[int, int, int] = (5, 40, 136)

    def __str__(self) -> str:
        return f"{self.name} in {self.kernel}".replace(" ", "-")

    def programs(self) -> host.Programs:
        """nvcc's kernels but for this one."""
        parts = re.split(r"(?=^(?:\.visible )?\.entry )", host.texts()["passes_bfloat16"], flags=re.MULTILINE)
        index = next(i for i, part in enumerate(parts) if re.search(rf"\.entry \w*\d{self.kernel}_kernel", part))
        places = list(re.finditer(self.old, parts[index]))
        assert places, f"{self.kernel} no longer has {self.old}"
        for place in reversed(places if self.which is None else [places[self.which]]):
            changed = place.expand(self.new)
            parts[index] = parts[index][: place.start()] + changed + parts[index][place.end() :]
        return host.programs().changed(parse("mutant", parts[0] + parts[index]))


LDMATRIX = r"(ldmatrix\S+ \{%r\d+, )(%r\d+)(, )(%r\d+)"
TRANSPOSING = LDMATRIX.replace("ldmatrix", r"ldmatrix\S+trans")
MMA_A = r"(mma\S+ \{[^}]*\}, \{)(%r\d+)(, )(%r\d+)"
MMA_B = r"(mma\S+ \{[^}]*\}, \{[^}]*\}, \{)(%r\d+)(, )(%r\d+)"
MMA_C = r"(mma\S+ \{(%f\d+), (%f\d+).*\{)%f\d+, %f\d+"
BARRIER = r"bar\.sync \t0;"
WAIT = r"cp\.async\.wait_group \d;"
COPY = r"(cp\.async\.cg\S+ \[%r\d+)"
SHUFFLE = r"shfl\.sync\.bfly\.b32 \t(%r\d+)\|(%p\d+), (%r\d+).*;"
EXPONENTIAL = r"ex2\.approx\.ftz\.f32 (%f\d+), (%f\d+);"
SWAPPED = r"\1\4\3\2"
SECOND_PRODUCTS = (("center_sum", (5, 200, 16)), ("center_gradient", (130, 8, 16)))
"""Kernels and shapes with more stages of depth than are kept."""

MUTANTS = [
    Mutant("no barrier between stages", "class_stats", BARRIER, "", RACE, 0, full=False),
    Mutant("no barrier before the tile is staged", "class_stats", BARRIER, "", RACE, 1),
    Mutant("no barrier after the tile is staged", "class_stats", BARRIER, "", RACE, 2),
    *(
        Mutant(f"no barrier {which}", kernel, BARRIER, "", RACE, which, shape=shape)
        for kernel, shape in (("class_gradient", (5, 40, 136)), *SECOND_PRODUCTS)
        for which in range(3)
    ),
    Mutant("no barrier", "finish_row_stats", BARRIER, "", RACE),
    Mutant("no wait", "class_stats", WAIT, "", OPEN, full=False),
    Mutant("no wait", "class_gradient", WAIT, "", OPEN),
    *(Mutant("no wait", kernel, WAIT, "", OPEN, shape=shape) for kernel, shape in SECOND_PRODUCTS),
    Mutant("a wait for one copy less", "class_stats", "wait_group 2", "wait_group 3", OPEN),
    Mutant("no group", "class_stats", r"cp\.async\.commit_group;", "", OPEN, which=1),
    Mutant("no copy", "class_stats", r"cp\.async\.cg.*;", "", "reads what nothing wrote", which=3, full=False),
    Mutant("a copy to another place", "class_stats", COPY, r"\1+16", OPEN + "|at once", which=3),
    Mutant("a copy to an odd place", "class_stats", COPY, r"\1+8", "not a multiple", which=3),
    Mutant("registers of ldmatrix swapped", "class_stats", LDMATRIX, SWAPPED, full=False),
    Mutant("registers of ldmatrix swapped", "center_sum", TRANSPOSING, SWAPPED),
    Mutant("no transposition", "center_sum", r"x4\.trans", "x4"),
    Mutant("registers of A swapped", "class_stats", MMA_A, SWAPPED, which=2, full=False),
    Mutant("registers of B swapped", "class_gradient", MMA_B, SWAPPED, which=8),
    Mutant("a sum in another's place", "center_gradient", MMA_C, r"\1\3, \2", shape=(130, 8, 16)),
    Mutant("a row past the last", "finish_center_sum", r"setp\.ge\.s64", "setp.gt.s64", OUTSIDE, full=False),
    Mutant("a row of padding", "row_terms", r"setp\.ge\.s64(.*%rd1, %rd12;)", r"setp.gt.s64\1", OUTSIDE),
    Mutant("a class of padding", "class_stats", r"setp\.ge\.s32(.*\n.*or\.pred)", r"setp.gt.s32\1", which=None),
    Mutant("all blocks at tile 0", "class_stats", r"%ctaid\.y", "%ctaid.x", "another block", -1, False, (5, 140, 16)),
    Mutant("half a quad's sum", "class_stats", SHUFFLE, r"mov.u32 \1, \3;", which=2),
    Mutant("a shuffle of half a warp", "class_gradient", r"(mov\.u32 \t%r\d+, )-1;", r"\g<1>65535;", "a whole warp"),
    Mutant("no exponential", "class_stats", EXPONENTIAL, r"mov.f32 \1, \2;"),
    Mutant("rounded up", "row_terms", r"cvt\.rn\.f32\.f64", "cvt.rp.f32.f64", "does not know", full=False),
]


@pytest.mark.parametrize(
    "mutant", [pytest.param(each, marks=[pytest.mark.full] if each.full else [], id=str(each)) for each in MUTANTS]
)
def test_mutants_of_the_text_fail(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(*mutant.shape, BF16)
    checked = check_gradient if "gradient" in mutant.kernel else check_stats
    with host.in_place(monkeypatch, mutant.programs()), pytest.raises((RuntimeError, AssertionError), match=mutant.how):
        checked(given, BF16)


@pytest.mark.parametrize("fails", [False, True])
def test_the_current_device_comes_back(fails: bool, gpu: host.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched on the tensors' device. Afterwards the earlier one is current, also if a launch throws."""
    given, current, during = problem(3, 5, 8, FP32), host.current_device(), []
    monkeypatch.setattr(cuda, "_device", lambda tensor: ((2, 0), 4))
    monkeypatch.setattr(current, "value", 1)

    def launch(*arguments: object) -> None:
        during.append(current.value)
        assert not fails, "no launch"

    monkeypatch.setattr(Machine, "launch", launch)
    for stage in (
        lambda: cuda.class_stats(given.x, given.w, given.target, SCALE, None, True),
        lambda: cuda.target_cosine(given.x, given.w, given.target),
        lambda: cuda.weight_grad(given.x, given.w, given.target, given.gradients()),
    ):
        during.clear()
        with pytest.raises(RuntimeError, match="no launch") if fails else contextlib.nullcontext():
            stage()
        assert set(during) == {2} and current.value == 1


def test_access_outside_of_an_allocation_names_instruction_and_thread(gpu: host.Gpu) -> None:
    """A label past the classes: the row's warp reads a center that is not there."""
    given = problem(9, 5, 16, BF16)
    given.target[:] = torch.tensor([0, 1, 2, 3, 4, 0, 1, 5, 2])
    where = (
        r"target_cosine_kernel.*line \d+, ld\.global\S* .*thread 22[4-9] of block \(0, 0, 0\).*outside of all memory"
    )
    with pytest.raises(RuntimeError, match=where):
        cuda.target_cosine(given.x, given.w, given.target)


@pytest.mark.parametrize(("moved", "why"), [(-256, OUTSIDE), (8, "is not a multiple of that")])
def test_workspace_that_is_short_or_not_aligned(
    moved: int, why: str, gpu: host.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = cuda.torch.empty

    def empty(*size: int, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
        tensor = fresh(*size, dtype=dtype)
        if dtype != torch.uint8:
            return tensor
        return fresh(size[0] + moved, dtype=dtype)[max(moved, 0) :]

    monkeypatch.setattr(cuda.torch, "empty", empty, raising=False)
    with pytest.raises(RuntimeError, match=why):
        check_stats(problem(5, 40, 16, BF16), BF16)
