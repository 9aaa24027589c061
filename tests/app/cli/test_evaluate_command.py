"""``verify`` and ``identify`` from the command line: a run's net on files, figures, saved embeddings, wrong usage."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image
from support.evaluated_people import IMAGES, PEOPLE, embedded, figures, save_pairs, write_people

from fused_arcface.app.cli import run
from fused_arcface.app.data.embedding_sets import EmbeddingSet
from fused_arcface.evaluation import (
    Euclidean,
    balanced_pairs,
    identify,
    pair_scores,
    split_gallery,
    verify_scores,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    write_people(root)
    return root


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status = run([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return shown.out


@pytest.mark.slow
def test_verify_a_folder(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # from any directory
    arguments = ("--data", files / "people", "--checkpoint", files / "run", "--json", "out/v.json", "--pictures", "out")
    shown = command(capsys, "verify", *arguments, "--save-embeddings", "out/e.npz", "--batch-size", 7)
    found = json.loads(Path("out/v.json").read_text())
    embeddings, labels = embedded(files)
    pairs = balanced_pairs(labels)
    expected = verify_scores(pairs.same, pair_scores(embeddings, pairs))
    assert found["accuracy"] == pytest.approx(expected.accuracy) and found["eer"] == pytest.approx(expected.eer)
    assert found["tar_at_far"] == pytest.approx({f"{far:g}": tar for far, tar in expected.tar.items()})
    assert found["pairs"] == {"same": 120, "different": 120} and found["distance"] == "cosine" and found["normalized"]
    assert f"{expected.accuracy:.4f} ±" in shown and "TAR at FAR 1e-06" in shown
    one, other = (embeddings[numbers] for numbers in (pairs.first, pairs.second))
    cosine = float(torch.cosine_similarity(one, other)[pairs.same].double().mean())
    assert f"mean cosine, one person {cosine:.4f}" in " ".join(shown.split())
    for picture in ("roc.png", "det.png"):
        assert Image.open(Path("out") / picture).size[0] > 400

    # Scored again, the images are not needed.
    again = command(capsys, "verify", "--embeddings", "out/e.npz", "--json", "w.json")
    assert json.loads(Path("w.json").read_text())["tar_at_far"] == found["tar_at_far"]
    assert figures(again) == figures(shown)
    raw = command(capsys, "verify", "--embeddings", "out/e.npz", "--distance", "euclidean", "--raw")
    expected = verify_scores(pairs.same, pair_scores(embeddings, pairs, Euclidean()))
    assert f"{expected.accuracy:.4f} ±" in raw and "mean score, one person  " in raw


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "p-norm", "inner-product", "mahalanobis"])
def test_every_distance_in_both_commands(
    distance: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embeddings, labels = embedded(files)
    kept = tmp_path / "e.safetensors"
    EmbeddingSet(embeddings, [""] * len(labels), labels).save(kept)
    for name in ("verify", "identify"):
        command(capsys, name, "--embeddings", kept, "--distance", distance, "--p", 1.5, "--json", tmp_path / name)
        found = json.loads((tmp_path / name).read_text())
        assert found["distance"] == distance and found.get("p") == (1.5 if distance == "p-norm" else None)
        assert (0 <= found["shrinkage"] <= 1) if distance == "mahalanobis" else "shrinkage" not in found


def test_mahalanobis_is_fitted_on_the_gallery_that_is_named(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embeddings, labels = embedded(files)
    EmbeddingSet(embeddings, [""] * len(labels), labels).save(tmp_path / "e.npz")
    EmbeddingSet(torch.randn(50, 8), [""] * 50).save(tmp_path / "g.npz")
    options = ("--embeddings", tmp_path / "e.npz", "--distance", "mahalanobis", "--json", tmp_path / "v.json")
    command(capsys, "verify", *options)
    own = json.loads((tmp_path / "v.json").read_text())
    command(capsys, "verify", *options, "--gallery", tmp_path / "g.npz")
    assert json.loads((tmp_path / "v.json").read_text())["shrinkage"] != own["shrinkage"]


def test_verify_a_bin_file(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--data", files / "people.bin", "--checkpoint", files / "run", "--json", tmp_path / "v.json")
    command(capsys, "verify", *arguments)
    plain = json.loads((tmp_path / "v.json").read_text())
    assert plain["pairs"] == {"same": 60, "different": 60} and plain["flip"] is False
    command(capsys, "verify", *arguments, "--flip")
    flipped = json.loads((tmp_path / "v.json").read_text())
    assert flipped["flip"] is True and flipped["tar_at_far"] != plain["tar_at_far"]


def test_verify_a_file_of_pairs(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for person in range(10):
        first = f"person {person:02d}/{IMAGES * person}.png"
        lines.append(f"{first}\tperson {person:02d}/{IMAGES * person + 1}.png\t1\n")
        lines.append(f"{first}\tperson {person + 1:02d}/{IMAGES * (person + 1)}.png\t0\n")
    (tmp_path / "pairs.txt").write_text("".join(lines))
    arguments = ("--data", tmp_path / "pairs.txt", "--images", files / "people", "--checkpoint", files / "run")
    assert {"pairs of one person 10", "pairs of two people 10"} <= set(figures(command(capsys, "verify", *arguments)))


def test_identify_a_folder(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--data", files / "people", "--checkpoint", files / "run", "--json", tmp_path / "i.json")
    options = ("--gallery-images", 2, "--unknown", 0.25, "--seed", 3, "--ranks", 6, "--pictures", tmp_path)
    shown = command(capsys, "identify", *arguments, *options, "--save-embeddings", tmp_path / "e.npz")
    found = json.loads((tmp_path / "i.json").read_text())
    embeddings, labels = embedded(files)
    known, sought = split_gallery(labels, gallery_images=2, unknown=0.25, seed=3)
    expected = identify(embeddings[known], labels[known], embeddings[sought], labels[sought], max_rank=6)
    assert found["cmc"] == pytest.approx(expected.cmc.tolist()) and len(found["cmc"]) == 6
    assert found["gallery"] == {"images": 18, "identities": 9} and found["probes"] == {"mated": 27, "unmated": 15}
    assert found["tpir_at_fpir"] == pytest.approx({f"{fpir:g}": rate for fpir, rate in expected.tpir.items()})
    assert f"{expected.rank(1):.4f}" in shown and "TPIR at FPIR 0.01" in shown
    assert Image.open(tmp_path / "cmc.png").size[0] > 400
    again = command(capsys, "identify", "--embeddings", tmp_path / "e.npz", *options[:8], "--engine", "torch")
    assert figures(again) == figures(shown)


def test_identify_probes_in_a_gallery_by_names(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1, 2):  # the gallery has three people, whose first images are probes as well
        person = tmp_path / "gallery" / f"person {number + 4:02d}"
        person.mkdir(parents=True)
        source = files / "people" / f"person {number + 4:02d}" / f"{IMAGES * (number + 4)}.png"
        (person / "photo.png").write_bytes(source.read_bytes())
    sets = ("--gallery", tmp_path / "gallery", "--probes", files / "people", "--checkpoint", files / "run")
    command(capsys, "identify", *sets, "--json", tmp_path / "i.json")
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["gallery"] == {"images": 3, "identities": 3}
    assert found["probes"] == {"mated": 3 * IMAGES, "unmated": (PEOPLE - 3) * IMAGES}
    assert found["rank"]["1"] >= 1 / IMAGES  # at least the same images are found


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["verify"], 2, "--data and --checkpoint must be given, or --embeddings alone"),
        (["verify", "--data", "x"], 2, "--data and --checkpoint must be given"),
        (["identify"], 2, "one of --data, --gallery with --probes, and --embeddings"),
        (["identify", "--data", "x", "--gallery", "y", "--checkpoint", "z"], 2, "one of --data"),
        (["identify", "--embeddings", "x.npz", "--save-embeddings", "y.npz"], 2, "--save-embeddings goes with --data"),
        (
            ["verify", "--data", "nothing.bin", "--checkpoint", "run"],
            2,
            "nothing.bin does not exist",
        ),
        (["verify", "--data", "people.bin", "--checkpoint", "nothing"], 2, "nothing does not exist"),
        (["verify", "--data", "people.bin", "--checkpoint", "run", "--distance", "hamming"], 2, "--distance must be"),
        (["verify", "--data", "people.bin", "--checkpoint", "run", "--p", "0.5"], 2, "--p"),
        (["verify", "--data", "people.bin", "--checkpoint", "run", "--shrinkage", "2"], 2, "--shrinkage"),
        (["verify", "--data", "people.bin", "--checkpoint", "run", "--bad-data", "halt"], 2, "--bad-data must be skip"),
        (
            ["verify", "--data", "people", "--checkpoint", "run", "--save-embeddings", "e.txt"],
            2,
            "embeddings must be in",
        ),
        (
            ["verify", "--data", "people", "--checkpoint", "run", "--device", "abacus"],
            2,
            "device must be cpu, cuda, cuda:N or another device of torch; got 'abacus'",
        ),
        (["verify", "--embeddings", "missing.npz"], 2, "missing.npz does not exist"),
        (["verify", "--data", "x", "--checkpoint", "run", "--json", "people.bin/x/f.json"], 2, "cannot be written"),
        (
            ["identify", "--gallery", "people", "--probes", "people", "--checkpoint", "run"],
            2,
            "probes must not hold images of the gallery",
        ),
        (["identify", "--data", "people", "--checkpoint", "run", "--unknown", "1"], 2, r"unknown must be in [0, 1)"),
        (["identify", "--data", "people", "--checkpoint", "run", "--unknown", "2"], 2, "--unknown"),
        (
            ["identify", "--data", "people", "--checkpoint", "run", "--engine", "fais"],
            2,
            "--engine must be auto, torch or faiss; got fais; did you mean faiss?",
        ),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    status: int,
    message: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    assert run(arguments) == status
    shown = capsys.readouterr().err.replace("│", " ")
    assert message in " ".join(shown.split())


def test_pairs_of_one_kind_get_counts_and_mean_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (True, False):
        file = save_pairs(tmp_path / "e.npz", [kind] * 12)
        assert run(["verify", "--embeddings", str(file), "--json", str(tmp_path / "v.json")]) == 0
        shown, found = capsys.readouterr(), json.loads((tmp_path / "v.json").read_text())
        rows = torch.nn.functional.normalize(EmbeddingSet.load(file).embeddings).double()
        mean = float((rows[0::2] * rows[1::2]).sum(1).mean()) - 1  # a cosine distance is 1 - cos
        assert found["mean_score"] == {
            "same": pytest.approx(mean, abs=1e-6) if kind else None,
            "different": None if kind else pytest.approx(mean, abs=1e-6),
        }
        assert found["pairs"] == {"same": 12 * kind, "different": 12 * (not kind)}
        assert "accuracy" not in found and found["left_out"] == ["accuracy", "equal error rate", "TAR at FAR"]
        assert "Left out, because all pairs are of one kind: accuracy, equal error rate, TAR at FAR." in shown.out


def test_few_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--embeddings", str(save_pairs(tmp_path / "e.npz", [True, False, True]))]) == 2
    message = "--folds must be >= 2 and <= the number of pairs 3; got 10"
    assert capsys.readouterr().err.strip() == message
    # In one fold's training part there is no pair of two people.
    assert run(["verify", "--embeddings", str(save_pairs(tmp_path / "e.npz", [True] * 11 + [False]))]) == 0


def test_a_terminal_without_a_sign_shows_its_escape(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert run(["verify", "--data", str(files / "people.bin"), "--checkpoint", str(files / "run")]) == 0
    shown.flush()
    assert b"\\xb1" in shown.buffer.getvalue()  # of ±
