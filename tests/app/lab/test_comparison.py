"""``compare``: its losses against their formulas, its batches, a run, an interrupted run, and the command."""

from __future__ import annotations

import csv
import inspect
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("matplotlib")

import fused_arcface as fa
from fused_arcface.app.cli import run
from fused_arcface.app.cli.compare import compare
from fused_arcface.app.data import LabeledImages, identity_images
from fused_arcface.app.drawing import write_pictures
from fused_arcface.app.lab import comparison
from fused_arcface.app.lab.batches import identity_batches, random_view, two_view_batches
from fused_arcface.app.lab.comparison import chosen_criteria, run_comparison
from fused_arcface.app.lab.comparison_pictures import comparison_drawings
from fused_arcface.app.lab.criteria import criteria
from fused_arcface.app.lab.heads import CenterLossHead, contrastive, triplet_batch_hard, triplet_semi_hard
from fused_arcface.app.lab.plans import QUICK_COMPARISON as QUICK
from fused_arcface.app.lab.plans import comparison_plan
from fused_arcface.app.lab.record import ROC_FARS, ComparisonError, Folder, Row

EMBEDDINGS = torch.randn(12, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4])


def squared_distances(embeddings: Tensor) -> Tensor:
    unit = F.normalize(embeddings)
    return (unit[:, None] - unit[None]).square().sum(2)


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_contrastive_loss_is_the_documents_formula(margin: float) -> None:
    """Y·D² + (1 − Y)·max(0, m − D²), Y = 1 for a similar pair; of each kind the mean of those that are not 0."""
    squared = squared_distances(EMBEDDINGS)
    same, different = [], []
    for i, j in itertools.combinations(range(12), 2):
        y = float(LABELS[i] == LABELS[j])
        value = y * squared[i, j] + (1 - y) * max(0.0, margin - float(squared[i, j]))
        (same if y else different).append(float(value))
    counted = [value for value in different if value > 0]
    assert 0 < len(counted) < len(different)
    expected = np.mean(same) + np.mean(counted)
    assert float(contrastive(margin)(EMBEDDINGS, LABELS)) == pytest.approx(expected, rel=1e-6)


def triplets() -> list[tuple[int, int, int]]:
    return [
        (a, p, n)
        for a, p, n in itertools.product(range(12), repeat=3)
        if a != p and LABELS[a] == LABELS[p] and LABELS[a] != LABELS[n]
    ]


def test_triplet_loss_with_semi_hard_negatives() -> None:
    squared, margin = squared_distances(EMBEDDINGS), 0.2
    losses = [
        float(squared[a, p] - squared[a, n]) + margin
        for a, p, n in triplets()
        if squared[a, p] < squared[a, n] <= squared[a, p] + margin
    ]
    assert len(losses) > 3
    found = float(triplet_semi_hard(margin)(EMBEDDINGS, LABELS))
    assert found == pytest.approx(np.mean([loss for loss in losses if loss > 0]), rel=1e-6)


def test_triplet_loss_with_batch_hard_mining() -> None:
    squared, margin = squared_distances(EMBEDDINGS), 0.2
    losses = []
    for a in range(12):
        farthest = max(float(squared[a, p]) for p in range(12) if p != a and LABELS[p] == LABELS[a])
        nearest = min(float(squared[a, n]) for n in range(12) if LABELS[n] != LABELS[a])
        losses.append(max(0.0, farthest - nearest + margin))
    found = float(triplet_batch_hard(margin)(EMBEDDINGS, LABELS))
    assert found == pytest.approx(np.mean([loss for loss in losses if loss > 0]), rel=1e-6)


def test_center_loss_is_its_formula() -> None:
    head = CenterLossHead(5, 5, pull=0.3).double()
    torch.nn.init.normal_(head.centers)
    embeddings = EMBEDDINGS.clone().requires_grad_()
    loss = head(embeddings, LABELS)
    logits = EMBEDDINGS @ head.linear.weight.T + head.linear.bias
    entropy = -(logits - logits.logsumexp(1, keepdim=True))[torch.arange(12), LABELS].mean()
    difference = EMBEDDINGS - head.centers[LABELS]
    expected_loss = entropy + 0.3 / 2 * (difference**2).sum() / 12
    assert loss.item() == pytest.approx(expected_loss.item())
    loss.backward()
    # The centers' gradient is λ/N·Σ (c − f) over the rows of each class.
    expected = torch.zeros(5, 5).double().index_add(0, LABELS, -0.3 / 12 * difference.detach())
    torch.testing.assert_close(head.centers.grad, expected)


def test_batches_of_identities() -> None:
    data = LabeledImages(torch.arange(30.0).view(30, 1, 1, 1), torch.arange(30) // 6)
    for images, labels in identity_batches(data, 10, steps=7, seed=1, least_each=5):
        assert labels.bincount()[labels.bincount() > 0].tolist() == [5, 5]
        assert (images.flatten() // 6).equal(labels.float()) and len(images.unique()) == 10
    # Fewer identities than a batch could show: more of each, some twice where there are not so many.
    ((images, labels),) = identity_batches(data, 40, steps=1, seed=1)
    assert labels.bincount().tolist() == [8] * 5 and len(images.unique()) == 30
    again = [labels.tolist() for _, labels in identity_batches(data, 10, steps=3, seed=1)]
    assert again == [labels.tolist() for _, labels in identity_batches(data, 10, steps=3, seed=1)]
    with pytest.raises(ValueError, match="batch_size must hold least_each=4 images of two identities, of 5; got 7"):
        next(identity_batches(data, 7, steps=1, seed=0))


def test_two_views_pair_images_and_not_people() -> None:
    # Images of one brightness each, which a view keeps but for its noise.
    data = LabeledImages(torch.arange(16.0).view(16, 1, 1, 1).expand(16, 1, 32, 32), torch.arange(16) // 4)
    ((images, labels),) = two_view_batches(data, 8, steps=1, seed=0)
    assert images.shape == (8, 1, 32, 32) and labels.tolist() == [0, 1, 2, 3] * 2
    first, second = images.chunk(2)
    assert first.mean((1, 2, 3)).round().equal(second.mean((1, 2, 3)).round())
    assert len(first.mean((1, 2, 3)).round().unique()) == 4
    drawn = identity_images(2, 4).images
    view = random_view(drawn, torch.Generator().manual_seed(5))
    assert view.equal(random_view(drawn, torch.Generator().manual_seed(5))) and view.isfinite().all()
    assert (view - drawn).flatten(1).norm(dim=1).min() > 1


class Quiet:
    """A reporter that counts, and may stop a run."""

    def __init__(self, rows: int | None = None) -> None:
        self.rows, self.trainings = rows, 0

    def begin(self, what: str, steps: int = 0) -> None:
        self.trainings += bool(steps)

    def step(self, loss: float) -> None:
        pass

    def ended(self, name: str, first_loss: float, last_loss: float, steps: int, seconds: float) -> None:
        if self.rows is not None:
            self.rows -= 1
            if self.rows == 0:
                raise KeyboardInterrupt


NAMES = ("softmax", "triplet, semi-hard", "ArcFace")


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not measured: that takes a process that imports torch."""
    monkeypatch.setattr(comparison, "peak_of_steps", lambda *_: 0)


@pytest.mark.slow
@pytest.mark.usefixtures("no_memory")
def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    plan, chosen = replace(QUICK, seeds=(0, 1)), chosen_criteria(NAMES)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(plan, Folder(tmp_path / "a", plan), Quiet(rows=4), chosen)
    assert len(list((tmp_path / "a" / "rows").glob("*.json"))) == 4
    rest = Quiet()
    resumed = run_comparison(plan, Folder(tmp_path / "a", plan), rest, chosen)
    assert rest.trainings == 2 + 3  # two rows were missing, and the two-dimensional nets
    whole = run_comparison(plan, Folder(tmp_path / "b", plan), Quiet(), chosen)
    rows = [row for of_criterion in whole.rows.values() for row in of_criterion]
    for a, b in zip([row for of_criterion in resumed.rows.values() for row in of_criterion], rows, strict=True):
        timeless = {"seconds": 0.0, "head_milliseconds": 0.0, "peak_bytes": 0}
        assert replace(a, **timeless) == replace(b, **timeless)
    assert [row.criterion for row in rows] == [name for name in NAMES for _ in plan.seeds]
    again = Quiet()
    run_comparison(plan, Folder(tmp_path / "a", plan), again, chosen)
    assert again.trainings == 0
    with pytest.raises(ComparisonError, match="holds another comparison"):
        Folder(tmp_path / "a", replace(plan, seeds=(0,)))
    with pytest.raises(ValueError, match=r"criteria must be among softmax; .*; got hinge"):
        chosen_criteria(("hinge",))

    _check_figures(rows)
    pictures = write_pictures(comparison_drawings(whole), tmp_path)
    assert {path.name for path in pictures} == {
        "tar.png", "roc.png", "loss.png", "angles.png", "embeddings_2d.png", "margins_of_the_angle.png",
        "margins_of_the_row.png", "margins_of_negatives.png", "boundaries.png"
    }  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in pictures)
    table, summary = Folder(tmp_path / "b", plan).write_summary(whole.rows, 1.0)
    with table.open() as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == 6 and float(listed[0]["tar_at_far_0.01"]) == rows[0].tar["0.01"]
    figures = json.loads(summary.read_text())["criteria"]["ArcFace"]["rank1"]
    ranks = [row.rank1 for row in whole.rows["ArcFace"]]
    assert figures == {"mean": pytest.approx(np.mean(ranks)), "deviation": pytest.approx(np.std(ranks))}


def _check_figures(rows: list[Row]) -> None:
    for row in rows:
        assert 0 <= row.tar["0.001"] <= row.tar["0.01"] <= row.tar["0.1"] <= 1 and 0 <= row.rank1 <= row.rank5 <= 1
        # 8 people with 8 images: 28 pairs of one person each.
        assert sum(row.same_angles) == sum(row.different_angles) == 8 * 28
        assert row.roc[-1] == 1 and len(row.roc) == len(ROC_FARS) and row.roc[20] == row.tar["0.01"]
        expected = {"Euclidean", "1-norm", "3-norm", "inner product", "cosine", "Mahalanobis"}
        assert set(row.distances) == (expected if row.criterion in comparison.WITH_DISTANCES else set())
        if row.distances:
            assert row.distances["cosine"]["tar"] == row.tar["0.01"]
            assert row.distances["cosine"]["rank1"] == row.rank1


@pytest.mark.slow
def test_every_criterion_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", "--quick", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    names = list(criteria())
    assert {"softmax", "contrastive", "contrastive, two views", "center loss", "AdaFace", "ArcFace"} <= set(names)
    assert all(any(line.startswith(f"{name}  ") for line in shown.splitlines()) for name in names)
    for row in ("Euclidean", "3-norm", "inner product", "Mahalanobis", "SphereFace is above softmax in"):
        assert row in shown
    assert len(list((tmp_path / "rows").iterdir())) == len(names)
    rows = [json.loads(path.read_text()) for path in (tmp_path / "rows").iterdir()]
    if Path("/proc/self/clear_refs").exists():  # elsewhere a peak cannot be reset
        assert all(0 < row["peak_bytes"] < 2**30 for row in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("no_memory")
def test_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    data = identity_images(10, 6)
    for number, (pixels, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        path = tmp_path / "people" / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray((255 * pixels[0].clamp(0, 1)).byte().numpy()).resize((40, 50)).save(path)
    options = ["--quick", "--data", str(tmp_path / "people"), "--criteria", "Softmax; triplet, batch-hard"]
    assert run(["compare", *options, "--output", str(tmp_path / "out")]) == 0
    rows = [json.loads(path.read_text()) for path in (tmp_path / "out" / "rows").iterdir()]
    # Three of ten people are held out: 3·15 pairs of one person.
    assert [sum(row["same_angles"]) for row in rows] == [45, 45]
    assert run(["compare", *options, "--output", str(tmp_path / "new"), "--batch-size", "64"]) == 2
    assert "--batch-size must be <= the number of images 42; got 64" in capsys.readouterr().err
    assert run(["compare", "--data", str(tmp_path / "nobody"), "--output", str(tmp_path / "new2")]) == 2
    assert run(["compare", "--criteria", "hinge"]) == 2


PLAN_BEFORE = {
    "seeds": [0],
    "recipe": {"steps": 8, "batch_size": 32, "learning_rate": 0.02, "warm_up": 0.25, "weight_decay": 5e-4},
    "toy": {"steps": 5, "batch_size": 16, "learning_rate": 0.01, "warm_up": 0.25, "weight_decay": 5e-4},
    "identities": 12, "samples": 8, "unseen": 8, "toy_identities": 4, "toy_samples": 6, "embedding_dim": 64,
    "data": None, "held_out": 0.3, "image_size": 32,
}  # fmt: skip
"""What plan.json of ``compare --quick`` held before demo and comparison shared one plan."""


@pytest.mark.parametrize(("change", "resumes"), [({}, True), ({"identities": 13}, False), ({"data": "x"}, False)])
def test_a_folder_of_an_earlier_commit_is_resumed(tmp_path: Path, change: dict, resumes: bool) -> None:
    before = {"fused_arcface": fa.__version__, "torch": torch.__version__, "plan": {**PLAN_BEFORE, **change}}
    (tmp_path / "plan.json").write_text(json.dumps(before, indent=1) + "\n")
    if resumes:
        Folder(tmp_path, QUICK)
    else:
        with pytest.raises(ComparisonError, match="holds another comparison"):
            Folder(tmp_path, QUICK)
    files = comparison_plan(quick=True, data="x", seeds=1, steps=None, batch_size=None)
    if change.get("data") == "x":  # of files, the numbers of generated identities do not matter
        Folder(tmp_path, files)


def test_images_of_files_are_announced_as_small_and_gray() -> None:
    plan = comparison_plan(quick=False, data="faces", seeds=2, steps=7, batch_size=None)
    (task,) = plan.tasks
    assert plan.seeds == (0, 1) and (task.recipe.steps, task.recipe.batch_size) == (7, 128)
    assert task.images.describe() == (
        "images of faces, each brought to 32 × 32 pixels in gray; 30% of the identities held out"
    )


def test_the_help_lists_every_criterion_and_says_that_images_are_small_and_gray() -> None:
    options = inspect.signature(compare, eval_str=True).parameters
    texts = {name: option.annotation.__metadata__[0].help for name, option in options.items()}
    assert "; ".join(criteria()) in texts["criteria"]
    assert "32 × 32 pixels and gray" in texts["data"]
