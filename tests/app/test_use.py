"""A trained net in use: the embedder, and the commands ``embed``, ``similarity`` and ``export``."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_files import encoded, picture, write_folder

import fused_arcface as fa
from fused_arcface.app import export
from fused_arcface.app.cli import run
from fused_arcface.app.data import ImageSpec, read_image
from fused_arcface.app.data.embedding_sets import EmbeddingSet
from fused_arcface.app.data.formats.embeddings import SUFFIXES
from fused_arcface.app.data.unlabeled import read_images
from fused_arcface.app.embedder import Embedder, load_embedder
from fused_arcface.app.embedding import embed_to_file
from fused_arcface.app.nets.backbones import build_backbone
from fused_arcface.app.nets.small import embed
from fused_arcface.app.thresholds import KeptThresholds, read_thresholds
from fused_arcface.app.training.config import TrainConfig
from fused_arcface.app.training.runs import load_backbone
from fused_arcface.app.training.trainer import train
from fused_arcface.base.reading import DataError
from fused_arcface.evaluation.thresholds import OperatingPoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run with a verification to its end."""
    output = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(data="identities:6x4", epochs=2, batch_size=8, image_size=16, workers=0, device="cpu")
    train(config, output, listener=lambda event: None)
    return output


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("people"), 3, 4)


def test_the_embedder_takes_images_of_every_kind(trained: Path, people: Path) -> None:
    embedder = fa.load_embedder(trained)
    net, spec = load_backbone(trained)
    files = sorted(people.rglob("*.png"))[:3]
    expected = embed(net, torch.stack([read_image(file, spec) for file in files]))
    found = embedder(files)
    assert isinstance(embedder, torch.nn.Module) and found.shape == (3, 128) and found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.double().norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(embedder(str(files[0])), found[:1], atol=1e-6)
    assert torch.allclose(embedder([file.read_bytes() for file in files]), found, atol=1e-6)
    with Image.open(files[1]) as image:
        assert torch.allclose(embedder(image), found[1:2], atol=1e-6)
        array = np.array(image.convert("RGB"))
    colored = embedder(array)
    assert torch.allclose(embedder(torch.from_numpy(array).permute(2, 0, 1)), colored, atol=1e-6)
    assert torch.allclose(embedder(np.stack([array, array])), colored.expand(2, -1), atol=1e-6)
    pixels = torch.stack([read_image(file, spec) for file in files])
    assert torch.allclose(embedder(pixels), found, atol=1e-6) and embedder([]).shape == (0, 128)
    turned = Image.open(files[0]).convert("L")
    exif = turned.getexif()
    exif[0x0112] = 6  # the picture lies on its side
    assert torch.allclose(
        embedder(Image.open(_saved(turned.rotate(90, expand=True), exif, people.parent))), embedder(turned), atol=0.1
    )


def test_the_embedder_takes_generators_and_nets_of_other_dtypes(trained: Path, people: Path) -> None:
    files = sorted(people.rglob("*.png"))[:3]
    embedder = fa.load_embedder(trained)
    expected, pixels = embedder(files), torch.stack([read_image(file, embedder.spec) for file in files])
    assert torch.equal(embedder(file for file in files), expected)
    assert torch.allclose(embedder(pixels.double()), expected, atol=1e-6)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float16, 0.01), (torch.bfloat16, 0.05)):
        other = fa.load_embedder(trained).to(dtype)
        for images in (files, pixels, list(pixels)):
            found = other(images)
            assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=tolerance), dtype


def test_the_embedder_itself_can_be_exported(trained: Path) -> None:
    embedder = fa.load_embedder(trained)
    pixels = torch.rand(3, 1, 16, 16) * 2 - 1
    graph = torch.export.export(embedder, (pixels,), dynamic_shapes=({0: torch.export.Dim("N")},)).module()
    assert torch.allclose(graph(pixels[:1]), embedder(pixels[:1]), atol=1e-6)


def _saved(image: Image.Image, exif: Image.Exif, folder: Path) -> Path:
    image.save(folder / "turned.png", exif=exif)
    return folder / "turned.png"


def test_what_the_embedder_does_not_take(trained: Path) -> None:
    embedder = fa.load_embedder(trained)
    for wrong, error, message in (
        (torch.zeros(1, 3, 16, 16), ValueError, r"images must be \(N, 1, 16, 16\); got \(1, 3, 16, 16\)"),
        (torch.full((1, 16, 16), 255.0), ValueError, r"must be in \[-1, 1\]; got values up to 255"),
        ([torch.full((1, 16, 16), 255.0)], ValueError, r"must be in \[-1, 1\]; got values up to 255"),
        (np.zeros((4, 4)), TypeError, "must be of dtype uint8, from 0 to 255; got float64"),
        ({"a": 1}, TypeError, "images must be paths, images of Pillow, arrays or tensors; got dict"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"or \(height, width, 1, 3 or 4\); got \(4, 4, 2\)"),
        (7, TypeError, "images must be paths, images of Pillow, arrays or tensors; got int"),
        ("missing.png", DataError, r"missing\.png"),
    ):
        with pytest.raises(error, match=message):
            embedder(wrong)


def test_an_embedder_from_each_kind_of_file(trained: Path, tmp_path: Path) -> None:
    image = picture(1, 1)
    expected = fa.load_embedder(trained)(image)
    assert torch.allclose(fa.load_embedder(trained / "model.pt")(image), expected, atol=1e-6)
    best = fa.load_embedder(trained / "best.pt")
    assert best.thresholds == read_thresholds(trained / "best.json")
    (tmp_path / "moved.pt").write_bytes((trained / "model.pt").read_bytes())
    again = load_embedder(tmp_path / "moved.pt", "small", image_size=16)
    assert torch.allclose(again(image), expected, atol=1e-6) and again.thresholds is None
    with pytest.raises(ValueError, match="does not lie in a run's folder, so its net must be named"):
        fa.load_embedder(tmp_path / "moved.pt")
    with pytest.raises(ValueError, match="takes images of any size: image_size must be given"):
        fa.load_embedder(tmp_path / "moved.pt", "small")
    with pytest.raises(DataError, match="has no weights of this net"):
        fa.load_embedder(tmp_path / "moved.pt", "iresnet18")
    with pytest.raises(ValueError, match=r"backbone is for files .* is of a run, which knows its own; got 'small'"):
        fa.load_embedder(trained, "small")
    with pytest.raises(ValueError, match=r"image_size is for files .* is of a run, which knows its own; got 8"):
        load_embedder(trained / "model.pt", image_size=8)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'runs'))} does not exist$"):
        fa.load_embedder(tmp_path / "runs")
    with pytest.raises(ValueError, match="device must be cpu, cuda, cuda:N or another device of torch; got 'abacus'"):
        load_embedder(trained, device="abacus")


def test_insightfaces_file_is_loaded_by_its_nets_name(tmp_path: Path) -> None:
    net = build_backbone("mbf", 512, ImageSpec(112, 3)).eval()
    torch.save({f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / "backbone.pth")
    embedder = fa.load_embedder(tmp_path / "backbone.pth", "mbf")
    image = picture(0, 0, "RGB", (112, 112))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert embedder.spec == ImageSpec(112, 3) and torch.allclose(embedder(image), embed(net, pixels), atol=1e-6)


def test_an_interrupted_embedding_goes_on(trained: Path, people: Path, tmp_path: Path) -> None:
    """The second time, finished parts are not computed again; the result is that of an uninterrupted one."""
    embedder, images = fa.load_embedder(trained), read_images([str(people)])
    seen: list[int] = []
    embedder.net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    whole = embed_to_file(embedder, images, tmp_path / "whole.npz", part=5)
    assert sum(seen) == 12 and torch.allclose(whole.embeddings, embedder([Path(p) for p in whole.paths]), atol=1e-6)

    class Power(Exception):
        pass

    def fail(count: int) -> None:
        if sum(seen) >= 10:
            raise Power

    seen.clear()
    with pytest.raises(Power):
        embed_to_file(embedder, images, tmp_path / "parts.npz", part=5, done=fail)
    seen.clear()
    done: list[int] = []
    again = embed_to_file(embedder, images, tmp_path / "parts.npz", part=5, done=done.append)
    assert sum(seen) == 7 and sum(done) == 12 and torch.equal(again.embeddings, whole.embeddings)
    loaded = EmbeddingSet.load(tmp_path / "parts.npz")
    assert torch.equal(loaded.embeddings, whole.embeddings) and loaded.paths == images.paths
    assert loaded.labels is not None and loaded.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["parts.npz", "whole.npz"]


@pytest.mark.slow
def test_two_processes_do_not_write_one_output(trained: Path, people: Path, tmp_path: Path) -> None:
    """The parts of one would become parts of the other, with its options."""
    output = tmp_path / "out.npz"
    command = [sys.executable, "-m", "fused_arcface", "embed", str(people), "--checkpoint", str(trained), "--flip"]
    tried: list[subprocess.CompletedProcess[str]] = []

    def try_it(count: int) -> None:
        if not tried:
            options = {"capture_output": True, "text": True, "check": False}
            tried.append(subprocess.run([*command, "--output", str(output)], **options))

    embedder, images = fa.load_embedder(trained), read_images([str(people)])
    found = embed_to_file(embedder, images, output, part=6, done=try_it)
    assert tried[0].returncode == 1 and f"{output} is in use: process {os.getpid()} on" in tried[0].stderr
    assert torch.equal(EmbeddingSet.load(output).embeddings, found.embeddings)
    assert os.listdir(tmp_path) == ["out.npz"]


def test_files_of_others_in_the_folder_of_the_parts_stay(trained: Path, people: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.npz.parts"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "000000000006.npz").write_text("of another work")
    embedder, images = fa.load_embedder(trained), read_images([str(people)])
    found = embed_to_file(embedder, images, tmp_path / "out.npz", part=6)
    assert len(found.paths) == 12 and os.listdir(folder) == ["notes.txt"]


def test_parts_of_another_net_are_not_used(trained: Path, people: Path, tmp_path: Path) -> None:
    embedder, images = fa.load_embedder(trained), read_images([str(people)])

    def stop(count: int) -> None:
        if (tmp_path / "out.npz.parts" / "000000000000.npz").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_to_file(embedder, images, tmp_path / "out.npz", part=6, done=stop)
    other = Embedder(build_backbone("small", 128, embedder.spec), embedder.spec)
    found = embed_to_file(other, images, tmp_path / "out.npz", part=6)
    assert torch.allclose(found.embeddings, other([Path(path) for path in images.paths]), atol=1e-6)


def test_embed_takes_folders_lists_and_files(
    trained: Path, people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    (flat / "deep").mkdir(parents=True)
    for place in range(3):
        picture(place, 0).save(flat / ("deep" if place else ".") / f"{place}.png")
    (flat / "broken.png").write_text("no image")
    command = ["embed", "--checkpoint", str(trained), "--output"]
    assert run([*command, str(tmp_path / "flat.csv"), str(flat)]) == 0
    said = capsys.readouterr()
    assert "3 embeddings of dimension 128 in" in said.out and "1 left out" in said.out
    assert "broken.png cannot be read as an image" in said.err
    with (tmp_path / "flat.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    names = [flat / "0.png", flat / "deep" / "1.png", flat / "deep" / "2.png"]
    assert rows[0][:2] == ["image", "e0"] and [row[0] for row in rows[1:]] == [str(name) for name in names]
    numbers = torch.tensor([[float(each) for each in row[1:]] for row in rows[1:]])
    assert torch.allclose(numbers, fa.load_embedder(trained)(names), atol=1e-7)

    (flat / "list.txt").write_text("deep/1.png\tann\n0.png\tbob\ndeep/2.png\tann\n")
    assert run([*command, str(tmp_path / "list.safetensors"), str(flat / "list.txt")]) == 0
    found = EmbeddingSet.load(tmp_path / "list.safetensors")
    assert found.labels is not None and found.labels.tolist() == [0, 1, 0]
    assert torch.equal(found.embeddings, numbers[[1, 0, 2]])
    assert run([*command, str(tmp_path / "two.npz"), str(names[2]), str(names[0])]) == 0
    assert EmbeddingSet.load(tmp_path / "two.npz").paths == [str(names[2]), str(names[0])]
    assert run([*command, str(tmp_path / "two.json"), str(flat)]) == 2
    assert f"must go to a {', '.join(SUFFIXES)} or .csv file" in capsys.readouterr().err
    assert run([*command, str(tmp_path / "x.npz"), str(tmp_path / "nothing")]) == 2
    assert f"{tmp_path / 'nothing'} does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_similarity_gives_the_cosine_and_a_verdict(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / f"{place}.png") for place in range(2)]
    for place, file in enumerate(files):
        picture(place, 0).save(file)
    first, second = fa.load_embedder(trained)(files).double()
    cosine = float(first @ second)
    point = OperatingPoint("best accuracy", cosine - 0.01, 0.125, 0.9, 0.875)
    copy_of_run = tmp_path / "a run"
    copy_of_run.mkdir()
    for name in ("config.toml", "model.pt"):
        (copy_of_run / name).write_bytes((trained / name).read_bytes())
    command = ["similarity", *files, "--checkpoint", str(copy_of_run / "model.pt")]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert f"cosine {cosine:.4f}\nNo verdict, because {command[-1]} has no thresholds; give one with --thr" in shown
    assert f"fused-arcface verify --data PEOPLE --checkpoint {shlex.quote(str(copy_of_run))}" in shown
    assert run([*command, "--far", "0.001"]) == 2
    assert "has none; give one with --threshold, 0.3 for example, or measure" in capsys.readouterr().err
    (tmp_path / "bare.pt").write_bytes((trained / "model.pt").read_bytes())
    bare = ["--checkpoint", str(tmp_path / "bare.pt"), "--backbone", "small", "--image-size", "16"]
    assert run(["similarity", *files, *bare]) == 0
    assert capsys.readouterr().out.endswith("bare.pt has no thresholds; give one with --threshold, 0.3 for example\n")
    stricter = OperatingPoint("FAR 0.001", float("inf"), 0.0, 0.0, 0.5)
    KeptThresholds("lfw.bin", 0.875, [point, stricter], 6, pairs_of_two=999).save(copy_of_run / "thresholds.json")
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert f"one person: threshold {cosine - 0.01:.4f} (best accuracy on lfw.bin: 87.5% of its pairs right" in shown
    assert (
        run([*command, "--far", "0.001"]) == 0
        and (
            "two people: threshold accepts nobody (FAR 0.001 on lfw.bin: 50.0% of its pairs right, 0.00% of two people "
            "accepted; its 999 pairs of two people are too few to measure this rate)"
        )
        in capsys.readouterr().out
    )
    KeptThresholds("lfw.bin", 0.875, [point, stricter], 6, pairs_of_two=1000).save(copy_of_run / "thresholds.json")
    assert run([*command, "--far", "0.001"]) == 0 and "too few" not in capsys.readouterr().out
    assert run([*command, "--threshold", f"{cosine + 0.01}"]) == 0 and "two people" in capsys.readouterr().out
    assert run([*command, "--far", "0.5"]) == 2 and "far must be one of 0.001; got 0.5" in capsys.readouterr().err
    (copy_of_run / "thresholds.json").write_text("{}")
    assert run(command) == 1 and "remove the file to continue without thresholds" in capsys.readouterr().err


@pytest.mark.slow
def test_export_gives_what_pytorch_gives(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images = torch.rand(5, 1, 16, 16) * 2 - 1
    expected = fa.load_embedder(trained)(images)
    assert run(["export", "--checkpoint", str(trained), "--output", str(tmp_path / "net.onnx")]) == 0
    assert "images (N, 1, 16, 16) in [-1, 1] to unit embeddings; at most" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    for count in (1, 5):
        (found,) = session.run(["embeddings"], {"images": images[:count].numpy()})
        assert np.abs(found - expected[:count].numpy()).max() <= 1e-5
    assert run(["export", "--checkpoint", str(trained), "--output", str(tmp_path / "net.pt2")]) == 0
    found = torch.export.load(tmp_path / "net.pt2").module()(images)
    assert torch.allclose(found, expected, atol=1e-5)
    assert run(["export", "--checkpoint", str(trained), "--output", str(tmp_path / "net.tflite")]) == 2
    assert "must be exported to a .onnx or a .pt2 file" in capsys.readouterr().err


def test_an_exported_net_that_gives_nan_is_not_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch, of one image, agrees; the second one does not."""

    def exported(program: torch.export.ExportedProgram) -> tuple[bytes, Callable[[torch.Tensor], torch.Tensor]]:
        net = program.module()
        return b"", lambda images: net(images) * (1 if len(images) == 1 else float("nan"))

    monkeypatch.setattr(export, "_as_program", exported)
    with pytest.raises(export.ExportError, match="differs from PyTorch by nan"):
        export.export(fa.load_embedder(trained), tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_thresholds_and_its_best_net(trained: Path) -> None:
    steps = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    accuracies = [step["verification_accuracy"] for step in steps if "verification_accuracy" in step]
    last, best = read_thresholds(trained / "thresholds.json"), read_thresholds(trained / "best.json")
    assert last is not None and best is not None
    assert (last.step, last.accuracy) == (6, accuracies[-1]) and best.accuracy == max(accuracies)
    assert best.step == 3 * (1 + accuracies.index(max(accuracies)))
    assert [point.name for point in last.points[:3]] == ["best accuracy", "equal error rate", "FAR 0.1"]
    assert all(-1 <= point.threshold <= 1 or point.true_accept_rate == 0 for point in last.points)
    if best.step == last.step:
        state, kept = torch.load(trained / "model.pt"), torch.load(trained / "best.pt")
        assert all(torch.equal(state[name], kept[name]) for name in state)


def test_an_unreadable_part_is_left_out(trained: Path, tmp_path: Path) -> None:
    for place in range(4):
        (tmp_path / f"{place}.png").write_bytes(encoded(picture(place, 0)) if place > 1 else b"no image")
    problems: list[str] = []
    images = read_images([str(tmp_path)])
    found = embed_to_file(fa.load_embedder(trained), images, tmp_path / "out.npz", part=2, unreadable=problems.append)
    assert len(problems) == 2 and [Path(path).name for path in found.paths] == ["2.png", "3.png"]


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.full), ".pt2"])
def test_export_to_a_full_disk_is_one_line(
    trained: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        status = run(["export", "--checkpoint", str(trained), "--output", str(tmp_path / f"net{suffix}")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (said,) = capsys.readouterr().err.splitlines()
    assert status == 1 and said.endswith(f"net{suffix}: File too large") and not os.listdir(tmp_path)
