"""The list of the margins: complete, and the source of what shows it."""

from __future__ import annotations

import pytest
import torch

import fused_arcface as fa
from fused_arcface.margins import Margin, registry
from fused_arcface.margins.entry import Entry
from fused_arcface.margins.text import parse_margin

every_entry = pytest.mark.parametrize("entry", registry.REGISTRY, ids=lambda entry: entry.name)


def _is_margin(public: object) -> bool:
    """Return whether a public name is a class whose instances map cosines to cosines."""
    if not isinstance(public, type) or issubclass(public, (fa.MarginHead, fa.PartialFC)):
        return False
    return any("__call__" in vars(base) for base in public.__mro__)


def test_every_public_margin_has_one_entry() -> None:
    public = {each for each in (getattr(fa, name) for name in fa.__all__) if _is_margin(each)}
    listed = [entry.margin for entry in registry.REGISTRY]
    public -= {fa.ClassMargin}  # it is made of numbers for the classes at hand, so no text names it
    public -= {fa.AdaCos}  # a scale
    assert len(listed) == len(set(listed)) and set(listed) == public


@every_entry
def test_examples_are_of_the_margin_and_new_each_time(entry: Entry) -> None:
    first, second = entry.examples(), entry.examples()
    assert first and {type(each) for each in first} == {entry.margin}
    assert [repr(each) for each in first] == [repr(each) for each in second]
    for mine, other in zip(first, second, strict=True):
        assert not isinstance(mine, torch.nn.Module) or mine is not other


@every_entry
def test_every_margin_is_known_as_text(entry: Entry) -> None:
    default = entry.margin()
    for text in (entry.name, entry.name.lower(), f"{entry.name}({entry.options()})", repr(default)):
        assert repr(parse_margin(text)) == repr(default)


def test_kinds() -> None:
    kinds = {entry.name: entry.kind for entry in registry.REGISTRY}
    assert kinds["SphereFace"] == "angular" and kinds["MagFace"] == "row" and kinds["MVSoftmax"] == "negatives"
    of_kinds = [registry.examples(kind) for kind in ("angular", "row", "negatives", "binary")]
    assert len(registry.examples()) == sum(map(len, of_kinds))


@pytest.mark.parametrize("margin", [m for m in registry.examples("angular") if fa.margins.parameters(m)], ids=repr)
def test_fused_numbers_give_the_margin(margin: Margin) -> None:
    """The five numbers that a backend's fused tail gets are those of the same margin."""
    numbers = fa.margins.parameters(margin)
    assert numbers is not None
    m1, m2, m3, boundary, gradient = numbers
    cosine = torch.linspace(-1, 1, 101, dtype=torch.float64)
    right = cosine - m3 if boundary == "linear" else fa.CombinedMargin(m1, m2, m3, boundary, gradient)(cosine)
    assert torch.equal(margin(cosine), right)
