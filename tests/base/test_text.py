"""Names of files in text files: in every locale, with every character that a name can hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.image_files import picture, write_folder

from fused_arcface.app.cli import run
from fused_arcface.app.data.pair_sets import read_pair_set
from fused_arcface.app.training.config import TrainConfig, read_options
from fused_arcface.app.training.runs import RunFolder
from fused_arcface.base import text

# All that str.splitlines cuts at, a carriage return in front of a line feed, quotes, backslashes, bytes that are no
# UTF-8, and names in other scripts.
ODD = [
    *(f"a{separator}b" for separator in "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"),
    *("end\n", "end\r", "\r\n", '"quoted"', "back\\slash", "back\\nslash", "caf\udce9", "張三", "\u3000wide\u3000"),
]


def test_names_pass_through_a_file_with_a_line_each() -> None:
    data = text.encode_names(ODD)
    assert text.decode_names(data) == ODD
    # Any reader finds as many lines, whatever it cuts at.
    assert len(text.decode(data).splitlines()) == data.count(b"\n") == len(ODD)
    assert text.encode_names(["ann", "bob"]) == b"ann\nbob\n" and text.encode_names(["\udce9"]) == b"\xe9\n"
    assert text.decode_names(b"ann\nbob\n") == ["ann", "bob"]


def test_a_byte_order_mark_is_no_part_of_a_text() -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert text.lines("ann 1 2\r\nbob 1 2".encode(encoding)) == ["ann 1 2", "bob 1 2"]
    assert text.lines(b"ann 1 2\rbob 1 2\r") == ["ann 1 2", "bob 1 2"]
    assert text.lines(b"") == [] and text.lines(b"\n\n") == ["", ""]


@pytest.mark.parametrize("name", [*ODD, "".join(map(chr, range(1, 256)))])
def test_options_pass_through_a_file(tmp_path: Path, name: str) -> None:
    config = TrainConfig(data=name)
    config.save(tmp_path / "config.toml")
    assert TrainConfig().replace(read_options(tmp_path / "config.toml")) == config
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "config.toml").read_bytes())
    assert read_options(tmp_path / "bom.toml")["data"] == name


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", [name for name in ODD if "\n" not in name])
def test_files_of_pairs_name_any_file(tmp_path: Path, name: str, ending: str) -> None:
    for number in (1, 2):
        (tmp_path / "A").mkdir(exist_ok=True)
        picture(0, number).save(tmp_path / "A" / f"{name}{number}.png")
    rows = [f"A/{name}1.png\tA/{name}2.png\t1", f"A/{name}1.png\tA/{name}1.png\t0"]
    (tmp_path / "pairs.txt").write_bytes(b"\xef\xbb\xbf" + os.fsencode("".join(row + ending for row in rows)))
    found = read_pair_set(str(tmp_path / "pairs.txt"))
    assert found.paths == [str(tmp_path / "A" / f"{name}{number}.png") for number in (1, 2)]


def test_a_byte_order_mark_before_lfws_pairs(tmp_path: Path) -> None:
    write_folder(tmp_path, 2, 2, kinds=(("L", 8, 8, "jpg"),))
    for identity in ("000", "001"):
        for number in ("00", "01"):
            folder = tmp_path / f"person_{identity}"
            (folder / f"{number}.jpg").rename(folder / f"person_{identity}_{int(number) + 1:04d}.jpg")
    (tmp_path / "pairs.txt").write_bytes(b"\xef\xbb\xbfperson_000 1 2\r\nperson_000 1 person_001 2\r\n")
    assert len(read_pair_set(str(tmp_path / "pairs.txt")).paths) == 3


def odd_folder(root: Path) -> Path:
    for number, name in enumerate(ODD):
        (root / name).mkdir(parents=True)
        for sample in range(2):
            picture(number, sample).save(root / name / f"{name}{sample}.png")
    return root


TRAINED = (
    *(
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--image-size",
        "8",
        "--channels",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
    ),
    *("--verify-data", "identities:4x4"),
)


@pytest.mark.slow
def test_a_run_on_odd_names_is_trained_resumed_and_evaluated(tmp_path: Path, capsys) -> None:
    data, output = odd_folder(tmp_path / "data\udce9\n張"), tmp_path / "run\udce9\u2028"
    assert run(["train", "--data", str(data), "--output", str(output), *TRAINED]) == 0, capsys.readouterr().err
    assert sorted(text.decode_names(RunFolder(output).classes.read_bytes())) == sorted(ODD)
    assert run(["train", "--output", str(output), "--resume", "--epochs", "2"]) == 0, capsys.readouterr().err
    log = [json.loads(line) for line in (output / "log.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == list(range(1, len(log) - 1))
    kept = ["--save-embeddings", str(tmp_path / "\udce9x.npz"), "--json", str(tmp_path / "\udce9x.json")]
    shown = ["--pictures", str(tmp_path / "\udce9 $x$ $y")]
    status = run(["verify", "--data", str(data), "--checkpoint", str(output), *kept, *shown])
    assert status == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "\udce9x.json").read_bytes())["data"] == str(data)
    with np.load(tmp_path / "\udce9x.npz") as saved:
        assert set(saved["paths"]) == {str(data / name / f"{name}{sample}.png") for name in ODD for sample in range(2)}


LOCALES = {"ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "utf-8": {"LC_ALL": "C"}}


@pytest.mark.parametrize("locale", LOCALES)
def test_files_are_the_same_in_every_locale(tmp_path: Path, locale: str) -> None:
    """Also where the system's names are ASCII to Python, and each byte of another one a surrogate."""
    for name in ODD:
        (tmp_path / "names" / name).mkdir(parents=True)
    script = """if True:
        import os, runpy, sys
        text = runpy.run_path(sys.argv[1])
        names = sorted(os.listdir("names"))
        stored = text["encode_names"](names)
        assert text["decode_names"](stored) == names and text["decode"](text["encode"](repr(names))) == repr(names)
        os.write(1, stored)
        """
    called = [sys.executable, "-c", script, text.__file__]
    done = subprocess.run(called, env={**os.environ, **LOCALES[locale]}, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert sorted(text.decode_names(done.stdout)) == sorted(ODD)
    assert sorted(done.stdout.splitlines()) == sorted(text.encode_names(ODD).splitlines())


@pytest.mark.full
@pytest.mark.parametrize("locale", LOCALES)
def test_a_run_goes_on_in_another_locale(tmp_path: Path, locale: str, capsys) -> None:
    data, output = odd_folder(tmp_path / "張 data"), tmp_path / "張 run"
    started = [sys.executable, "-m", "fused_arcface", "train", "--data", data, "--output", output, *TRAINED]
    done = subprocess.run(started, env={**os.environ, **LOCALES[locale]}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    files = {path.name: path.read_bytes() for path in (output / "config.toml", output / "classes.txt")}
    assert run(["train", "--output", str(output), "--resume", "--epochs", "2"]) == 0, capsys.readouterr().err
    assert (output / "classes.txt").read_bytes() == files["classes.txt"]
    _, before = files["config.toml"].split(b"\n", 1)  # the first line is a checksum
    _, after = (output / "config.toml").read_bytes().split(b"\n", 1)
    assert after == before.replace(b"epochs = 1", b"epochs = 2")
