"""``verify`` and ``identify`` from the command line: a run's net on files, figures, saved embeddings, wrong usage."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image
from support.training_runs import write_random_run

from fused_arcface.app.cli import run
from fused_arcface.app.data import ImageSpec, identity_images
from fused_arcface.app.data.embedding_sets import EmbeddingSet
from fused_arcface.app.training.runs import load_backbone
from fused_arcface.evaluation import (
    Euclidean,
    Pairs,
    balanced_pairs,
    identify,
    pair_scores,
    split_gallery,
    verify_scores,
)

PEOPLE, IMAGES = 12, 5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as ``train`` leaves it, a folder of identities in PNG, and insightface's .bin of them in JPEG."""
    root = tmp_path_factory.mktemp("evaluate")
    write_random_run(root / "run")
    drawn = identity_images(PEOPLE, IMAGES)
    encoded = []
    for number, (image, label) in enumerate(zip(drawn.images, drawn.labels.tolist(), strict=True)):
        gray = Image.fromarray((255 * image[0].clamp(0, 1)).byte().numpy())
        path = root / "people" / f"person {label:02d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gray.save(path)
        file = io.BytesIO()
        gray.convert("RGB").save(file, "jpeg", quality=95)
        encoded.append(file.getvalue())
    pairs = balanced_pairs(drawn.labels, 60)
    listed = [encoded[i] for pair in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True) for i in pair]
    (root / "people.bin").write_bytes(pickle.dumps((listed, pairs.same.tolist()), 2))
    return root


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status = run([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return shown.out


def figures(shown: str) -> list[str]:
    """The table's rows."""
    kinds = ("pairs", "people in", "images of", "probes", "accuracy", "equal", "TAR", "rank", "TPIR")
    return [" ".join(line.split()) for line in shown.splitlines() if line.startswith(kinds)]


def embedded(files: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from fused_arcface.app.data.pair_sets import read_labeled

    net, spec = load_backbone(files / "run")
    assert spec == ImageSpec(16, 1)
    images = read_labeled(str(files / "people"))
    assert images.labels is not None
    with torch.no_grad():
        return net(torch.stack([images.read(i, spec) for i in range(len(images))])), images.labels


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


def test_an_image_that_cannot_be_read_is_named(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for person in ("a", "b"):
        (tmp_path / person).mkdir()
        for number in (1, 2):
            (tmp_path / person / f"{number}.png").write_bytes(b"no image")
    assert run(["verify", "--data", str(tmp_path), "--checkpoint", str(files / "run")]) == 1
    assert f"{tmp_path / 'a' / '1.png'} cannot be read as an image" in capsys.readouterr().err


def test_what_is_wrong_with_labeled_images_is_said(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = files / "people" / "person without images"
    empty.mkdir()
    try:
        for name in ("verify", "identify"):
            assert run([name, "--data", str(files / "people"), "--checkpoint", str(files / "run")]) == 0
            shown = capsys.readouterr()
            assert shown.err.splitlines() == [f"{empty}: an identity without images; skipped"]
    finally:
        empty.rmdir()


def broken_people(files: Path, root: Path) -> Path:
    """A copy of six people whose third has an image that is none, and whose fourth has a link to nothing."""
    for person in range(6):
        shutil.copytree(files / "people" / f"person {person:02d}", root / f"person {person:02d}")
    (root / "person 02" / f"{2 * IMAGES}.png").write_bytes(b"no image")
    (root / "person 03" / f"{3 * IMAGES}.png").unlink()
    (root / "person 03" / f"{3 * IMAGES}.png").symlink_to(root / "nothing.png")
    return root


@pytest.mark.parametrize("name", ["verify", "identify"])
def test_bad_data_is_skipped_or_stops(
    name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = broken_people(files, tmp_path / "people")
    arguments = [name, "--data", str(root), "--checkpoint", str(files / "run"), "--workers", "1"]
    assert run([*arguments, "--save-embeddings", str(tmp_path / "e.npz")]) == 0
    shown = capsys.readouterr().err.splitlines()
    bad, gone = root / "person 02" / f"{2 * IMAGES}.png", root / "person 03" / f"{3 * IMAGES}.png"
    assert shown[0] == f"{gone}: 1 image(s) or folder(s) that cannot be read or followed; skipped"
    assert shown[1].startswith(f"{bad} cannot be read as an image") and shown[1].endswith("; skipped")
    assert shown[2].startswith("left out: 1 of 29 images cannot be read")
    kept = EmbeddingSet.load(tmp_path / "e.npz")
    embeddings, labels = embedded(files)
    own = torch.tensor([i for i in range(6 * IMAGES) if i not in (2 * IMAGES, 3 * IMAGES)])
    torch.testing.assert_close(kept.embeddings, embeddings[own])
    assert kept.labels is not None and kept.labels.equal(labels[own])
    if name == "verify":  # each pair is still of the images that its label speaks of
        assert kept.pairs is not None and "pairs are not scored" in shown[2]
        assert (kept.labels[kept.pairs.first] == kept.labels[kept.pairs.second]).equal(kept.pairs.same)
    assert run([*arguments, "--bad-data", "stop"]) == 1
    assert (
        capsys.readouterr().err.strip()
        == f"{shown[0].removesuffix('; skipped')}; bad_data is stop, so this is an error"
    )
    gone.unlink()
    assert run([*arguments, "--bad-data", "stop"]) == 1
    assert capsys.readouterr().err.startswith(f"{bad} cannot be read as an image")
    assert run([*arguments, "--bad-data", "hope"]) == 2


def test_a_file_of_pairs_with_missing_images(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"person {i:02d}/{IMAGES * i}.png\tperson {i:02d}/{IMAGES * i + 1}.png\t1\n" for i in range(10)]
    lines += [f"person {i:02d}/{IMAGES * i}.png\tperson {i + 1:02d}/{IMAGES * i + 5}.png\t0\n" for i in range(10)]
    lines.insert(3, "person 00/0.png\tperson 00/gone.png\t1\n")
    (tmp_path / "pairs.txt").write_text("".join(lines))
    arguments = ["verify", "--data", str(tmp_path / "pairs.txt"), "--images", str(files / "people")]
    arguments += ["--checkpoint", str(files / "run")]
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "pairs.txt, line 4: " in shown.err and shown.err.rstrip().endswith("gone.png is missing; skipped")
    assert {"pairs of one person 10", "pairs of two people 10"} <= set(figures(shown.out))
    assert run([*arguments, "--bad-data", "stop"]) == 1


def saved(path: Path, same: list[bool]) -> Path:
    numbers = torch.arange(2 * len(same)).view(-1, 2)
    pairs = Pairs(numbers[:, 0], numbers[:, 1], torch.tensor(same))
    EmbeddingSet(torch.randn(2 * len(same), 4), [""] * 2 * len(same), pairs=pairs).save(path)
    return path


def test_pairs_of_one_kind_get_counts_and_mean_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (True, False):
        file = saved(tmp_path / "e.npz", [kind] * 12)
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
    assert run(["verify", "--embeddings", str(saved(tmp_path / "e.npz", [True, False, True]))]) == 2
    message = "--folds must be >= 2 and <= the number of pairs 3; got 10"
    assert capsys.readouterr().err.strip() == message
    # In one fold's training part there is no pair of two people.
    assert run(["verify", "--embeddings", str(saved(tmp_path / "e.npz", [True] * 11 + [False]))]) == 0


def test_names_from_files_do_not_reach_the_terminal_raw(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = broken_people(files, tmp_path / "people")
    os.rename(root / "person 02", root / "\x1b]0;owned\x07\x1b[2J[red]")
    assert run(["verify", "--data", str(root), "--checkpoint", str(files / "run")]) == 0
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\x07" not in shown and r"\x1b]0;owned\x1b[2J[red]" in shown
    name = tmp_path / "\x1b[1m[bold].npz"
    saved(name, [True, False] * 6)
    assert r"\x1b[1m[bold].npz" in command(capsys, "verify", "--embeddings", name)


def test_pipes_do_not_hang(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("npz", "safetensors", "txt", "bin", "toml", "pt"):
        os.mkfifo(tmp_path / f"x.{suffix}")
    checkpoint, output = ("--checkpoint", str(files / "run")), ("--output", str(tmp_path / "run"))
    train = ["train", "--data", "identities:4x4", "--image-size", "16", *output]
    for arguments in (
        ["verify", "--embeddings", str(tmp_path / "x.npz")],
        ["identify", "--embeddings", str(tmp_path / "x.safetensors")],
        ["verify", "--data", str(tmp_path / "x.txt"), *checkpoint],
        ["verify", "--data", str(tmp_path / "x.bin"), *checkpoint],
        [*train, "--config", str(tmp_path / "x.toml")],
        [*train, "--init", str(tmp_path / "x.pt")],
        ["convert", str(tmp_path / "x.pt"), str(tmp_path / "y.safetensors")],
        ["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")],
    ):
        assert run(arguments) in (1, 2)
        assert "must be a regular file; it is a named pipe" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["people", "people.bin", "pairs.txt"])
def test_verify_has_a_pixel_limit(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str) -> None:
    for number in (0, 1):
        Image.new("L", (32, 32)).save(tmp_path / f"{number}.png")
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("0.png 0.png 1\n0.png 1.png 0\n" * 10)
    read = str(pairs if data == "pairs.txt" else files / data)
    assert run(["verify", "--data", read, "--checkpoint", str(files / "run"), "--max-pixels", "1023"]) == 1
    assert "must have at most max_pixels=1023 pixels; got 32 × 32" in capsys.readouterr().err


def test_identify_has_a_pixel_limit(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people, checkpoint = str(files / "people"), str(files / "run")
    assert run(["identify", "--data", people, "--checkpoint", checkpoint, "--max-pixels", "1023"]) == 1
    assert "must have at most max_pixels=1023 pixels; got 32 × 32" in capsys.readouterr().err


def test_a_terminal_without_a_sign_shows_its_escape(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert run(["verify", "--data", str(files / "people.bin"), "--checkpoint", str(files / "run")]) == 0
    shown.flush()
    assert b"\\xb1" in shown.buffer.getvalue()  # of ±
