"""The page of a report: structure, escaping, and nothing outside it."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.report_pages import read_page

from fused_arcface.app import drawing
from fused_arcface.app.cli.tables import plain_table
from fused_arcface.app.data.pair_sets import read_labeled
from fused_arcface.app.predictions import Search
from fused_arcface.app.report import document
from fused_arcface.app.report.answers import Answers
from fused_arcface.app.report.digest import (
    Digest,
    digest_pairs,
    hardest_pairs,
    histograms,
    read_digest,
    thinned_curve,
)
from fused_arcface.app.report.document import Comparison, Report, Section, Thumbnail, table
from fused_arcface.app.report.thumbnails import Thumbnails
from fused_arcface.base.extras import MissingExtra
from fused_arcface.base.reading import DataError
from fused_arcface.evaluation import Pairs, identify, verify_scores

HOSTILE = (
    "<script>alert(1)</script>",
    "</td></table><h1>",
    "\"'><img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp;",
    "{{ 7 * 7 }}{% raw %}",
    "人物 一",
    "김 철수",
    "山田 太郎",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is_wherever_it_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "pyplot", lambda: None)
    monkeypatch.setattr(document, "as_svg", lambda _: b"<svg/>")
    pair = Comparison(Thumbnail(name, ""), Thumbnail(name, document.data_address(_jpeg(), "image/jpeg")), name)
    section = Section(
        name,
        name,
        [drawing.Drawing("x", name, lambda plt: plt.figure())],
        [table((name, name), [(name, name)], name)],
        [pair],
    )
    page = read_page(document.render(Report(name, name, [section])))
    # title, h1, summary, link, h2, text, caption of the figure, caption, 2 heads and 2 cells of the table, and of
    # the pair a name below each image and a caption; beside them the words for the missing image
    assert page.texts.count(name) == 15 and set(page.texts) == {name, "image not at hand"}
    assert page.captions == [name, name] and page.titles == [name]


def test_names_are_never_obeyed() -> None:
    page = document.render(Report("a\u202egnp.exe", "\udce9\x1b[2J", [Section("\u2028")]))
    texts = read_page(page).texts
    assert texts == [r"a\u202egnp.exe", r"a\u202egnp.exe", r"\udce9\x1b[2J", r"\u2028", r"\u2028"]
    page.encode("utf-8")  # no surrogate is left


def _jpeg() -> bytes:
    people = read_labeled("identities:1x1")
    _, _, content = Thumbnails([people])(people.paths[0]).source.partition(",")
    return base64.b64decode(content)


def test_a_report_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    document.write_report(Report("one", "", [Section("a")]), path)
    before = path.read_bytes()
    monkeypatch.setattr(document, "render", lambda _: "<p>" + "\ud800")
    with pytest.raises(UnicodeEncodeError):
        document.write_report(Report("two", "", [Section("a")]), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_without_matplotlib_a_report_says_why_it_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingExtra("matplotlib is not installed")

    for module in (document, drawing):
        monkeypatch.setattr(module, "pyplot", missing)
    section = Section("Curves", drawings=[drawing.Drawing("x", "caption", lambda plt: plt.figure())])
    page = read_page(document.render(Report("one", "", [section])))
    assert page.pictures == [] and "caption" not in page.texts
    assert "This report has no figures: matplotlib is not installed" in page.texts


def test_the_terminals_table_in_a_report() -> None:
    """A heading may hold a file's name, with control characters and markup; columns of numbers align to the right."""
    shown = plain_table("\x1b[2J<b>[red]", "rate")
    shown.add_row("TAR [1]", "0.5")
    page = document.render(Report("one", "", [Section("Figures", tables=[shown])]))
    assert read_page(page).texts[-4:] == [r"\x1b[2J<b>[red]", "rate", "TAR [1]", "0.5"]
    assert '<th scope="col">rate</th>' in page and '<td class="word">TAR [1]</td>\n<td>0.5</td>' in page


def test_the_hardest_pairs_by_hand() -> None:
    scores = np.array([0.9, 0.2, 0.5, 0.1, 0.95, -0.3, 0.5])
    same = torch.tensor([True, True, True, False, False, False, False])
    pairs = Pairs(torch.arange(7), torch.arange(7, 14), same)
    names = [f"{i}.png" for i in range(14)]
    found = hardest_pairs(scores, pairs, names, lambda name: Thumbnail(name, ""), count=2)
    assert [(pair.same, pair.score, pair.first.name, pair.second.name) for pair in found] == [
        (True, 0.2, "1.png", "8.png"),
        (True, 0.5, "2.png", "9.png"),
        (False, 0.95, "4.png", "11.png"),
        (False, 0.5, "6.png", "13.png"),
    ]


def test_points_of_a_thinned_curve_are_exact() -> None:
    generator = np.random.default_rng(0)
    same = np.arange(2000) % 2 == 0
    scores = generator.normal(size=2000) + 1.5 * same
    found = verify_scores(same, scores)
    rates, true_accepts = thinned_curve(found.false_accepts, found.true_accepts, 1000)
    others, own = np.sort(scores[~same])[::-1], scores[same]
    for rate, true_accept in zip(rates[::37], true_accepts[::37], strict=True):
        # Independently: as many others may pass as the rate allows, and the threshold is above the next one's score.
        passing = int(np.floor(rate * 1000 + 1e-9))
        threshold = others[passing] if passing < 1000 else -np.inf
        assert true_accept == pytest.approx((own > threshold).mean())
    assert rates[0] == 1e-3 and rates[-1] == true_accepts[-1] == 1


def _digest() -> Digest:
    scores = np.cos(np.radians([1, 61, 91, 121] * 5)) - 1
    same = torch.tensor([True, True, False, False] * 5)
    pairs = Pairs(torch.arange(20), torch.arange(20), same)
    found = verify_scores(same, scores)
    people = read_labeled("identities:5x4")
    names = ["gone.png", *people.paths[1:]]
    return digest_pairs("<set>", found, scores, pairs, names, Thumbnails([people]), cosine=True, step=7)


def test_a_digest_is_kept_and_read_again(tmp_path: Path) -> None:
    digest = _digest()
    digest.save(tmp_path / "v.json")
    assert read_digest(tmp_path / "v.json") == digest and read_digest(tmp_path / "none.json") is None
    # A bin is 2 degrees wide.
    assert [place for place, count in enumerate(digest.same_counts) if count] == [0, 30]
    assert [place for place, count in enumerate(digest.different_counts) if count] == [45, 60]
    found = [math.degrees(math.acos(pair.score)) for pair in digest.hardest]
    assert found == pytest.approx([61] * 5 + [1] + [91] * 5 + [121])
    assert all(bool(pair.first.source) == (pair.first.name != "gone.png") for pair in digest.hardest)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hardest", [[True, 0.5, ["a", "https://example.org/seen.png"], ["b", ""]]]),
        ("hardest", [[True, 0.5, ["a", 'data:image/jpeg;base64,AA"><script>'], ["b", ""]]]),
        ("edges", [0.0, float("nan")]),
        ("true_accepts", "many"),
        ("num_pairs", 3),
    ],
)
def test_a_digest_of_a_stranger_points_nowhere(tmp_path: Path, name: str, value: object) -> None:
    file = tmp_path / "v.json"
    _digest().save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(DataError, match=r"v\.json cannot be read"):
        read_digest(file)


@pytest.mark.parametrize(("distances", "low", "high"), [([5.0, 5.0], 0.0, 5.0), ([-3.0, 1.0], -3.0, 1.0)])
def test_bins_of_distances_begin_at_zero_or_below(distances: list[float], low: float, high: float) -> None:
    """Bins of equal distances are wider than 0; inner products as distances may be below 0."""
    edges, counts = histograms(-np.array(distances), False, {"all": np.array([True, True])})
    assert (edges[0], edges[-1]) == (low, high) and sum(counts["all"]) == 2
    assert (np.diff(edges) > 0).all()


def test_answers_by_hand() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    probes = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
    search = Search(gallery, torch.tensor([4, 5]), probes, torch.tensor([4, 5, 9, 9]), ["a", "b"], list("pqrs"))
    found = identify(gallery, search.gallery_labels, probes, search.probe_labels, engine="torch")
    answers = Answers(search, found, cosine=True)
    assert answers.matches == ["a", "a", "b", "b"]
    assert answers.right.tolist() == [True, False, False, False]
    assert answers.known.tolist() == [True, True, False, False]
    assert answers.scores == pytest.approx([1, 0.8, 0.8, 0], abs=1e-6)
    edges, counts = answers.histograms()
    assert {name: sum(each) for name, each in counts.items()} == {
        "right person": 1, "another person": 1, "not in the gallery": 2
    }  # fmt: skip
    assert len(edges) == len(counts["right person"]) + 1
    hardest = answers.hardest(lambda name: Thumbnail(name, ""))
    assert [(pair.first.name, pair.second.name, pair.caption) for pair in hardest] == [
        ("q", "a", "another person, cosine 0.800, 36.9°"),
        ("r", "b", "not in the gallery, cosine 0.800, 36.9°"),
        ("s", "b", "not in the gallery, cosine 0.000, 90.0°"),
    ]
