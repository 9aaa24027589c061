"""Verification sets in their exact on-disk forms, written here; embeddings that are kept and read again."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from fused_arcface.app.data import DataError, ImageError, ImageSpec
from fused_arcface.app.data.embedding_sets import EmbeddingSet, embed_set
from fused_arcface.app.data.formats.pickled_pairs import read_pickled_pairs
from fused_arcface.app.data.pair_sets import read_labeled, read_pair_set
from fused_arcface.evaluation import Pairs

SPEC = ImageSpec(size=8, channels=1)


def encoded(gray: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("L", (9, 12), gray).save(file, kind)
    return file.getvalue()


IMAGES = [encoded(gray) for gray in (0, 0, 0, 255, 255, 255)]
SAME = [True, False, True]


def python_2_pickle(images: list[bytes], same: list[bool]) -> bytes:
    """What Python 2's ``pickle.dump((images, same), file, 2)`` writes: ``str`` by BINSTRING, which Python 3 never
    does."""
    out = [b"\x80\x02", b"]", b"("]
    out += [b"T" + struct.pack("<i", len(image)) + image for image in images]
    out += [b"e", b"]", b"("] + [b"\x88" if flag else b"\x89" for flag in same]
    return b"".join([*out, b"e", b"\x86", b"."])


def python_2_text_pickle(images: list[bytes], same: list[bool]) -> bytes:
    """What Python 2's ``pickle.dump((images, same), file)`` writes: protocol 0, ``str`` by STRING."""
    out = b"((lp0\n"
    for number, image in enumerate(images):
        # Python 2's repr of a str: as Python 3's of bytes, without the b.
        out += b"S" + repr(image)[1:].encode("ascii") + b"\np%d\na" % (number + 1)
    out += b"(lp90\n" + b"".join(b"I01\na" if flag else b"I00\na" for flag in same)
    return out + b"tp91\n."


def python_2_arrays(images: list[bytes], same: list[bool]) -> bytes:
    """What Python 2 and its NumPy write by protocol 2 for a list of uint8 arrays and a bool array."""

    def array(code: bytes, length: int, content: bytes) -> bytes:
        out = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01"
        out += b"J" + struct.pack("<i", length) + b"\x85cnumpy\ndtype\nU\x02" + code + b"K\0K\x01\x87R"
        out += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        return out + b"\x89T" + struct.pack("<i", len(content)) + content + b"tb"

    listed = b"".join(array(b"u1", len(image), image) for image in images)
    return b"\x80\x02](" + listed + b"e" + array(b"b1", len(same), bytes(same)) + b"\x86."


FORMS: dict[str, Callable[[], bytes]] = {
    **{f"protocol {p}": (lambda p=p: pickle.dumps((IMAGES, SAME), p)) for p in range(6)},
    "python 2": lambda: python_2_pickle(IMAGES, SAME),
    **{f"numpy bools, protocol {p}": (lambda p=p: pickle.dumps((IMAGES, list(np.array(SAME))), p)) for p in (2, 4, 5)},
    **{f"numpy array, protocol {p}": (lambda p=p: pickle.dumps((IMAGES, np.array(SAME)), p)) for p in (2, 4, 5)},
    **{
        f"uint8 arrays {shape}, protocol {p}": (
            lambda p=p, shape=shape: pickle.dumps(
                ([np.frombuffer(i, np.uint8).reshape(shape) for i in IMAGES], SAME), p
            )
        )
        for p in (0, 2, 4, 5)
        for shape in ((-1,), (-1, 1), (1, -1))
    },
    **{
        f"{dtype} array, protocol {p}": (lambda p=p, dtype=dtype: pickle.dumps((IMAGES, np.array(SAME, dtype)), p))
        for p in (0, 3, 5)
        for dtype in ("i1", "<i8", ">i4", ">u2")
    },
    "python 2, protocol 0": lambda: python_2_text_pickle(IMAGES, SAME),
    "python 2 uint8 arrays": lambda: python_2_arrays(IMAGES, SAME),
    "numpy integers": lambda: pickle.dumps((IMAGES, [np.int64(1), np.uint8(0), np.int32(1)]), 4),
    "an object array of images": lambda: pickle.dumps((np.array(IMAGES, dtype=object), SAME), 4),
    "lists and numbers": lambda: pickle.dumps([tuple(IMAGES), [1, 0, 1]], 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_pickled_pairs(form: str, tmp_path: Path) -> None:
    file = tmp_path / "lfw.bin"
    file.write_bytes(FORMS[form]())
    stored = read_pickled_pairs(file)
    assert [bytes(image) for image in stored.images] == IMAGES and stored.same == SAME
    found = read_pair_set(str(file))
    assert found.pairs is not None and found.paths[3] == "lfw.bin[3]"
    assert found.pairs.first.tolist() == [0, 2, 4] and found.pairs.second.tolist() == [1, 3, 5]
    assert found.pairs.same.tolist() == SAME
    assert [float(found.read(i, SPEC).mean()) for i in range(6)] == [-1, -1, -1, 1, 1, 1]


def test_bytes_of_old_protocols_name_a_codec() -> None:
    assert b"_codecs" in pickle.dumps(b"\xff", 2)  # so the case "protocol 2" tests that path


class _State:
    """Pickled as ``value`` whose state is set to ``state`` by BUILD."""

    def __init__(self, value: Any, state: Any) -> None:
        self.made = (*(value.__reduce__()[:2] if not isinstance(value, type) else (type, (value,))), state)

    def __reduce__(self) -> Any:
        return self.made


class _Bomb:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("what", ["os.system", "open", "eval", "numpy.fromfile", "inside", "codec", "subclass"])
def test_malicious_pickles_are_refused_and_execute_nothing(what: str, protocol: int, tmp_path: Path) -> None:
    import codecs

    victim, file = tmp_path / "victim", tmp_path / "evil.bin"
    bomb = {
        "os.system": _Bomb(os.system, f"touch {victim}"),
        "open": _Bomb(open, str(victim), "w"),
        "eval": _Bomb(eval, f"open({str(victim)!r}, 'w')"),
        "numpy.fromfile": _Bomb(np.fromfile, "/etc/hostname", np.uint8),
        "inside": [IMAGES, [_Bomb(os.mkdir, str(victim)), True, False]],
        "codec": _Bomb(codecs.encode, "x", "rot13"),
        "subclass": _Bomb(np.ndarray.__reduce__, np.zeros(3)),
    }[what]
    file.write_bytes(pickle.dumps(bomb if what == "inside" else (bomb, SAME), protocol))
    with pytest.raises(DataError, match=rf"^{re.escape(str(file))} is refused: it .*; nothing of it was executed$"):
        read_pickled_pairs(file)
    assert not victim.exists()


def test_an_array_that_would_fill_memory_is_not_made(tmp_path: Path) -> None:
    for bomb in (_Bomb(np.ndarray, (10**13,)), _Bomb(bytearray, 10**13), _Bomb(bytes, 10**13)):
        (tmp_path / "lfw.bin").write_bytes(pickle.dumps((bomb, SAME)))
        with pytest.raises(DataError, match=r"is refused: it .*; nothing of it was executed"):
            read_pickled_pairs(tmp_path / "lfw.bin")


U1 = np.frombuffer(b"x", "u1").dtype


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # An array whose shape says more than its bytes: NumPy would show what lies behind them in memory.
        ((_State(np.zeros(1, "u1"), (1, (10**6,), U1, False, b"1234")), SAME), "shape (1000000,) has other content"),
        ((IMAGES, _State(np.zeros(1, "u1"), (1, (10**12,), U1, False, b""))), "shape (1000000000000,) has other"),
        ((_State(np.zeros(1, "u1"), (1, (-4,), U1, False, b"1234")), SAME), "an array has an invalid shape"),
        ((_State(np.zeros(1, "u1"), (1, (2, 1, 2), U1, False, b"1234")), SAME), "more than two dimensions"),
        # A dtype of its own size, subtype, fields or flags: NumPy believes them.
        ((_State(np.dtype("u1"), (3, "<", U1, None, None, 8, 1, 63)), SAME), "something else than bools, integers"),
        ((_State(np.dtype("u1"), (3, "<", None, ("f",), None, 8, 1, 63)), SAME), "something else than bools, integers"),
        ((np.zeros(6, "f4"), SAME), "something else than bools, integers or objects"),
        ((np.array(["a"] * 6), SAME), "something else than bools, integers or objects"),
        # Attributes of something that is no array.
        ((_State(np.ndarray, {"x": 1}), SAME), "which no verification set needs"),
    ],
)
def test_state_that_numpy_would_believe_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match=re.escape(message)):
        read_pickled_pairs(tmp_path / "lfw.bin")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\x80\x02" + b"]" * 400_000 + b".", "more than 300000 lists, tuples, arrays and remembered values"),
        (b"\x80\x04N" + b"\x94" * 400_000 + b".", "more than 300000 lists, tuples, arrays and remembered values"),
        (b"\x80\x02](" + b"\x88" * 2_000_000 + b"e.", "more than 1500000 instructions"),
        (b"\x80\x02\x8a\xff" + bytes(255) + b".", "a number of 255 bytes"),
        (b"\x80\x04B\xff\xff\xff\xff" + bytes(10), "ends 4294967285 byte(s) early"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + bytes(10), "byte(s) early"),
        (b"I" + b"9" * 10**6 + b"\n.", "is not a number"),
        (b"\x80\x02]q\0h\0ah\0h\0\x86.", "ends with 2 values, not with one"),
        (b"\x80\x02]q\0h\0aK\x01\x86.", "must hold two lists, images and is same; it holds list and int"),
        (b"\x80\x09N.", "it is of protocol 9"),
        (b"\x80\x02cos\nsystem\n.", "it names os.system"),
    ],
)
def test_sizes_that_only_the_file_claims(code: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").write_bytes(code)
    started = time.process_time()
    with pytest.raises(DataError, match=re.escape(message)):
        read_pickled_pairs(tmp_path / "lfw.bin")
    assert time.process_time() - started < 20  # a reader without the limit takes minutes


def test_the_bombs_are_live(tmp_path: Path) -> None:
    """What the tests above refuse would have run."""
    pickle.loads(pickle.dumps(_Bomb(os.mkdir, str(tmp_path / "victim"))))
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps((IMAGES, SAME))[:-40], "is not a pickle file, or it is damaged"),
        (b"", "is not a pickle file, or it is damaged"),
        (b"\xff\xd8 no pickle", "is not a pickle file, or it is damaged"),
        (pickle.dumps(IMAGES), r"must hold \(images, is same\)"),
        (pickle.dumps((IMAGES[:5], SAME)), "must hold two images a pair; it holds 5 and 3 pairs"),
        (pickle.dumps(([], [])), "must hold two images a pair"),
        (pickle.dumps((IMAGES, 3)), "must hold two lists, images and is same; it holds list and int"),
        (
            pickle.dumps((["text"] * 6, SAME)),
            r"image 0 must be bytes or a uint8 array \(n,\), \(n, 1\) or \(1, n\); it is str",
        ),
        (pickle.dumps((IMAGES, [True, 2, False])), "is same 1 must be a bool; it is 2"),
    ],
)
def test_bin_files_that_are_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_pickled_pairs(tmp_path / "lfw.bin")


def test_an_image_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([b"no image", *IMAGES[1:]], SAME)))
    with pytest.raises(ImageError, match=r"^\S+\.bin\[\d+\]: an image of 8 bytes"):
        read_pair_set(str(tmp_path / "lfw.bin")).read(0, SPEC)


def people(root: Path, images: dict[str, list[int]], suffix: str = "jpg") -> Path:
    """LFW's layout: ``name/name_0001.jpg``."""
    for name, grays in images.items():
        (root / name).mkdir(parents=True)
        for number, gray in enumerate(grays, start=1):
            (root / name / f"{name}_{number:04d}.{suffix}").write_bytes(
                encoded(gray, "jpeg" if suffix == "jpg" else suffix)
            )
    return root


@pytest.mark.parametrize("heading", ["2\t1\n", "1\n", ""])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_lfw_pairs(heading: str, suffix: str, tmp_path: Path) -> None:
    people(tmp_path / "lfw", {"Ann_Lee": [0, 0, 255], "Bob": [255]}, suffix)
    file = tmp_path / "pairs.txt"
    file.write_text(f"{heading}Ann_Lee\t1\t2\nAnn_Lee\t1\tBob\t1\n\nAnn_Lee\t2\t3\n")
    found = read_pair_set(str(file), tmp_path / "lfw")
    assert found.pairs is not None and len(found) == 4  # each image once
    assert [Path(path).name for path in found.paths] == [
        f"{name}.{suffix}" for name in ("Ann_Lee_0001", "Ann_Lee_0002", "Bob_0001", "Ann_Lee_0003")
    ]
    assert found.pairs.first.tolist() == [0, 0, 1] and found.pairs.second.tolist() == [1, 2, 3]
    assert found.pairs.same.tolist() == [True, False, True]
    assert found.read(2, SPEC).mean() == 1


@pytest.mark.parametrize("separator", [" ", "\t", ", "])
def test_plain_pairs(separator: str, tmp_path: Path) -> None:
    people(tmp_path, {"a": [0, 9], "b": [200]}, "png")
    lines = [("a/a_0001.png", "a/a_0002.png", "1"), ("a/a_0001.png", "b/b_0001.png", "0")]
    (tmp_path / "pairs.csv").write_text("".join(separator.join(line) + "\n" for line in lines))
    found = read_pair_set(str(tmp_path / "pairs.csv"))  # beside the images: no folder needs to be named
    assert found.pairs is not None and found.pairs.same.tolist() == [True, False] and len(found) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 b 7\n", r"has no pairs whose images are there: .*pairs.txt, line 1: .*b_0007.jpg is missing"),
        ("a 1 2\na 1 b 7 8\n", "pairs.txt, line 2: must be"),
        ("a 1\n", r"line 1: must be `name n m`, `name n name m` or `path path 0\|1`; got 'a 1'"),
        ("a/a_0001.jpg a/a_0002.jpg yes\n", "line 1: must be"),
        ("a \u00b2 2\n", "line 1: must be"),
        ("a 1 " + "9" * 5000 + "\n", "line 1: must be"),
        ("", "has no pairs whose images are there"),
    ],
)
def test_files_of_pairs_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    people(tmp_path, {"a": [0, 9], "b": [200]})
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_pair_set(str(tmp_path / "pairs.txt"))


def test_pairs_of_a_labeled_folder(tmp_path: Path) -> None:
    people(tmp_path / "set", {"a": [0, 9, 20], "b": [200, 210]})
    found = read_pair_set(str(tmp_path / "set"), seed=1)
    assert found.labels is not None and found.labels.tolist() == [0, 0, 0, 1, 1] and found.names == ["a", "b"]
    assert found.pairs is not None and found.pairs.same.sum() == 4 and len(found.pairs.same) == 8
    again = read_pair_set(str(tmp_path / "set"), seed=1).pairs
    assert again is not None and again.first.equal(found.pairs.first)
    with pytest.raises(DataError, match="no pairs can be made"):
        read_pair_set(str(people(tmp_path / "one", {"a": [0, 9]})))
    with pytest.raises(DataError, match=r"missing\.bin does not exist$"):
        read_pair_set(str(tmp_path / "missing.bin"))


def test_embedding_of_a_set(tmp_path: Path) -> None:
    images = read_labeled(str(people(tmp_path, {"a": [0, 255], "b": [255]}, "png")))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3), torch.nn.Dropout(0.5))
    seen: list[int] = []
    found = embed_set(net, images, SPEC, batch_size=2, done=seen.append)
    stack = torch.stack([images.read(i, SPEC) for i in range(3)])
    torch.testing.assert_close(found.embeddings, net.eval()(stack).detach())
    assert seen == [2, 1] and found.labels is not None and found.labels.tolist() == [0, 0, 1]


def test_flip_adds_the_mirrored_image(tmp_path: Path) -> None:
    image = np.zeros((8, 8), np.uint8)
    image[:, :4] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / "1.png")
    left = torch.nn.Flatten()  # the embedding is the image
    found = embed_set(left, read_labeled(str(tmp_path)), SPEC, flip=True)
    assert found.embeddings.abs().max() == 0  # -1 and 1, mirrored, add up to nothing


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_embeddings_come_back(suffix: str, tmp_path: Path) -> None:
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([2, 2]), torch.tensor([True, False]))
    saved = EmbeddingSet(torch.randn(3, 4), ["a/ä 1.png", "b", "c"], torch.tensor([5, 0, 5]), pairs)
    saved.save(tmp_path / "new" / f"e.{suffix}")
    found = EmbeddingSet.load(tmp_path / "new" / f"e.{suffix}")
    assert found.embeddings.equal(saved.embeddings) and found.paths == saved.paths
    assert found.labels is not None and found.labels.tolist() == [5, 0, 5]
    assert found.pairs is not None and all(a.equal(b) for a, b in zip(found.pairs, pairs, strict=True))


def test_other_programs_embeddings(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", embeddings=np.eye(3, dtype=np.float64), labels=np.array([0, 0, 1], np.int32))
    found = EmbeddingSet.load(tmp_path / "e.npz")
    assert found.embeddings.dtype == torch.float32 and found.paths == ["e.npz[0]", "e.npz[1]", "e.npz[2]"]
    library = pytest.importorskip("safetensors.torch")
    library.save_file({"embeddings": torch.eye(3), "labels": torch.tensor([0, 0, 1])}, tmp_path / "e.safetensors")
    assert EmbeddingSet.load(tmp_path / "e.safetensors").embeddings.equal(torch.eye(3))
    EmbeddingSet(torch.eye(2), ["a", "b"], torch.tensor([1, 2])).save(tmp_path / "ours.safetensors")
    assert library.load_file(tmp_path / "ours.safetensors")["labels"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.arange(3)}, r"must hold floating-point embeddings \(M, D\); it holds labels \(3,\)"),
        ({"embeddings": np.eye(3), "labels": np.arange(2)}, r"labels must be \(3,\)"),
        ({"embeddings": np.eye(3), "pairs": np.zeros((2, 2), int)}, r"must hold pairs \(P, 2\) with same"),
        (
            {"embeddings": np.eye(3), "pairs": np.full((1, 2), 3), "same": np.ones(1, int)},
            "pairs must be numbers of 3 embeddings",
        ),
        ({"embeddings": np.array([None])}, r"embeddings\.npy must not have elements of type object"),
    ],
)
def test_embeddings_that_are_none(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(DataError, match=message):
        EmbeddingSet.load(tmp_path / "e.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "e.npz").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.npz cannot be read"):
        EmbeddingSet.load(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match=r"embeddings must be in a .npz or .safetensors file; got e.txt"):
        EmbeddingSet.load("e.txt")
