"""``train``, then ``verify`` and ``identify`` with its net, each from the command line and on files alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("tomli_w")

from support.image_files import encoded, picture, write_folder

from fused_arcface.app.cli import run


@pytest.mark.slow
def test_train_then_verify_then_identify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    # The same people as insightface's .bin: color JPEG for a gray net.
    listed, same = [], []
    for person in range(24, 44):
        for other in (person, 24 + (person + 1) % 20):
            listed += [encoded(picture(one, sample, "RGB"), "jpeg") for one, sample in ((person, 0), (other, 1))]
            same.append(other == person)
    Path("unseen.bin").write_bytes(pickle.dumps((listed, same), 2))
    assert run(["verify", "--data", "unseen.bin", "--checkpoint", "run", "--json", "bin.json"]) == 0
    assert json.loads(Path("bin.json").read_text())["pairs"] == {"same": 20, "different": 20}
