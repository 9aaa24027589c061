"""``identify --predictions``: the nearest images of the gallery for each probe."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from fused_arcface.app.cli import run
from fused_arcface.app.data.embedding_sets import EmbeddingSet
from fused_arcface.app.predictions import Search, write_predictions
from fused_arcface.evaluation import Cosine, make_distance


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_by_hand(tmp_path: Path) -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    probes = torch.tensor([[0.8, 0.6], [-1.0, 0.0]])
    search = Search(
        gallery, torch.tensor([4, 5, 6]), probes, torch.tensor([4, 7]), ["a.png", "b,c.png", "d.png"], ["p", "q"]
    )
    write_predictions(tmp_path / "out.csv", search, Cosine(), matches=2)
    first, second = read(tmp_path / "out.csv")
    assert first == {
        "image": "p",
        "known": "yes",
        **{"match_1": "d.png", "right_1": "no", "score_1": "0.960000"},
        **{"match_2": "a.png", "right_2": "yes", "score_2": "0.800000"},
    }
    assert (second["image"], second["known"], second["match_1"]) == ("q", "no", "b,c.png")
    assert float(second["score_1"]) == pytest.approx(0, abs=1e-6)
    write_predictions(tmp_path / "out.csv", search, make_distance("euclidean"), matches=9)
    first, _ = read(tmp_path / "out.csv")
    assert len(first) == 2 + 3 * 3 and float(first["score_1"]) == pytest.approx(-(0.08**0.5), abs=1e-5)


def test_the_command_writes_a_line_for_each_probe(tmp_path: Path) -> None:
    labels = torch.arange(6).repeat_interleave(3)
    rows = torch.eye(6)[labels] + 0.1 * torch.randn(18, 6, generator=torch.Generator().manual_seed(0))
    EmbeddingSet(rows, [f"{i}.png" for i in range(18)], labels).save(tmp_path / "saved.npz")
    command = ["identify", "--embeddings", str(tmp_path / "saved.npz"), "--unknown", "0.2", "--engine", "torch"]
    assert run([*command, "--predictions", str(tmp_path / "out.csv")]) == 0
    found = read(tmp_path / "out.csv")
    galleries = {row[f"match_{i}"] for row in found for i in range(1, 6)}
    assert len(found) == 13 and len(galleries) == 5 and galleries.isdisjoint(row["image"] for row in found)
    for row in found:  # people are far from each other: the nearest is right where there is a right one
        assert row["right_1"] == row["known"]
        assert float(row["score_1"]) >= float(row["score_2"])
