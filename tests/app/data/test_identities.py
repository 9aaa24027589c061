"""Images that come with the package: digits and generated identities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_arcface.app.data import LabeledImages, Style, digit_images, draw, identity_images
from fused_arcface.app.data.identities import keyed_normal, keyed_uniform

MASK = 2**64 - 1


def splitmix64(x: int) -> int:
    """The published finalizer (Steele, Lea and Flood, 2014) in whole numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_keyed_numbers_are_splitmix64_of_the_key() -> None:
    golden, state = 0x9E3779B97F4A7C15, 0
    for part in (5, 2, 123456789):
        state = splitmix64((state + golden + part) & MASK)
    expected = [((splitmix64((state + golden * (i + 1)) & MASK) >> 41) + 0.5) / 2**23 for i in range(4)]
    assert keyed_uniform(4, 5, 2, torch.tensor([123456789]))[0].tolist() == expected


def test_keyed_numbers_are_spread_as_they_claim() -> None:
    rows = torch.arange(2000)
    uniform, normal = keyed_uniform(50, 0, rows), keyed_normal(50, 0, rows)
    assert uniform.min() > 0 and uniform.max() < 1 and normal.isfinite().all()
    # Four standard errors of 100 000 numbers each.
    assert abs(uniform.mean() - 1 / 2) < 4 * 12**-0.5 / 316 and abs(uniform.var() - 1 / 12) < 1e-3
    assert abs(normal.mean()) < 4 / 316 and abs(normal.std() - 1) < 4 / 447
    neighbors = torch.corrcoef(torch.stack([uniform[:-1].flatten(), uniform[1:].flatten()]))[0, 1]
    assert abs(neighbors) < 4 / 316


def test_image_depends_on_its_key_alone() -> None:
    identity, sample = torch.tensor([0, 7, 10**12]), torch.tensor([3, 0, 10**9])
    together = draw(identity, sample, seed=4)
    for row in range(3):
        assert draw(identity[row : row + 1], sample[row : row + 1], seed=4).equal(together[row : row + 1])
    torch.manual_seed(99)
    assert draw(identity, sample, seed=4).equal(together)
    for other in (
        draw(identity + 1, sample, seed=4),
        draw(identity, sample + 1, seed=4),
        draw(identity, sample, seed=5),
    ):
        assert (other - together).flatten(1).norm(dim=1).min() > 1


def test_identities_are_whole_and_disjoint_ranges_fit_together() -> None:
    data = identity_images(5, 3, seed=1)
    assert isinstance(data, LabeledImages) and data.num_identities == 5
    assert data.images.shape == (15, 1, 32, 32) and data.images.dtype == torch.float32
    assert data.labels.tolist() == [i for i in range(5) for _ in range(3)]
    assert identity_images(2, 3, first=3, seed=1).images.equal(data.images[9:])


def test_samples_of_an_identity_are_nearer_than_others() -> None:
    data = identity_images(30, 4)
    unit = F.normalize(data.images.flatten(1) - data.images.mean())
    cosine, same = unit @ unit.T, data.labels[:, None] == data.labels
    own = cosine[same & ~torch.eye(120, dtype=torch.bool)]
    assert own.mean() > cosine[~same].mean() + 0.1 and own.max() < 0.99


def test_style_sets_size_and_noise() -> None:
    plain = draw(torch.tensor([1]), torch.tensor([0]), style=Style(size=17, noise=0))
    assert plain.shape == (1, 1, 17, 17) and plain.min() >= 0 and plain.max() <= 1


def test_digits_are_those_asked_for() -> None:
    pytest.importorskip("sklearn")
    data = digit_images((9, 2), size=16)
    assert data.images.shape == (180 + 177, 1, 16, 16) and data.images.min() >= 0 and data.images.max() <= 1
    assert data.labels.bincount().tolist() == [180, 177]  # the nines come first, as asked


@pytest.mark.parametrize("digits", [(), (1, 1), (3, 10), (-1,)])
def test_digits_that_are_none(digits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="digits must be different numbers from 0 to 9"):
        digit_images(digits)
