"""Templates against a computation image by image, in the order of insightface's evaluation of IJB-B and IJB-C."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")

from fused_arcface.evaluation import (
    Templates,
    identify_templates,
    pool_templates,
    templates,
    verify_templates,
)


def naive_templates(
    embeddings: np.ndarray, template: np.ndarray, medium: np.ndarray, weights: np.ndarray | None, normalize: bool
) -> dict[int, np.ndarray]:
    """One template after the other: weigh images, average within each medium, add the media, scale to norm 1."""
    found = {}
    for own in sorted(set(template.tolist())):
        total = np.zeros(embeddings.shape[1])
        for shown in sorted({m for t, m in zip(template.tolist(), medium.tolist(), strict=True) if t == own}):
            images = []
            for row in range(len(embeddings)):
                if template[row] == own and medium[row] == shown:
                    image = embeddings[row].astype(np.float64)
                    if normalize:
                        image = image / np.sqrt((image**2).sum())
                    images.append(image * (1.0 if weights is None else float(weights[row])))
            total += sum(images) / len(images)
        found[own] = total / np.sqrt((total**2).sum())
    return found


def faces(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings of many norms, in templates and media of many sizes, in no order; templates share media's numbers."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 6, generator=generator) * torch.rand(count, 1, generator=generator) * 30
    template = torch.randint(0, 12, (count,), generator=generator) ** 2 + 1000
    medium = torch.randint(-2, 3, (count,), generator=generator) * 7
    return embeddings, template, medium, torch.rand(count, generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_templates_are_those_of_a_loop(weighted: bool, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_IMAGES_AT_ONCE", 37)  # several blocks, the last one smaller
    embeddings, template, medium, scores = faces(200)
    weights = scores if weighted else None
    found = pool_templates(embeddings, template, medium, weights=weights, normalize=normalize)
    expected = naive_templates(
        embeddings.numpy(), template.numpy(), medium.numpy(), scores.numpy() if weighted else None, normalize
    )
    assert found.ids.tolist() == list(expected) and found.embeddings.dtype == torch.float32
    np.testing.assert_allclose(found.embeddings.numpy(), np.stack(list(expected.values())), atol=1e-7)


def test_a_video_counts_as_much_as_a_photo() -> None:
    photo, frame = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    rows = torch.cat([photo, frame.expand(99, 2)])
    media = torch.tensor([4] + [9] * 99)
    assert torch.allclose(pool_templates(rows, torch.zeros(100).int(), media).embeddings, torch.full((1, 2), 0.5**0.5))
    # The mean within a medium divides by the number of images, not by the sum of the scores.
    scores = torch.tensor([1.0] + [0.5] * 99)
    found = pool_templates(rows, torch.zeros(100).int(), media, weights=scores).embeddings[0]
    assert torch.allclose(found, torch.tensor([1.0, 0.5]) / 1.25**0.5)


def test_images_that_cancel_make_a_template_that_is_like_nothing() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    found = pool_templates(rows, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    assert found.embeddings.tolist() == [[0, 0], [1, 0]]
    assert pool_templates(rows[:0], torch.zeros(0).int(), torch.zeros(0).int()).embeddings.shape == (0, 2)


def test_one_to_one_is_that_of_a_loop() -> None:
    embeddings, template, medium, scores = faces(300, seed=1)
    pooled = pool_templates(embeddings, template, medium, weights=scores)
    generator = np.random.default_rng(0)
    ids = np.array(sorted(set(template.tolist())))
    first, second = generator.choice(ids, 500), generator.choice(ids, 500)
    same = generator.random(500) < 0.3
    by_hand = naive_templates(embeddings.numpy(), template.numpy(), medium.numpy(), scores.numpy(), False)
    cosines = np.array([float(by_hand[a] @ by_hand[b]) for a, b in zip(first, second, strict=True)])
    fars = (0.3, 0.1, 0.01)
    found = verify_templates(pooled, *map(torch.as_tensor, (first, second, same)), fars=fars)
    # The definition: over every threshold whose false accept rate is allowed, the one that accepts nobody included.
    for far in fars:
        accepted = [cosines >= threshold - 1e-6 for threshold in cosines]
        allowed = [each[same].mean() for each in accepted if each[~same].mean() <= far]
        assert found.tar[far] == pytest.approx(max(allowed, default=0.0))
    assert found.num_pairs == (same.sum(), (~same).sum())
    assert found.tar[0.3] > found.tar[0.01]


def test_one_to_many_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    subjects = torch.arange(30)
    centers = torch.randn(30, 6, generator=generator)
    shown = subjects.repeat_interleave(8)  # two templates of each, the first for the gallery
    embeddings = centers[shown] + 1.5 * torch.randn(240, 6, generator=generator)
    template = torch.arange(60).repeat_interleave(4) + 500
    medium = torch.arange(120).repeat_interleave(2)
    pooled = pool_templates(embeddings, template, medium)
    gallery, probes = torch.arange(0, 40, 2) + 500, torch.arange(1, 60, 2) + 500  # people 0 to 19 are known
    found = identify_templates(pooled, gallery, subjects[:20], probes, subjects, max_rank=20, fpirs=(0.5, 0.2))

    by_hand = naive_templates(embeddings.numpy(), template.numpy(), medium.numpy(), None, False)
    ranks, best, impostors = [], [], []
    for probe, person in zip(probes.tolist(), range(30), strict=True):
        cosines = [float(by_hand[probe] @ by_hand[known]) for known in gallery.tolist()]
        if person < 20:
            ranks.append(1 + sum(other > cosines[person] for other in cosines))
            best.append(max(cosines))
        else:
            impostors.append(max(cosines))
    assert found.cmc.tolist() == pytest.approx([np.mean(np.array(ranks) <= r) for r in range(1, 21)])
    for fpir, tpir in found.tpir.items():
        threshold = sorted(impostors, reverse=True)[int(fpir * len(impostors))]
        right = [rank == 1 and cosine > threshold for rank, cosine in zip(ranks, best, strict=True)]
        assert tpir == pytest.approx(np.mean(right))
    assert 0 < found.tpir[0.2] < found.rank(1) < 1 and (found.num_mated, found.num_unmated) == (20, 10)


def test_a_template_without_images_is_named() -> None:
    pooled = Templates(torch.tensor([3, 7]), torch.eye(2))
    assert pooled.has(torch.tensor([7, 4])).tolist() == [True, False]
    with pytest.raises(ValueError, match="templates must be among the 2 that have images; got 4"):
        verify_templates(pooled, torch.tensor([3, 7]), torch.tensor([7, 4]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="templates must be among the 2 that have images; got 9"):
        identify_templates(pooled, torch.tensor([9]), torch.tensor([0]), torch.tensor([3]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.eye(2)[0], torch.zeros(2).int(), torch.zeros(2).int()), ValueError, r"embeddings must be \(M, D\)"),
        ((torch.eye(2).int(), torch.zeros(2).int(), torch.zeros(2).int()), TypeError, "embeddings must be floating"),
        ((torch.eye(2), torch.zeros(3).int(), torch.zeros(2).int()), ValueError, r"templates must be \(2,\), one for"),
        ((torch.eye(2), torch.zeros(2).int(), torch.zeros(2)), TypeError, "media must be integers; got torch.float32"),
        ((torch.eye(2) * torch.nan, torch.zeros(2).int(), torch.zeros(2).int()), ValueError, "must be finite"),
    ],
)
def test_wrong_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pool_templates(*arguments)


def test_weights_are_checked() -> None:
    zeros = torch.zeros(2).int()
    with pytest.raises(ValueError, match=r"weights must be \(2,\), one for each image; got \(1,\)"):
        pool_templates(torch.eye(2), zeros, zeros, weights=torch.ones(1))
    with pytest.raises(ValueError, match="weights must be finite"):
        pool_templates(torch.eye(2), zeros, zeros, weights=torch.tensor([1.0, torch.inf]))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_size_of_ijb_c() -> None:
    """23,124 templates of 469,375 images, 15,658,489 pairs: minutes, and no table of all templates by all."""
    generator = torch.Generator().manual_seed(0)
    template = torch.randint(0, 23_124, (469_375,), generator=generator)
    medium = torch.randint(0, 140_000, (469_375,), generator=generator)
    started = time.perf_counter()
    pooled = pool_templates(torch.randn(469_375, 512, generator=generator), template, medium)
    first, second = torch.randint(0, len(pooled.ids), (2, 15_658_489), generator=generator)
    same = torch.zeros(len(first), dtype=torch.bool)
    same[torch.randperm(len(first), generator=generator)[:19_557]] = True
    found = verify_templates(pooled, pooled.ids[first], pooled.ids[second], same)
    assert found.num_pairs == (19_557, 15_638_932) and len(found.false_accepts) <= 2 * 19_557 + 2
    assert found.tar[1e-2] == pytest.approx(1e-2, abs=3e-3) and found.eer == pytest.approx(0.5, abs=0.01)
    assert time.perf_counter() - started < 600
