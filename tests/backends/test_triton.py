"""The Triton backend's host code, and its kernels on a GPU where there is one.

test_triton_interpreted.py tests the kernels on any machine.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.backends import triton as backend

pytest.importorskip("triton", reason="Triton is not installed here")

from support.cases import Case
from support.triton_cases import BF16, CORE, FULL, Setting, check, force
from support.triton_negatives import NEGATIVES, NegativesSetting, check_negatives

from fused_arcface.backends.triton import chunks, common, configs, stages
from fused_arcface.engine.terms import CenterStep, RowGradients

RESULTS = Path(__file__).parents[2] / "bench" / "results"

needs_gpu = pytest.mark.skipif(
    backend.unavailable() is not None, reason=f"backend 'triton' cannot run here: {backend.unavailable()}"
)


@pytest.mark.skipif(backend.unavailable() is None, reason="the backend can run here")
def test_says_why_it_cannot_run() -> None:
    reason = backends.available()["triton"]
    assert reason is not None and ("CUDA" in reason or "triton" in reason or "GPU" in reason)
    x = torch.eye(2)
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: ") as raised:
        fa.margin_softmax_loss(x, x, torch.tensor([0, 1]), backend="triton")
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("found", "reason"), [("3.3.1", "triton >= 3.4 is needed; found 3.3.1"), ("3.4.0", None), ("10.0", None)]
)
def test_least_version(found: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", lambda _: found)
    assert backend._missing_compiler() == reason


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = backend._missing_compiler()
    assert reason is not None and reason.startswith("the package triton (>= 3.4) cannot be imported")


def test_a_missing_c_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would raise in the first forward pass. "auto" goes on to the next backend instead."""

    def no_compiler() -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    class Driver:
        utils = property(lambda self: no_compiler())

    monkeypatch.setattr("fused_arcface.backends.nvidia.unavailable", lambda *_: None)
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=Driver()))
    monkeypatch.setattr(backend, "_driver_reason", backend._driver_reason.__wrapped__)  # without what it has kept
    reason = backend.unavailable()
    assert reason is not None
    assert reason.startswith("Triton cannot start here: RuntimeError: Failed to find C compiler.")
    assert "gcc or clang" in reason
    monkeypatch.setattr(backends.registry, "_unavailable", {"triton": reason, "cuda": None}.get)
    assert backends.select("auto", torch.device("cuda")) == "cuda"


def test_every_size_has_panels_and_splits() -> None:
    """The host's loops: whole tiles, within their budgets, never empty."""
    for N in (1, 64, 1000, 4096, 100_000):
        for D in (16, 512, 8192):
            for C in (1, 1000, 10_000_000):
                classes = configs.panel_classes(configs.CHUNKS, N, C, 2 * D, 2, 256)
                assert classes % 256 == 0 and 256 <= classes <= -(-C // 256) * 256
                rows = min(N, configs.CHUNKS.max_rows)
                assert classes == 256 or rows * classes * 2 <= configs.CHUNKS.exponential_bytes
        splits = configs.row_splits(-(-N // 64), 512, 4 * N * 512, 132)
        assert 1 <= splits <= 132 and (splits == 1 or splits * 4 * N * 512 <= 64 * configs.MIB)
    assert configs.row_splits(64, 512, 4 * 4096 * 512, 132) == 2  # N = 4096: 128 blocks on 132 multiprocessors


def test_unknown_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", "fast")
    with pytest.raises(ValueError, match=r"must be one of 'flash', .*, 'chunks-copied'; got 'fast'"):
        configs.pick(1, 1, 1, 90, torch.bfloat16, True)


def test_fp32_and_fp16_are_not_for_the_flash_passes() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert configs.pick(1, 1, 64, 90, dtype, True) == "chunks"


def _measured() -> dict[tuple[object, ...], dict[str, float]]:
    """Return the committed times of the GPUs, milliseconds by algorithm, by device, case and pass."""
    times: dict[tuple[object, ...], dict[str, float]] = {}
    for path in sorted(RESULTS.glob("h*00/rows.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                name = row["provider"].removeprefix("fused_arcface-")
                if name in configs.ALGORITHMS:
                    sizes = (int(row[size]) for size in ("N", "C", "D"))
                    case = (path.parent.name, row["pass"], row["dtype"], row["weight_dtype"], *sizes)
                    times.setdefault(case, {})[name] = float(row["ms"])
    return times


@pytest.mark.parametrize(("case", "times"), _measured().items(), ids=lambda each: str(each)[:80])
def test_the_algorithm_that_was_faster_is_picked(
    case: tuple[str, str, str, str, int, int, int], times: dict[str, float]
) -> None:
    """In each committed row of a GPU the pick is at most 5 % slower than any of the others."""
    _, passes, dtype, _, N, C, D = case
    picked = configs.pick(N, C, D, 90, getattr(torch, dtype), passes == "fwd+bwd")
    assert set(times) >= {"flash", "chunks"}
    assert times[picked] <= 1.05 * min(times.values())


def test_committed_rows_of_both_gpus_judge_the_pick() -> None:
    """N on both sides of the limits, three D, and few classes: a lost file would leave nothing to judge by."""
    cases = set(_measured())
    assert {("h100", "fwd+bwd", "bfloat16", "bfloat16", N, 10**6, 512) for N in (1024, 4096)} <= cases
    assert {("h200", "fwd", "bfloat16", "bfloat16", N, 10**6, 512) for N in (256, 512)} <= cases
    assert {case[-1] for case in cases} == {128, 256, 512}
    assert ("h200", "fwd+bwd", "bfloat16", "bfloat16", 1024, 10**5, 512) in cases


def test_each_pass_picks_its_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass without gradients, one with them, and a backward pass whose sample of the classes is small."""
    asked = []
    monkeypatch.setattr(stages, "pick", lambda *arguments: asked.append(arguments) or "chunks")
    monkeypatch.setattr(chunks, "class_stats", lambda *_: 1 / 0)
    monkeypatch.setattr(chunks, "unit_gradients", lambda *_: 1 / 0)
    monkeypatch.setattr(common, "_run", lambda *_: None)
    x, w = torch.empty(4, 512, dtype=torch.bfloat16, device="meta"), torch.empty(9, 512, device="meta")
    target, row = torch.empty(4, dtype=torch.int64, device="meta"), torch.empty(4, device="meta")
    step = CenterStep(torch.empty(5, dtype=torch.int64, device="meta"), None, None, 0.1, 0.0, 0.0, 0, 0, row)
    gradients = RowGradients(64.0, row.double(), row, row)
    for call in (
        lambda: stages.class_stats(x, w, target, 64.0, None, False),
        lambda: stages.class_stats(x, w, target, 64.0, None, True),
        lambda: stages.weight_grad(x, w, target, gradients),
        lambda: stages.update_centers(x, w, target, gradients, step),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    expected = [(4, 9, False), (4, 9, True), (4, 9, True), (4, 5, True)]
    assert asked == [(N, C, 512, 90, torch.bfloat16, with_sums) for N, C, with_sums in expected]


@pytest.fixture
def gpu() -> Iterator[str]:
    yield "cuda"
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("setting", CORE, ids=str)
def test_agrees_with_the_reference_on_a_gpu(setting: Setting, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(setting, monkeypatch)
    check(setting, gpu)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("setting", NEGATIVES, ids=str)
def test_negatives_on_a_gpu(setting: NegativesSetting, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_negatives(setting, monkeypatch, gpu)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.full
@pytest.mark.parametrize("setting", FULL, ids=str)
def test_agrees_with_the_reference_over_the_full_grid_on_a_gpu(
    setting: Setting, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(setting, monkeypatch)
    check(setting, gpu)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("algorithm", "dtypes", "D"),
    [
        ("chunks", BF16, 512),
        ("chunks", ("bfloat16", "float32"), 512),
        ("chunks", ("float16", "float16"), 512),
        ("chunks", ("float32", "float32"), 512),
        ("flash", BF16, 512),
        ("flash", BF16, 256),
        ("flash", BF16, 128),
    ],
)
def test_real_sizes_on_a_gpu(
    algorithm: str, dtypes: tuple[str, str], D: int, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several panels of the budgets as they are, the last of them short; late in training."""
    setting = Setting(Case(1500, 40_007, D, *dtypes, geometry="late"), algorithm)
    force(setting, monkeypatch)
    check(setting, gpu)
