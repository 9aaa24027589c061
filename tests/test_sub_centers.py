"""Sub-centers: counts, dominant centers, rows far from them, and one center of each class that is kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.distributed_helpers import run_ranks
from torch import Tensor

import fused_arcface as fa
from fused_arcface import sub_centers
from fused_arcface.checkpoint import convert
from fused_arcface.checkpoint.centers import Rows


def at(*degrees: float) -> Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], 1)


# Two classes of two centers, at 0° and 90°, and at 180° and 270°; class 2 has no rows.
WEIGHT = 3 * torch.cat([at(0, 90), at(180, 270), at(10, 20)])
# Class 0: rows at 80, 100, 91 (near 90°) and at 5; class 1: at 200, and at 30, which is far from both.
ROWS, LABELS = 2 * at(80, 100, 91, 5, 200, 30), torch.tensor([0, 0, 0, 0, 1, 1])


def head() -> fa.MarginHead:
    built = fa.MarginHead(2, 3, sub_centers=2, dtype=torch.float64)
    built.weight.data.copy_(WEIGHT)
    return built


def test_by_hand() -> None:
    # 30° is 150° from 180° and 120° from 270°: the latter is nearer.
    counts = sub_centers.count_rows(head(), [(ROWS[:2], LABELS[:2]), (ROWS[2:], LABELS[2:])])
    assert counts.tolist() == [[1, 3], [1, 1], [0, 0]]
    chosen = sub_centers.dominant(counts)
    assert chosen.tolist() == [1, 0, 0]
    kept = sub_centers.keep_dominant(head().weight, chosen)
    torch.testing.assert_close(kept, 3 * at(90, 180, 10))
    # From 90°: 10, 10, 1 and 85 degrees; from 180°: 20 and 150.
    rows, angles = sub_centers.far_rows(head(), [(ROWS[:2], LABELS[:2]), (ROWS[2:], LABELS[2:])], chosen)
    assert rows.tolist() == [3, 5]
    torch.testing.assert_close(angles, torch.tensor([85.0, 150.0], dtype=torch.float64))
    rows, _ = sub_centers.far_rows(head(), [(ROWS, LABELS)], chosen, degrees=90)
    assert rows.tolist() == [5]


def _counts_and_far() -> tuple[Tensor, Tensor]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    built = fa.PartialFC(2, 3, sub_centers=2, dtype=torch.float64)
    built.load_full_weight(WEIGHT)
    batches = [(ROWS[rank::world], LABELS[rank::world])]
    counts = sub_centers.count_rows(built, batches)
    return counts, sub_centers.far_rows(built, batches, sub_centers.dominant(counts))[0]


@pytest.mark.distributed
def test_ranks_count_together_and_list_their_own() -> None:
    first, second = run_ranks(2, _counts_and_far)
    assert first[0].tolist() == second[0].tolist() == [[1, 3], [1, 1], [0, 0]]
    assert first[1].tolist() == [] and second[1].tolist() == [1, 2]  # rows 3 and 5 are the second rank's


def test_convert_keeps_the_dominant_centers(tmp_path: Path) -> None:
    save_file({"weight": WEIGHT.float()}, tmp_path / "centers.safetensors")
    save_file({"dominant": torch.tensor([1, 0, 0])}, tmp_path / "dominant.safetensors")
    source, chosen = tmp_path / "centers.safetensors", tmp_path / "dominant.safetensors"
    written = convert.convert([source], tmp_path / "one.safetensors", sub_centers=2, dominant=chosen)
    torch.testing.assert_close(load_file(written)["weight"], 3 * at(90, 180, 10).float())
    assert convert.read(written).sub_centers == 1
    # Pieces that split a class, as shards of ranks may.
    whole = convert.read(source, 2)
    rows = whole.tensors["weight"]
    pieces = Rows(rows.dtype, rows.shape, lambda: iter(next(rows.pieces()).split([1, 2, 3])))
    split = convert.keep_dominant(convert.Centers({"weight": pieces}, whole.values), torch.tensor([1, 0, 0]))
    kept = torch.cat(list(split.tensors["weight"].pieces()))
    torch.testing.assert_close(kept, 3 * at(90, 180, 10).float())
    for wrong, message in (
        (torch.tensor([1, 0]), "dominant must be integers (C=3,); got (2,) torch.int64"),
        (torch.tensor([1, 0, 2]), "dominant must be in [0, sub_centers=2); got 2"),
    ):
        with pytest.raises(convert.ConvertError) as raised:
            convert.keep_dominant(whole, wrong)
        assert str(raised.value) == message
    with pytest.raises(convert.ConvertError, match=r"has no tensor 'dominant' \(C,\); it has weight"):
        convert.convert([source], tmp_path / "two.safetensors", sub_centers=2, dominant=source)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sub_centers.count_rows(head(), [(ROWS, LABELS + 2)]), "labels must be in [0, C=3); got 3 at row 4"),
        (lambda: sub_centers.own_cosines(ROWS, WEIGHT, LABELS + 9, 2), "labels must be in [0, C=3); got 9 at row 0"),
        (lambda: sub_centers.own_cosines(ROWS, WEIGHT[0], LABELS, 2), "weight must be (C, D) with C >= 1"),
        (lambda: sub_centers.own_cosines(ROWS[0], WEIGHT, LABELS[:1], 2), "embeddings must be (N, D=2)"),
        (lambda: sub_centers.own_cosines(ROWS, WEIGHT, LABELS[:1], 2), "labels must be (N=6,); got (1,)"),
        (
            lambda: sub_centers.far_rows(head(), [], torch.tensor([0, 0, 0]), 200),
            "degrees must be in [0, 180]; got 200",
        ),
        (lambda: sub_centers.far_rows(head(), [], torch.tensor([0, 2, 0])), "centers must be in [0, sub_centers=2)"),
        (
            lambda: sub_centers.keep_dominant(WEIGHT, torch.tensor([0] * 4)),
            "centers must be (C,) beside weight (C·K, D)",
        ),
        (lambda: sub_centers.dominant(torch.tensor([1])), "counts must be (C, sub_centers); got (1,)"),
    ],
)
def test_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        call()  # type: ignore[operator]
    assert message in str(raised.value)


def test_no_rows() -> None:
    rows, angles = sub_centers.far_rows(head(), [], torch.tensor([0, 0, 0]))
    assert len(rows) == len(angles) == 0 and rows.dtype == torch.int64
    assert math.isclose(
        sub_centers.own_cosines(ROWS[:1], WEIGHT, LABELS[:1], 2)[0, 1].item(), math.cos(math.radians(10))
    )
