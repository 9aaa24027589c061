"""The programs of a Triton launch are independent: no shared memory, any order; see test_triton_interpreted.py.

conftest.py looks for shared memory in every test of the interpreter. The tests here have panels of several tiles of
classes and several tiles of rows, as real sizes have them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

import triton as compiler
import triton.language as tl
from support.cases import Case, make_inputs, run
from support.triton_cases import BF16, INTERPRETED, Setting, check, force, loss
from support.triton_programs import forbid_races, forbid_reads, reverse

from fused_arcface.backends import torch as plain_torch
from fused_arcface.backends.triton import chunks, configs, exponentials, flash, panels, stages
from fused_arcface.engine.terms import CenterStep, RowGradients

pytestmark = INTERPRETED

FP32 = ("float32", "float32")
SETTINGS = [
    Setting(Case(140, 700, 40, *BF16, geometry="late"), "chunks"),
    Setting(Case(140, 700, 40, *FP32, geometry="late"), "chunks"),
    Setting(Case(140, 700, 40, "float16", "float16"), "chunks"),
    Setting(Case(140, 300, 40, *BF16, geometry="late"), "flash"),
]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_panels_of_several_tiles(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One panel holds all classes: three tiles of them, beside two of rows."""
    force(setting, monkeypatch)
    check(setting)


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_several_panels_of_several_tiles(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two panels of two tiles, the last of them short, with blocks of 64 rows."""
    setting = Setting(Case(140, 900, 40, *BF16, geometry="late", scale=1000.0), algorithm)
    force(setting, monkeypatch)
    two_tiles = configs.PanelConfig(exponential_bytes=1 << 40, center_bytes=512 * 2 * 48, max_rows=64)
    monkeypatch.setattr(chunks, "CHUNKS", two_tiles)
    monkeypatch.setattr(flash, "FLASH_PANEL", two_tiles)
    check(setting)


@pytest.mark.parametrize("algorithm", ["chunks", "flash", "chunks-copied", "flash-copied"])
def test_centers_where_they_are_stored(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass in four turns; the norms of two are taken at once. No kernel reads past the last center."""
    case = Case(70, 900, 64, *BF16, geometry="late")
    x, w, target, _ = make_inputs(case)
    memory = torch.full((1500, 64), torch.nan, dtype=w.dtype)
    memory[:900] = w
    stored = memory[:900]
    rows = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) - 0.5
    gradients = RowGradients(20.0, torch.full((70,), 8.0, dtype=torch.float64), *rows)
    force(Setting(case, algorithm), monkeypatch)
    panel = configs.PanelConfig(exponential_bytes=0, center_bytes=256 * 2 * 64, max_rows=64)
    monkeypatch.setattr(chunks, "CHUNKS", panel)
    monkeypatch.setattr(flash, "FLASH_PANEL", panel)
    monkeypatch.setattr(flash, "FLASH_STORED_PANEL", configs.PanelConfig(0, 4 * 256, 64))
    monkeypatch.setattr(panels, "NORMS", 512)
    made = []
    create = panels.Panel.create
    monkeypatch.setattr(panels.Panel, "create", lambda *arguments: made.append(create(*arguments)) or made[-1])
    forbid_reads(monkeypatch, memory[900:].data_ptr(), memory[900:].data_ptr() + memory[900:].nbytes)
    gradient = stages.weight_grad(x, stored, target, gradients)
    right = plain_torch.weight_grad(x.double(), w.double(), target, gradients)
    bound = 2.0**-7 * right.abs().amax(1, keepdim=True)
    assert ((gradient - right).abs() <= bound).all()
    assert made[0].as_stored != algorithm.endswith("-copied")
    assert [start for start, _ in made[0].turns()] == [0, 256, 512, 768]
    largest = stages.class_max(x, stored, target)
    torch.testing.assert_close(largest, plain_torch.class_max(x, w, target))
    assert made[1].as_stored != algorithm.endswith("-copied")


@pytest.mark.parametrize("algorithm", ["chunks", "flash"])
def test_stored_and_copied_centers_make_the_same_step(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, over three turns that change the centers one after the other: a copy differs by a power of two."""
    case = Case(9, 600, 64, *BF16, geometry="late")
    x, w, target, _ = make_inputs(case)
    w *= torch.logspace(-9, 9, 600)[:, None].to(w.dtype)
    rows = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) - 0.5
    gradients = RowGradients(20.0, torch.full((9,), 8.0, dtype=torch.float64), *rows)
    monkeypatch.setattr(panels, "NORMS", 512)
    panel = configs.PanelConfig(exponential_bytes=0, center_bytes=256 * 2 * 64, max_rows=64)
    monkeypatch.setattr(chunks, "CHUNKS", panel)
    monkeypatch.setattr(flash, "FLASH_PANEL", panel)
    results = []
    for name in (algorithm, f"{algorithm}-copied"):
        monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", name)
        weight, momentum = w.clone(), torch.zeros(600, 64)
        step = CenterStep(None, momentum, None, 0.5, 0.9, 0.01, 3, 0, torch.tensor(True))
        stages.update_centers(x, weight, target, gradients, step)
        results.append((weight, momentum, stages.weight_grad(x, w, target, gradients)))
    for stored, copied in zip(*results, strict=True):
        assert torch.equal(stored, copied)
    assert (results[0][0] != w).any(1).all()


def test_the_forward_pass_copies_the_centers_that_it_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a sum, 16-bit centers are taken as they are stored; those of another dtype or stride never are."""
    case = Case(3, 5, 64, *BF16)
    force(Setting(case), monkeypatch)
    x, w, target, _ = make_inputs(case)
    made = []
    create = panels.Panel.create
    monkeypatch.setattr(panels.Panel, "create", lambda *arguments: made.append(create(*arguments)) or made[-1])
    for weight, with_sum in ((w, False), (w, True), (w.float(), False), (w.T.contiguous().T, False)):
        stages.class_stats(x, weight, target, 20.0, None, with_sum)
    assert [panel.as_stored for panel in made] == [True, False, False, False]


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_any_order_of_programs_gives_the_same_numbers(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    force(setting, monkeypatch)
    inputs = make_inputs(setting.case)
    results = []
    for change in (None, reverse):
        if change is not None:
            change(monkeypatch)
        results.append(run(loss, inputs, margin=setting.case.margin, scale=64.0))
    for first, second in zip(*(result[:3] for result in results), strict=True):
        assert torch.equal(first, second)


@compiler.jit
def _first_tile(num_tiles_n, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Send every block of a column of tiles to the first classes."""
    block = tl.program_id(0)
    return block * 0, (block % num_tiles_n).to(tl.int64) * BLOCK_N, block * 0


def test_the_check_finds_blocks_of_the_same_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the check itself, which conftest.py has put in place
    monkeypatch.setattr(exponentials, "tile_place", _first_tile)
    force(SETTINGS[0], monkeypatch)
    with pytest.raises(AssertionError, match=r"^loss: error"):
        check(SETTINGS[0])
    forbid_races(monkeypatch)
    with pytest.raises(AssertionError, match=r"^class_stats_kernel: two programs write the same memory$"):
        check(SETTINGS[0])


@compiler.jit
def _always(target, first_c, num_classes, BLOCK_C: tl.constexpr):
    return num_classes > 0


@compiler.jit
def _never(target, first_c, num_classes, BLOCK_C: tl.constexpr):
    return num_classes < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tile_without_targets_needs_no_masks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three tiles of classes the first has the targets, and the last one has padding: those alone are masked."""
    name = str(dtype).removeprefix("torch.")
    x, w, target, _ = make_inputs(Case(9, 700, 40, name, name, geometry="late"))
    target %= 200
    rows = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) - 0.5
    gradients = RowGradients(20.0, torch.full((9,), 8.0, dtype=torch.float64), *rows)
    monkeypatch.setenv("FUSED_ARCFACE_TRITON_ALGORITHM", "chunks")
    results = []
    for needs_masks in (exponentials.needs_masks, _always, _never):
        monkeypatch.setattr(exponentials, "needs_masks", needs_masks)
        greatest = stages.class_max(x, w, target)
        sums = stages.class_stats(x, w, target, 20.0, None, True)
        results.append((greatest, *sums, *stages.weight_grad(x, w, target, gradients).split(256)))
    usual, always, never = results
    assert all(torch.equal(one, other) for one, other in zip(usual, always, strict=True))
    *masked, first, second, _ = [torch.equal(one, other) for one, other in zip(usual, never, strict=True)]
    assert masked == [False] * 4 and not first and second


def test_the_grid_finds_targets_that_are_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponentials, "needs_masks", _never)
    force(SETTINGS[0], monkeypatch)
    with pytest.raises(AssertionError, match=r"^loss: error"):
        check(SETTINGS[0])
