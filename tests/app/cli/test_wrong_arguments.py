"""Wrong arguments of every command: one line that names the rule, and exit status 2, before anything is computed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from support.image_files import picture

from fused_arcface.app.cli import run
from fused_arcface.app.data import formats
from fused_arcface.app.data.formats.embeddings import EMBEDDING_FILES, SUFFIXES
from fused_arcface.app.training.config import TrainConfig
from fused_arcface.app.training.trainer import train

TRAIN = "train --data identities:4x4 --output new"
SMALL = "train --data identities:4x4 --output deep/new --batch-size 8 --image-size 16"
STORED = "train --data identities:4x4 --output new --batch-size 8 --image-size 16 --sample-rate 0.5"
NET = "--checkpoint run"
BARE = "--checkpoint bare.pt --backbone small"
IDENTITIES = "--data identities:6x4"
DATA = f"data must be {formats.listed()}"
SAVED = f"{IDENTITIES} {NET} --save-embeddings new/x.npz"
CASES = {
    "train": "Missing option '--output'.",
    "train --output new": f"--{DATA}; got nothing",
    "train --output new --data nowhere": f"nowhere does not exist; {DATA}",
    "train --output new --data identites:4x4": "identites:4x4 does not exist; did you mean identities?",
    "train --output new --data identities:4": "generated images are identities:IDSxIMAGES, identities:200x10",
    "train --output new --data bob.pgn": "bob.pgn does not exist; did you mean bob.png?",
    f"{TRAIN} --batch-size 1": "--batch-size must be >= 2; got 1",
    f"{TRAIN} --batch-size many": "--batch-size must be a whole number; got many",
    f"{TRAIN} --epochs 1.5": "--epochs must be a whole number; got 1.5",
    f"{TRAIN} --label-smoothing 0.1": "--label-smoothing needs center_optimizer joint",
    f"{TRAIN} --margin ArcFace(": "--margin 'ArcFace(': '(' was never closed\n",
    f"{TRAIN} --scale-schedule linear:1-2:7": "--scale-schedule must have START from 0 to 1; got 'linear:1-2:7'",
    f"{TRAIN} --freeze backbone:0": "EPOCHS from 1 on; got 'backbone:0'",
    f"{TRAIN} --report run": "--report must be a file; run is a folder",
    "train --data identities:4x4 --output=": "--output must be the name of a file or folder; got ''",
    "train --data bob.png --output new": f"--{DATA}; got bob.png",
    "train --data data --output new": f"data does not exist; {DATA}",
    f"{TRAIN} --schedule cosin": "--schedule must be one of cosine, polynomial, constant; got 'cosin'",
    f"{TRAIN} --margin ArcFase(0.5)": "did you mean ArcFace?",
    f"{TRAIN} --backbone iresnet5": "did you mean iresnet50?",
    f"{TRAIN} --device gpu": "--device must be auto, cpu, cuda or cuda:N; got 'gpu'",
    f"{TRAIN} --backend abacus": "--backend must be one of",
    f"{TRAIN} --freeze bacbone": "--freeze must be backbone or backbone:EPOCHS, EPOCHS from 1 on; got 'bacbone'",
    f"{TRAIN} --accumulation 9": "--batch-size must be >= 18, and so must the number of images",
    f"{TRAIN} --config no.toml": "no.toml does not exist",
    f"{TRAIN} --init no.pt": "--init: no.pt does not exist",
    f"{TRAIN} --centers no.pt": "--centers: no.pt does not exist",
    f"{TRAIN} --verify-data no.bin": "--verify-data: no.bin does not exist",
    f"{TRAIN} --verify-data bob.pgn": "--verify-data: bob.pgn does not exist; did you mean bob.png?",
    f"{TRAIN} --batch-size 8 --verify-data pairs.bin": "pairs.bin must hold two images a pair",
    f"{SMALL} --init bob.png": "cannot be read as a file of tensors",
    f"{SMALL} --init run --embedding-dim 32": "must be (32,",
    f"{SMALL} --resume auto --init bob.png": "cannot be read as a file of tensors",
    f"{SMALL} --centers pairs.bin": "cannot be read as a file of tensors",
    f"{SMALL} --centers run --embedding-dim 32": "must have centers of embedding_dim=32",
    f"{SMALL} --center-storage host": "--center-storage must be 'device' with sample_rate=1",
    f"{SMALL} --center-storage bob.png --sample-rate 0.5": "bob.png: the store of class centers cannot be made",
    f"{STORED} --init bob.png --center-storage store": "cannot be read as a file of tensors",
    f"{STORED} --centers bob.png --center-storage new/store": "cannot be read as a file of tensors",
    f"{STORED} --centers bob.png --center-storage new": "cannot be read as a file of tensors",
    f"{TRAIN} --resume": "new does not exist; make a run with: fused-arcface train --data DATA --output new",
    "train --data identities:6x4 --output run": "run holds a run already",
    f"similarity bob.png bbo.png {NET}": "bbo.png does not exist; did you mean bob.png?",
    "similarity bob.png bob.png --checkpoint rum": "rum does not exist; did you mean run?",
    "similarity bob.png bob.png --checkpoint bare.pt": "its net must be named: backbone must be one of",
    f"similarity bob.png bob.png {BARE}": "image_size must be given",
    f"similarity bob.png bob.png {NET} --threshold 2": "--threshold must be a number >= -1 and <= 1; got 2",
    f"similarity bob.png run {NET}": "run must be an image file; it is a folder",
    f"similarity bob.png bob.png {NET} --threshold 0 --far 0.1": "--threshold and --far can't be given together",
    f"similarity bob.png bob.png {NET} --far 0.5": "--far must be one of 0.1, ",
    f"similarity bob.png bob.png {NET} --device abacus": "--device must be cpu, cuda, cuda:N or another",
    f"similarity bob.png bob.png {NET} --tresh 0": "No such option: --tresh",
    f"embed bob.pgn {NET} --output x.npz": "bob.pgn does not exist; did you mean bob.png?",
    f"embed bob.png {NET} --output x.json": f"must go to a {', '.join(SUFFIXES)} or .csv file; got x.json",
    f"export {NET} --output x.tflite": "must be exported to a .onnx or a .pt2 file; got x.tflite",
    f"embed bob.png {NET} --output bob.png/x.npz": "--output bob.png/x.npz cannot be written to: Not a directory",
    f"embed bob.png {NET} --output=": "--output must be the name of a file or folder; got ''",
    f"export {NET} --output bob.png/x.onnx": "--output bob.png/x.onnx cannot be written to: Not a directory",
    "convert run run": "the destination must be a folder of checkpoints; run is a training run",
    "convert rum x.safetensors": "rum does not exist; did you mean run?",
    "convert run x.safetensors --center-storage new": "--center-storage is for a folder of checkpoints; the dest",
    "templates --data nowhere --checkpoint run": "nowhere does not exist",
    "convert run x.txt": "the destination must be a .safetensors file or a folder of checkpoints; got x.txt",
    "convert run x.safetensors --classes 2": "--classes must be >= 6, those of the source; got 2",
    "convert run x.safetensors --seed -1": "--seed must be >= 0; got -1",
    "convert run x.safetensors --sub-centers 3": "run has sub_centers=1; got 3",
    f"verify --data bob.pgn {NET}": "bob.pgn does not exist; did you mean bob.png?",
    f"verify {IDENTITIES} --checkpoint rum": "rum does not exist; did you mean run?",
    f"verify {IDENTITIES} {BARE}": "image_size must be given",
    f"verify {IDENTITIES} {NET} --image-size 8": "--image-size is for files of weights; run is of a run",
    f"verify {IDENTITIES} {NET} --folds 1": "--folds must be a whole number >= 2; got 1",
    f"verify {IDENTITIES} {NET} --seed -1": "--seed must be a whole number >= 0; got -1",
    f"verify {IDENTITIES} {NET} --shrinkage nan": "--shrinkage must be a number >= 0 and <= 1; got nan",
    f"verify {IDENTITIES} {NET} --save-embeddings x.txt": f"--save-embeddings must be in a {EMBEDDING_FILES} file",
    f"verify {SAVED} --folds 1000": "--folds must be >= 2 and <= the number of pairs 72; got 1000",
    f"verify {SAVED} --gallery no.npz": "no.npz does not exist",
    f"identify {SAVED} --gallery-images 9": "labels must hold an identity with more than gallery_images=9",
    f"identify {SAVED} --unknown 1": "--unknown must be in [0, 1); got 1.0",
    f"identify {SAVED} --engine faiss --distance p-norm": "--engine faiss must be used with Euclidean distances",
    f"verify --data= {NET}": f"--{DATA}; got an empty text",
    f"identify {IDENTITIES} {NET} --gallery-images 9": "labels must hold an identity with more than gallery_images=9",
    "identify --data pairs.bin --checkpoint run": f"--{DATA}; got pairs.bin",
    "compare --criteria nothing --output new": "--criteria must be among",
    "compare --quick --output new --data nowhere": "nowhere does not exist",
    "compare --quick --output new --report run": "--report must be a file; run is a folder",
    "compare --output bob.png": "--output bob.png cannot be written to: Not a directory",
    "demo --output bob.png": "--output bob.png cannot be written to: Not a directory",
    "bench --cases none": "--cases must be one of quick, full, small, scaling, start; got 'none'",
    "bench --device tpu": "--device must be cpu or cuda; got tpu",
    "bench --resume": "--resume: runs/bench holds no run to resume",
    "bench --output new --resume --budget 1": "--resume: new holds no capacities to resume",
    "bench --output new --providers nobody --budget 1": "--providers must be among",
    "bench --output new --report run": "--report must be a file; run is a folder",
    "bench --budget 0": "--budget must be > 0 and finite; got 0.0",
    "bench --output new --ranks 1 --budget 1": "--budget and --ranks can't be given together",
    "bench --ranks two": "--ranks must be numbers >= 1, comma-separated; got 'two'",
    "bench --output bob.png": "--output bob.png cannot be written to",
    "gradcheck --dtype fp32": "--dtype must be float64, float32, bfloat16, float16 or all; got fp32",
    "doctor now": "Got unexpected extra argument",
}
FILES = {  # options that name a file for results
    "verify": ("--json", "--report", "--save-embeddings"),
    "identify": ("--json", "--report", "--save-embeddings", "--predictions"),
}
for _command, _options in FILES.items():
    for _option in _options:
        _start = f"{_command} {IDENTITIES} {NET} {_option}"
        CASES[f"{_start} bob.png/x.npz"] = f"{_option} bob.png/x.npz cannot be written to: Not a directory"
        CASES[f"{_start} run"] = f"{_option} must be a file; run is a folder"
    CASES[f"{_command} {IDENTITIES} {NET} --pictures bob.png"] = "--pictures bob.png cannot be written to"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    config = TrainConfig(data="identities:6x4", epochs=1, batch_size=8, image_size=16, workers=0, device="cpu")
    train(config, folder / "run")
    (folder / "bare.pt").write_bytes((folder / "run" / "model.pt").read_bytes())
    (folder / "pairs.bin").write_bytes(pickle.dumps(([], [])))
    picture(0, 0).save(folder / "bob.png")
    (folder / "device").mkdir()  # the value of an option, and not its folder
    return folder


@pytest.mark.parametrize("command", CASES)
@pytest.mark.slow
def test_a_wrong_argument_is_named(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert run(command.split()) == 2
    shown = capsys.readouterr()
    assert CASES[command] in shown.err and len(shown.err.splitlines()) <= 2, shown.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--center-storage host", "--center-storage must be 'device' with sample_rate=1"),
        ("--label-smoothing 0.1 --center-optimizer joint --sub-centers 2", "--label-smoothing must be 0 with sub_cent"),
    ],
)
def test_options_that_the_head_refuses_leave_no_run(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", "identities:4x4", "--output", str(tmp_path / "run"), "--epochs", "1"]
    command += ["--batch-size", "8", "--image-size", "16", "--workers", "0", "--no-report"]
    assert run([*command, *options.split()]) == 2 and message in capsys.readouterr().err
    assert run(command) == 0  # with other options, into the same folder
