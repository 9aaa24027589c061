"""Search, ranks and open-set rates against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")

from fused_arcface.evaluation import (
    Cosine,
    Distance,
    Euclidean,
    InnerProduct,
    Mahalanobis,
    PNorm,
    identify,
    nearest,
    search,
    split_gallery,
)

ENGINES = ["torch", pytest.param("faiss", marks=pytest.mark.skipif(not search.faiss_installed(), reason="no faiss"))]


def people(images: int, identities: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(identities, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, identities, (images,), generator=generator)
    return centers[labels] + spread * torch.randn(images, 8, generator=generator), labels


def test_an_identification_keeps_the_nearest_of_each_probe() -> None:
    """Probes with and without a mate in the gallery both have a nearest row, because the report shows both."""
    gallery, probes = torch.tensor([[0.0], [10.0], [20.0]]), torch.tensor([[9.0], [19.5], [-3.0]])
    found = identify(gallery, torch.tensor([0, 1, 2]), probes, torch.tensor([1, 1, 7]), distance=Euclidean())
    assert found.nearest.tolist() == [1, 2, 0] and found.distances.tolist() == [1.0, 0.5, 3.0]
    assert found.rank(1) == 0.5 and (found.num_mated, found.num_unmated) == (2, 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("distance", [Cosine(), Euclidean(), InnerProduct()], ids=repr)
def test_nearest_is_exact(engine: str, distance: Distance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_HELD", 500)  # several blocks
    probes, gallery = torch.randn(23, 16), torch.randn(101, 16)
    distances, rows = nearest(probes, gallery, 5, distance, engine)
    expected = distance.matrix(probes.double(), gallery.double()).sort(dim=1)
    assert rows.equal(expected.indices[:, :5])
    torch.testing.assert_close(distances.double(), expected.values[:, :5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_whitened_search(engine: str) -> None:
    gallery = torch.randn(60, 4) * torch.tensor([1.0, 10, 0.1, 1])
    distance = Mahalanobis.fit(gallery)
    _, rows = nearest(gallery + 1e-3, gallery, 1, distance, engine)
    assert rows[:, 0].equal(distance.matrix(gallery + 1e-3, gallery).argmin(1))


def test_nearest_at_the_ends() -> None:
    gallery = torch.randn(3, 4)
    assert nearest(gallery[:0], gallery, 2, Cosine())[1].shape == (0, 2)
    assert nearest(gallery, gallery, 9, PNorm(1))[1].shape == (3, 3)
    for wrong in ((gallery, gallery[:0], 1), (gallery, gallery, 0), (gallery, torch.zeros(2, 5), 1)):
        with pytest.raises(ValueError, match="must be"):
            nearest(*wrong, Cosine())
    with pytest.raises(ValueError, match="must be finite"):
        nearest(gallery * torch.nan, gallery, 1, Cosine())
    with pytest.raises(ValueError, match="engine must be auto, torch or faiss"):
        nearest(gallery, gallery, 1, Cosine(), "annoy")  # type: ignore[arg-type]


@pytest.mark.skipif(not search.faiss_installed(), reason="no faiss")
def test_faiss_does_not_know_every_distance() -> None:
    assert search.choose_engine("auto", PNorm(3)) == "torch" and search.choose_engine("auto", Cosine()) == "faiss"
    with pytest.raises(ValueError, match="engine faiss must be used with"):
        search.choose_engine("faiss", PNorm(3))


@pytest.mark.parametrize("engine", ENGINES)
def test_cmc_and_tpir_against_brute_force(engine: str) -> None:
    gallery, gallery_labels = people(60, 15, seed=1)
    known = gallery_labels < 11  # 11 to 14 stay unknown
    gallery, gallery_labels = gallery[known], gallery_labels[known]
    probes, probe_labels = people(400, 15, seed=2)
    found = identify(
        gallery, gallery_labels, probes, probe_labels, max_rank=10, fpirs=(0.5, 0.1, 0.01, 0.001), engine=engine
    )

    table = Cosine().matrix(probes.double(), gallery.double()).numpy()
    names = sorted(set(gallery_labels.tolist()))
    by_identity = np.stack([table[:, gallery_labels.numpy() == name].min(1) for name in names], axis=1)
    ranks, mated, unmated = [], [], []
    for row, label in zip(by_identity, probe_labels.tolist(), strict=True):
        if label in names:
            ranks.append(1 + int((row < row[names.index(label)]).sum()))
            mated.append((-row.min(), ranks[-1] == 1))
        else:
            unmated.append(-row.min())
    assert found.num_mated == len(ranks) > 200 and found.num_unmated == len(unmated) > 50
    assert found.cmc == pytest.approx([np.mean(np.array(ranks) <= r) for r in range(1, 11)])
    assert found.rank(1) == found.cmc[0] and found.rank(5) == found.cmc[4] < found.rank(10) <= found.rank(50)
    # The definition: the greatest rate over every threshold whose FPIR is allowed.
    thresholds = [score for score, _ in mated] + unmated
    for fpir, rate in found.tpir.items():
        allowed = [t for t in thresholds if np.mean(np.array(unmated) >= t) <= fpir]
        assert rate == pytest.approx(max([np.mean([r and s >= t for s, r in mated]) for t in allowed], default=0))
    assert 0 < found.tpir[0.01] < found.tpir[0.5] < 1


def test_embeddings_that_are_all_alike_identify_nobody() -> None:
    alike, labels = torch.ones(12, 4), torch.arange(12) // 2
    found = identify(alike, labels, alike, labels, max_rank=3)
    assert found.cmc.tolist() == [0, 0, 0] and found.tpir == {}


def test_perfect_embeddings_identify_everybody() -> None:
    gallery = torch.eye(6)
    found = identify(gallery[:4], torch.arange(4), gallery, torch.arange(6), fpirs=(0, 0.5))
    assert found.cmc.tolist() == [1] * 4 and found.tpir == {0: 1.0, 0.5: 1.0}


def test_split_is_disjoint_complete_and_reproducible() -> None:
    labels = torch.arange(20).repeat_interleave(4)[torch.randperm(80)]
    gallery, probes = split_gallery(labels, gallery_images=2, unknown=0.25, seed=5)
    assert torch.cat([gallery, probes]).sort().values.equal(torch.arange(80))
    assert (labels[gallery].bincount(minlength=20).sort().values == torch.tensor([0] * 5 + [2] * 15)).all()
    again = split_gallery(labels, gallery_images=2, unknown=0.25, seed=5)
    assert again[0].equal(gallery) and again[1].equal(probes)
    assert not split_gallery(labels, seed=6)[0].equal(split_gallery(labels, seed=7)[0])
    # One image cannot be gallery and probe: its identity is unknown.
    gallery, probes = split_gallery(torch.tensor([0, 0, 1]), unknown=0)
    assert len(gallery) == 1 and len(probes) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_gallery(torch.arange(4)), "an identity with more than gallery_images=1 images"),
        (lambda: split_gallery(torch.zeros(4), unknown=1.0), r"unknown must be in \[0, 1\)"),
        (lambda: split_gallery(torch.zeros(4), gallery_images=0), "gallery_images must be >= 1"),
        (
            lambda: identify(torch.eye(2), torch.arange(3), torch.eye(2), torch.arange(2)),
            r"gallery_labels must be \(2,",
        ),
        (
            lambda: identify(torch.eye(2), torch.arange(2), torch.eye(2), torch.tensor([5, 6])),
            "probes must show at least one identity of the gallery; got 2 identities, none of the gallery",
        ),
        (lambda: identify(*[torch.eye(2), torch.arange(2)] * 2, fpirs=[2]), r"fpirs must be in \[0, 1\]; got \[2\]"),
        (lambda: identify(*[torch.eye(2), torch.arange(2)] * 2, max_rank=0), "max_rank must be >= 1; got 0"),
    ],
)
def test_wrong_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
