"""``train``, then ``verify`` and ``identify`` with its net, each from the command line and on files alone."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("tomli_w")

import torch
from support.image_files import encoded, picture, write_folder

from fused_arcface.app.cli import run
from fused_arcface.app.data import ImageSpec
from fused_arcface.app.nets.backbones import build_backbone


def write_bin(path: Path, people: int, first: int = 0) -> None:
    """Write a set of pairs as insightface's: color JPEG, a pair of one person and one of two for each person."""
    listed, same = [], []
    for place in range(people):
        for other in (place, (place + 1) % people):
            images = (picture(first + place, 0, "RGB"), picture(first + other, 1, "RGB"))
            listed += [encoded(image, "jpeg") for image in images]
            same.append(other == place)
    path.write_bytes(pickle.dumps((listed, same), 2))


@pytest.mark.slow
def test_train_then_verify_then_identify_then_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gray, color and transparent images of several sizes; the people that are evaluated are none of the trained."""
    write_folder(tmp_path / "train", 24, 10)
    write_folder(tmp_path / "unseen", 20, 6, first=24)
    monkeypatch.chdir(tmp_path)
    options = "--epochs 8 --batch-size 48 --workers 0 --image-size 32 --channels 1 --margin ArcFace(0.3)"
    assert run(["train", "--data", "train", "--output", "run", *options.split()]) == 0

    assert run(["verify", "--data", "unseen", "--checkpoint", "run", "--json", "verify.json", "--flip"]) == 0
    verified = json.loads(Path("verify.json").read_text())
    assert verified["pairs"] == {"same": 300, "different": 300}
    assert verified["accuracy"] > 0.65  # a net that tells nothing has 0.5

    assert run(["identify", "--data", "unseen", "--checkpoint", "run", "--json", "identify.json"]) == 0
    identified = json.loads(Path("identify.json").read_text())
    assert identified["gallery"]["identities"] == 16 and identified["probes"] == {"mated": 80, "unmated": 24}
    assert identified["rank"]["1"] > 3 / 16 and identified["rank"]["10"] > identified["rank"]["1"]  # chance: 1 / 16

    write_bin(Path("unseen.bin"), 20, first=24)
    capsys.readouterr()
    assert run(["verify", "--data", "unseen.bin", "--checkpoint", "run", "--json", "bin.json", "--folds", "5"]) == 0
    figures, shown = json.loads(Path("bin.json").read_text()), capsys.readouterr().out
    assert figures["pairs"] == {"same": 20, "different": 20} and len(figures["fold_accuracy"]) == 5
    best = figures["thresholds"]["points"][0]
    assert best["name"] == "best accuracy" and -1 < best["threshold"] < 1 and best["accuracy"] > 0.6
    assert re.search(rf"best accuracy +{best['threshold']:.4f} +{best['accuracy']:.4f}", shown)

    # The verdict is that of the threshold that verify has left with the run.
    assert run(["similarity", "unseen/person_030/00.png", "unseen/person_030/01.png", "--checkpoint", "run"]) == 0
    said = capsys.readouterr().out
    cosine, verdict = re.match(r"cosine (-?[\d.]+)\n(one person|two people): threshold", said).groups()
    assert f"threshold {best['threshold']:.4f} (best accuracy on unseen.bin" in said
    assert verdict == ("one person" if float(cosine) >= best["threshold"] else "two people")


@pytest.mark.slow
def test_a_backbone_file_of_insightface_is_verified_with_one_command(tmp_path: Path) -> None:
    """A net of random weights: what counts is that its figures are those of its embeddings."""
    torch.manual_seed(0)
    net = build_backbone("mbf", 512, ImageSpec(112, 3))
    torch.save(net.state_dict(), tmp_path / "backbone.pth")
    write_bin(tmp_path / "lfw.bin", 10)
    command = ["verify", "--data", str(tmp_path / "lfw.bin"), "--checkpoint", str(tmp_path / "backbone.pth")]
    assert run(command) == 2  # whose net is it?
    assert run([*command, "--backbone", "mbf", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["pairs"] == {"same": 10, "different": 10} and 0 < figures["accuracy"] <= 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["backbone.pth", "figures.json", "lfw.bin"]
