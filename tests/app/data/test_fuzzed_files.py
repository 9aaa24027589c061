"""Files that nobody wrote: each format's loader ends in its result or in its error, in little time and memory."""

from __future__ import annotations

import ctypes
import io
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
if sys.platform != "linux":
    pytest.skip("limits and peaks are read from /proc", allow_module_level=True)

from PIL import Image
from support import fuzzing
from support.checkpoint_loaders import load_checkpoint, refit_manifest
from support.image_files import encoded, picture, write_records
from support.net_files import load_weights
from support.template_files import write_template_set

import fused_arcface as fa
from fused_arcface import checkpoint
from fused_arcface.app.data import DataError, ImageSpec, formats, read_image
from fused_arcface.app.data.embedding_sets import EmbeddingSet
from fused_arcface.app.data.formats.lists import open_list
from fused_arcface.app.data.formats.pairs_text import open_pairs
from fused_arcface.app.data.formats.pickled_pairs import read_pickled_pairs
from fused_arcface.app.data.formats.records import RecordImages
from fused_arcface.app.data.formats.templates import read_templates
from fused_arcface.app.data.unlabeled import read_images
from fused_arcface.app.nets.small import SmallNet
from fused_arcface.app.report.digest import Digest, HardPair, read_digest
from fused_arcface.app.report.document import Thumbnail
from fused_arcface.app.thresholds import KeptThresholds, read_thresholds
from fused_arcface.app.training.config import OptionError, TrainConfig, read_options
from fused_arcface.app.training.events import LogFile
from fused_arcface.app.training.fingerprint import Fingerprint
from fused_arcface.app.training.runs import RunError, RunFolder
from fused_arcface.base.reading import read_names
from fused_arcface.base.text import encode_names
from fused_arcface.checkpoint import CheckpointError, convert
from fused_arcface.evaluation import Pairs
from fused_arcface.evaluation.thresholds import OperatingPoint

SPEC = ImageSpec(16, 3)
IMAGES = [encoded(picture(i, 0), "jpeg") for i in range(4)]


def records(root: Path) -> Path:
    return write_records(root, identities=3, samples=2) / "train.rec"


def records_without_index(root: Path) -> Path:
    path = records(root)
    path.with_suffix(".idx").unlink()
    return path


def load_records(path: Path) -> None:
    found = RecordImages(path.with_suffix(".rec"))
    for index in range(len(found)):
        found.read(index, SPEC)


def pickled(protocol: int, arrays: bool = False) -> fuzzing.Callable[[Path], Path]:
    def sample(root: Path) -> Path:
        images = [np.frombuffer(image, np.uint8) for image in IMAGES] if arrays else IMAGES
        same = np.array([True, False]) if arrays else [True, False]
        (root / "lfw.bin").write_bytes(pickle.dumps((images, same), protocol))
        return root / "lfw.bin"

    return sample


def embeddings(suffix: str) -> fuzzing.Callable[[Path], Path]:
    def sample(root: Path) -> Path:
        pairs = Pairs(torch.tensor([0, 1]), torch.tensor([2, 2]), torch.tensor([True, False]))
        EmbeddingSet(torch.randn(3, 4), ["a.png", "b", "c"], torch.tensor([5, 0, 5]), pairs).save(root / f"e{suffix}")
        return root / f"e{suffix}"

    return sample


def packed_embeddings(root: Path) -> Path:
    np.savez_compressed(root / "e.npz", embeddings=np.eye(5, dtype=np.float32), labels=np.arange(5), paths=["a"] * 5)
    return root / "e.npz"


def centers(root: Path) -> Path:
    torch.save({"weight": torch.randn(5, 4)}, root / "loss.pt")
    return convert.convert([root / "loss.pt"], root / "centers.safetensors", seed=3)


def torch_centers(root: Path) -> Path:
    torch.save({"state_dict_softmax_fc": {"weight": torch.randn(5, 4)}, "step": 3}, root / "checkpoint.pt")
    return root / "checkpoint.pt"


def load_centers(path: Path) -> None:
    for rows in convert.read(path).tensors.values():
        for piece in rows.pieces():
            piece.double().sum()


def weights(root: Path) -> Path:
    torch.save(SmallNet(8, 3).state_dict(), root / "model.pt")
    return root / "model.pt"


def pairs_text(root: Path) -> Path:
    for name in ("ann", "bob"):
        (root / name).mkdir()
        for number in (1, 2, 3):
            (root / name / f"{name}_{number:04d}.JPG").write_bytes(IMAGES[0])
    (root / "pairs.txt").write_text("1\t2\nann\t1\t2\nbob 1 3\nann\t1\tbob\t2\nbob/bob_0001.JPG,ann/ann_0001.JPG,0\n")
    return root / "pairs.txt"


def templates(ending: str) -> fuzzing.Callable[[Path], Path]:
    def sample(root: Path) -> Path:
        return write_template_set(root / "IJBC", people=3) / "meta" / f"ijbc_{ending}"

    return sample


def load_templates(path: Path) -> None:
    found = read_templates(str(path.parents[1]), PIXELS)
    for index in range(min(2, len(found.images))):
        found.images.read(index, SPEC)


def options(root: Path) -> Path:
    (root / "run.toml").write_text(
        'data = "identities:4x4"\nepochs = 3\nlr = 0.5\nflip = true\nmargin = "ArcFace(0.5)"\n'
    )
    return root / "run.toml"


def load_options(path: Path) -> None:
    try:
        TrainConfig().replace(read_options(path))
    except (TypeError, ValueError) as error:  # what the command line shows
        raise OptionError(str(error)) from None


def list_text(name: str) -> fuzzing.Callable[[Path], Path]:
    def sample(root: Path) -> Path:
        for number in range(3):
            (root / f"{number} a.png").write_bytes(IMAGES[number])
        (root / name).write_text("0 a.png ann\n1 a.png\tbob\n2 a.png,7\n\n")
        return root / name

    return sample


def load_list(path: Path) -> None:
    """As a source to train on, and as images to embed."""
    read_images([str(path)])
    open_list(str(path))


def of_run(name: str) -> fuzzing.Callable[[Path], Path]:
    """Return a file that a run keeps beside its checkpoints."""

    def sample(root: Path) -> Path:
        run = RunFolder(root)
        run.classes.write_bytes(encode_names(["ann", "a\x85b", "许"]))
        run.data.write_text(Fingerprint(3, 2, "aa", "bb", "cc").to_json())
        point = OperatingPoint("FAR 0.1", 0.25, 0.1, 0.9, 0.875)
        KeptThresholds("lfw.bin", 0.875, [point, point], 3).save(run.thresholds)
        pair = HardPair(True, 0.25, Thumbnail("a.png", ""), Thumbnail("b.png", "data:image/jpeg;base64,AAAA"))
        rates = [0.1, 1.0], [0.5, 1.0]
        Digest("lfw.bin", True, (1, 1), *rates, [0.0, 180.0], [1], [1], [pair], 3).save(run.verification)
        run.log.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 0.25}\n')
        return root / name

    return sample


def load_log(path: Path) -> None:
    LogFile(path, 1).close()


def image(kind: str, mode: str = "RGB", **options: Any) -> fuzzing.Callable[[Path], Path]:
    def sample(root: Path) -> Path:
        converted(picture(0, 0, "RGB", (40, 48)), mode).save(root / f"a.{kind}", kind, **options)
        return root / f"a.{kind}"

    return sample


def converted(image: Image.Image, mode: str) -> Image.Image:
    return image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)


IMAGE_FORMATS = ("bmp", "dib", "gif", "jpeg", "png", "ppm", "tga", "tiff", "webp")
PIXELS = 1 << 21
"""Limit of the images: whatever size a changed one declares, memory for so many pixels is enough."""


def memory_of(pixels: int) -> int:
    """Return the bytes that an image may take: 17 a pixel, and what decoders and torch take beside them."""
    return 17 * pixels + (16 << 20)


def load_image(path: Path) -> None:
    read_image(path, SPEC, max_pixels=PIXELS)


STORED = ("__0_0.distcp", ".metadata", "manifest.json")


def stored(name: str) -> fuzzing.Callable[[Path], Path]:
    def sample(root: Path) -> Path:
        torch.manual_seed(0)
        head, net = fa.PartialFC(4, 7, center_optimizer=fa.CenterSGD(0.1)), torch.nn.Linear(3, 4)
        directory = checkpoint.save(root, head, net=net, note={1: (2.5, b"x", {3})})
        return root / name if name == "latest" else directory / name

    return sample


def load_stored(path: Path) -> None:
    refit_manifest(path)
    load_checkpoint(path.parent)


def load_root(path: Path) -> None:
    load_checkpoint(path.parent)


TEMPLATE_LISTS = ("face_tid_mid.txt", "name_5pts_score.txt", "template_pair_label.txt", "1N_gallery_G1.csv")


# How a valid file of each kind is written, and how the package reads it. A new format of data sets has its row in the
# test of that format.
FORMATS = [
    fuzzing.Format("rec", records, load_records, (DataError,)),
    fuzzing.Format("rec scanned", records_without_index, load_records, (DataError,)),
    fuzzing.Format("idx", lambda root: records(root).with_suffix(".idx"), load_records, (DataError,)),
    *(fuzzing.Format(f"bin {p}", pickled(p), read_pickled_pairs, (DataError,)) for p in (0, 2, 4)),
    *(fuzzing.Format(f"bin {p} of arrays", pickled(p, True), read_pickled_pairs, (DataError,)) for p in (2, 5)),
    fuzzing.Format("npz", embeddings(".npz"), EmbeddingSet.load, (DataError,)),
    fuzzing.Format("npz compressed", packed_embeddings, EmbeddingSet.load, (DataError,)),
    fuzzing.Format("safetensors embeddings", embeddings(".safetensors"), EmbeddingSet.load, (DataError,)),
    fuzzing.Format("safetensors centers", centers, load_centers, (DataError,)),
    fuzzing.Format("pt centers", torch_centers, load_centers, (DataError,)),
    fuzzing.Format("pt weights", weights, lambda path: load_weights(SmallNet(8, 3), path), (DataError,)),
    fuzzing.Format("pairs", pairs_text, lambda path: open_pairs(str(path), None, PIXELS), (DataError,)),
    *(fuzzing.Format(ending, templates(ending), load_templates, (DataError,)) for ending in TEMPLATE_LISTS),
    fuzzing.Format("toml", options, load_options, (OptionError,)),
    fuzzing.Format("list", list_text("list.lst"), load_list, (DataError,)),
    fuzzing.Format("classes.txt", of_run("classes.txt"), read_names, (DataError,)),
    fuzzing.Format(
        "data.json", of_run("data.json"), lambda path: RunFolder(path.parent).read_fingerprint(), (RunError,)
    ),
    fuzzing.Format("thresholds.json", of_run("thresholds.json"), read_thresholds, (DataError,)),
    fuzzing.Format("verification.json", of_run("verification.json"), read_digest, (DataError,)),
    fuzzing.Format("log.jsonl", of_run("log.jsonl"), load_log, ()),
    *(fuzzing.Format(kind, image(kind), load_image, (DataError,), memory=memory_of(PIXELS)) for kind in IMAGE_FORMATS),
    *(
        fuzzing.Format(name, image(kind, mode, **options), load_image, (DataError,), memory=memory_of(PIXELS))
        for name, kind, mode, options in (
            ("png of 16 bits", "png", "I;16", {}),
            ("png with a palette", "png", "P", {"transparency": 3}),
            ("jpeg, progressive", "jpeg", "CMYK", {"progressive": True}),
            ("tiff of LZW", "tiff", "RGBA", {"compression": "tiff_lzw"}),
            ("tiff of numbers", "tiff", "F", {}),
            ("webp, lossless", "webp", "RGBA", {"lossless": True}),
        )
    ),
    *(fuzzing.Format(name, stored(name), load_stored, (CheckpointError,)) for name in STORED),
    fuzzing.Format("latest", stored("latest"), load_root, (CheckpointError,)),
]


@fuzzing.counts
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.slow
def test_mutated_files(kind: fuzzing.Format, count: int, tmp_path: Path) -> None:
    fuzzing.check(kind, tmp_path, count)


def test_every_format_of_data_is_fuzzed() -> None:
    """A format is fuzzed here or in a test of its own. Folders and generated images have no file to damage."""
    opened = {(each.open or each.open_pairs).__module__ for each in formats.FORMATS}
    opened -= {formats.folders.__name__, formats.generated.__name__}
    tests = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    fuzzed = "".join(text for text in tests if "fuzzing.Format(" in text)
    missing = [module for module in sorted(opened) if f"from {module} import" not in fuzzed]
    assert missing == [], "a test with fuzzing.Format must import the function that opens the format"


MODES = ("L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")


def written_kinds() -> list[tuple[str, str, dict[str, Any]]]:
    """Return the formats, modes and options that Pillow writes."""
    turned = Image.Exif()
    turned[0x112] = 6  # a copy of the image, turned upright, is one more in memory
    options = [{}, {"exif": turned}]
    more = {"jpeg": [{"progressive": True, "exif": turned}], "tiff": [{"compression": "tiff_lzw", "exif": turned}]}
    found = []
    for format in IMAGE_FORMATS:
        for mode in MODES:
            for each in [*options, *more.get(format, [])]:
                try:
                    converted(Image.new("RGB", (8, 8)), mode).save(io.BytesIO(), format, **each)
                except (OSError, KeyError, ValueError):
                    continue
                turns = mode in ("LA", "RGBA", "CMYK") and format in ("jpeg", "png", "tiff", "webp")  # others: no EXIF
                if not each or turns:
                    found.append((format, mode, each))
    return found


@pytest.mark.parametrize("format", IMAGE_FORMATS)
@pytest.mark.slow
def test_a_large_image_takes_17_bytes_a_pixel(format: str, tmp_path: Path) -> None:
    side = 1400
    limit = memory_of(side**2)
    path, color = tmp_path / f"large.{format}", picture(0, 0, "RGB", (side, side))
    kinds = [(mode, options) for each, mode, options in written_kinds() if each == format]
    assert len(kinds) >= 3
    for mode, options in kinds:
        options = {**{"webp": {"method": 0}, "png": {"compress_level": 1}}.get(format, {}), **options}
        converted(color.resize((40, 48)), mode).save(path, format, **options)
        load_image(path)  # warm
        converted(color, mode).save(path, format, **options)
        kind = fuzzing.Format(f"{format} {mode}", lambda root: root, load_image, (), memory=limit, seconds=60)
        assert fuzzing.failures(kind, path, [path.read_bytes()]) == [], (mode, options)


@pytest.mark.slow
def test_the_harness_finds_what_it_looks_for(tmp_path: Path) -> None:
    """A loader that crashes, hangs, takes memory or raises something else is told by name."""

    def load(path: Path) -> None:
        match path.read_bytes():
            case b"crash":
                ctypes.string_at(0)
            case b"hang":
                started = time.process_time()
                while time.process_time() - started < 10:
                    pass
            case b"memory":
                bytearray(201 << 20)
            case b"other":
                raise KeyError("x")
            case b"own":
                raise DataError("bad")

    def faults(contents: list[bytes], seconds: float) -> list[str]:
        kind = fuzzing.Format("x", lambda root: root, load, (DataError,), seconds=seconds)
        return [text.split(": ", 1)[1] for text in fuzzing.failures(kind, tmp_path / "x.bin", contents)]

    found = faults([b"good", b"own", b"crash", b"memory", b"good", b"other", b"own"], seconds=60)
    assert found[0] == "ended by SIGSEGV" and found[2].startswith("KeyError at ") and len(found) == 3
    assert 190 <= int(found[1].removesuffix(" MiB beyond the file's size")) <= 240
    assert faults([b"good", b"hang", b"own"], seconds=0.3) == ["ended by SIGPROF"]


@pytest.mark.parametrize("limit", ["memory", "seconds"])
@pytest.mark.slow
def test_the_harness_forgives_a_limit_that_is_broken_once(limit: str, tmp_path: Path) -> None:
    def load(path: Path) -> None:
        if not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            bytearray(201 << 20) if limit == "memory" else time.sleep(10)

    kind = fuzzing.Format("x", lambda root: root, load, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzzing, "STUCK", 1)
        assert fuzzing.failures(kind, tmp_path / "x.bin", [b"good"]) == []
    assert (tmp_path / "once").exists()
