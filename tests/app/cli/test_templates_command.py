"""``templates`` from the command line, against the protocol written out image by image."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from support.template_files import write_template_set
from support.training_runs import write_random_run

from fused_arcface.app import embedding
from fused_arcface.app.cli import run
from fused_arcface.app.data.embedding_sets import EmbeddingSet
from fused_arcface.app.data.formats.templates import read_templates
from fused_arcface.app.training.runs import load_backbone

PEOPLE = 9


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights, and a set of templates."""
    root = tmp_path_factory.mktemp("templates")
    write_random_run(root / "run", image_size=24)
    write_template_set(root / "IJBC", PEOPLE)
    return root


def expected(files: Path, scores: bool = True, norms: bool = True, flip: bool = True) -> dict:
    """The figures by loops over the lists of the set, as insightface's scripts go through them."""
    meta = files / "IJBC" / "meta"
    net, spec = load_backbone(files / "run")
    crops = read_templates(str(files / "IJBC")).images
    faces = [line.split() for line in (meta / "ijbc_face_tid_mid.txt").read_text().splitlines()]
    weights = [float(line.split()[-1]) for line in (meta / "ijbc_name_5pts_score.txt").read_text().splitlines()]
    grouped: dict[int, dict[int, list[np.ndarray]]] = {}
    for index, (_, template, medium) in enumerate(faces):
        pixels = crops.read(index, spec)[None]
        with torch.no_grad():
            image = net(pixels) + net(pixels.flip(-1)) if flip else net(pixels)
        image = image[0].double().numpy()
        if not norms:
            image = image / np.linalg.norm(image)
        if scores:
            image = image * weights[index]
        grouped.setdefault(int(template), {}).setdefault(int(medium), []).append(image)
    vector = {}
    for template, media in grouped.items():
        total = sum(np.mean(images, axis=0) for images in media.values())
        vector[template] = total / np.linalg.norm(total)

    pairs = [
        [int(x) for x in line.split()] for line in (meta / "ijbc_template_pair_label.txt").read_text().splitlines()
    ]
    cosines = np.array([vector[a] @ vector[b] for a, b, _ in pairs])
    same = np.array([label == 1 for *_, label in pairs])
    tar = {}
    for far in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        accepted = [cosines >= threshold - 1e-7 for threshold in cosines]
        tar[f"{far:g}"] = max([each[same].mean() for each in accepted if each[~same].mean() <= far], default=0.0)

    def listed(name: str) -> dict[int, int]:
        lines = (meta / f"ijbc_{name}.csv").read_text().splitlines()[1:]
        return {int(line.split(",")[0]): int(line.split(",")[1]) for line in lines}

    probes, found = listed("1N_probe_mixed"), {}
    for gallery in ("G1", "G2"):
        known = listed(f"1N_gallery_{gallery}")
        ranks, best, strangers = [], [], []
        for probe, subject in probes.items():
            order = sorted(known, key=lambda template: -(vector[template] @ vector[probe]))
            if subject in known.values():
                ranks.append(1 + [known[template] for template in order].index(subject))
                best.append(vector[order[0]] @ vector[probe])
            else:
                strangers.append(vector[order[0]] @ vector[probe])
        strangers.sort(reverse=True)
        tpir = {}
        for fpir in (0.1, 0.01, 0.001):
            threshold = strangers[int(fpir * len(strangers))]
            right = [rank == 1 and cosine > threshold for rank, cosine in zip(ranks, best, strict=True)]
            tpir[f"{fpir:g}"] = np.mean(right)
        rank = {str(r): np.mean(np.array(ranks) <= r) for r in (1, 5, 10)}
        found[gallery] = {"rank": rank, "tpir_at_fpir": tpir}
    return {"tar": tar, "search": found}


def figures(files: Path, capsys: pytest.CaptureFixture[str], *options: object) -> tuple[dict, str]:
    arguments = ["templates", "--data", files / "IJBC", "--json", files / "figures.json", *options]
    status = run([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads((files / "figures.json").read_text()), shown.out


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {}),
        (("--no-scores",), {"scores": False}),
        (("--no-flip", "--no-norms"), {"flip": False, "norms": False}),
    ],
)
@pytest.mark.slow
def test_figures_are_those_of_loops_over_the_lists(
    options: tuple[str, ...], settings: dict, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, shown = figures(files, capsys, "--checkpoint", files / "run", *options)
    by_hand = expected(files, **settings)
    assert found["verification"]["tar_at_far"] == pytest.approx(by_hand["tar"])
    assert found["verification"]["pairs"] == {"same": 18, "different": 144}
    for gallery, rates in by_hand["search"].items():
        assert found["identification"][gallery]["rank"] == pytest.approx(rates["rank"])
        assert found["identification"][gallery]["tpir_at_fpir"] == pytest.approx(rates["tpir_at_fpir"])
    first = [by_hand["search"][gallery]["rank"]["1"] for gallery in ("G1", "G2")]
    assert found["identification"]["mean"]["rank"]["1"] == pytest.approx(sum(first) / 2)
    assert 0 < sum(first) / 2 < 1 and 0 < by_hand["tar"]["0.1"] < 1  # a random net, which tells some people apart
    assert found["templates"] == 3 * PEOPLE and found["left_out"] == []
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert f"rank 1 {first[0]:.4f} {first[1]:.4f} {sum(first) / 2:.4f}" in rows
    assert f"TAR at FAR 0.1 {by_hand['tar']['0.1']:.4f}" in rows
    assert f"TAR at FAR 1e-06 {by_hand['tar']['1e-06']:.4f} no false accept" in rows


def test_an_interrupted_evaluation_resumes(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished parts are not embedded again, and embeddings keep their norms, which the protocol needs."""
    whole, _ = figures(files, capsys, "--checkpoint", files / "run")
    monkeypatch.setattr(
        embedding.embed_to_file, "__kwdefaults__", embedding.embed_to_file.__kwdefaults__ | {"part": 20}
    )
    made: list[int] = []
    embed_set = embedding.embed_set

    def interrupted(net: torch.nn.Module, images: object, *arguments: object, **options: object) -> EmbeddingSet:
        made.append(len(options["rows"]))  # type: ignore[arg-type]
        if len(made) == 3:
            raise KeyboardInterrupt
        return embed_set(net, images, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(embedding, "embed_set", interrupted)
    saved = tmp_path / "faces.npz"
    command = ["templates", "--data", files / "IJBC", "--checkpoint", files / "run", "--save-embeddings", saved]
    assert run([str(each) for each in command]) == 130 and made == [20, 20, 20] and not saved.exists()
    monkeypatch.setattr(embedding, "embed_set", embed_set)
    seen: list[int] = []
    monkeypatch.setattr(
        embedding, "embed_set", lambda net, images, *a, **o: seen.append(1) or embed_set(net, images, *a, **o)
    )
    again, _ = figures(files, capsys, "--checkpoint", files / "run", "--save-embeddings", saved)
    faces = len(EmbeddingSet.load(saved).paths)
    assert len(seen) == -(-faces // 20) - 2 and again["verification"] == whole["verification"]
    assert EmbeddingSet.load(saved).embeddings.norm(dim=1).std() > 1e-3
    scored, _ = figures(files, capsys, "--embeddings", saved)
    assert scored["verification"] == whole["verification"] and scored["identification"] == whole["identification"]
    assert list(tmp_path.iterdir()) == [saved]


@pytest.mark.slow
def test_faces_that_cannot_be_read_are_left_out_and_counted(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_template_set(tmp_path / "IJBC", PEOPLE)
    lists = [line.split() for line in (tmp_path / "IJBC/meta/ijbc_face_tid_mid.txt").read_text().splitlines()]
    gallery = lists[0][1]
    for name, template, _ in lists:
        if template == gallery:  # of the first person
            (tmp_path / "IJBC/loose_crop" / name).write_bytes(b"no image")
    (tmp_path / "IJBC/loose_crop" / lists[-1][0]).unlink()
    (tmp_path / "run").symlink_to(files / "run")
    found, shown = figures(tmp_path, capsys, "--checkpoint", tmp_path / "run")
    assert found["left_out"] == [
        "18 of 162 pairs: a template has no image that could be read",
        "1 of 4 templates of gallery G1: they have no image that could be read",
    ]
    assert found["verification"]["pairs"] == {"same": 16, "different": 128} and found["templates"] == 3 * PEOPLE - 1
    assert "left out: 18 of 162 pairs" in shown
    command = ["templates", "--data", tmp_path / "IJBC", "--checkpoint", tmp_path / "run", "--bad-data", "stop"]
    assert run([str(each) for each in command]) == 1
    assert "cannot be read as an image" in capsys.readouterr().err


def test_embeddings_of_other_images_are_an_error(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    EmbeddingSet(torch.randn(2, 4), ["1.jpg", "0.jpg"]).save(tmp_path / "e.npz")
    assert run(["templates", "--data", str(files / "IJBC"), "--embeddings", str(tmp_path / "e.npz")]) == 1
    assert re.search("after 1 of them comes 0.jpg", " ".join(capsys.readouterr().err.split()))
    assert run(["templates", "--data", str(files / "IJBC")]) == 2
    assert run(["templates", "--data", str(tmp_path), "--embeddings", str(tmp_path / "e.npz")]) == 1
    assert "must have one list of faces" in capsys.readouterr().err
