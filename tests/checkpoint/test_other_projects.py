"""Class centers and nets in other projects' files: names and layouts as their training scripts write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_arcface as fa
from fused_arcface.app import cli
from fused_arcface.app.nets.weights import read_state
from fused_arcface.app.training.centers import load_centers
from fused_arcface.base.torch_files import TensorFileError
from fused_arcface.checkpoint import convert, other_projects

DRAW = torch.Generator().manual_seed(0)
CENTERS = torch.randn(7, 4, generator=DRAW)
SHAPES = {"conv1.weight": (2, 3, 3, 3), "fc.weight": (4, 8), "features.weight": (4,)}
NET = {name: torch.randn(shape, generator=DRAW) for name, shape in SHAPES.items()}
MOMENTUM = {"state": {0: {"momentum_buffer": torch.zeros(4, 7)}}, "param_groups": []}


def under(prefix: str, state: dict[str, Tensor] = NET) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def kernel(prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}kernel": CENTERS.T.contiguous()}


FILES: dict[str, tuple[Any, bool, bool]] = {
    # What the file holds, whether it has momentum, whether it has the net.
    "AdaFace": (
        {"state_dict": under("model.") | kernel("head.") | {"head.t": torch.zeros(1)}, "epoch": 3},
        False,
        True,
    ),
    "ElasticFace": (kernel(), False, False),
    "CurricularFace": ({"EPOCH": 1, "HEAD": kernel() | {"t": torch.zeros(1)}, "OPTIMIZER": MOMENTUM}, True, False),
    "InsightFace_Pytorch": (kernel(), False, False),
    "MagFace": (
        {"epoch": 1, "state_dict": under("features.") | {"fc.weight": CENTERS.T.contiguous()}, "optimizer": MOMENTUM},
        True,
        True,
    ),
    "MagFace in parallel": (
        {"state_dict": under("module.features.module.") | {"module.fc.weight": CENTERS.T.contiguous()}},
        False,
        True,
    ),
    "Lightning": (
        {"state_dict": under("backbone.") | {"head.weight": CENTERS}, "optimizer_states": [MOMENTUM]},
        True,
        True,
    ),
    "WeSpeaker": (under("pool.") | {"projection.weight": CENTERS}, False, False),
    "voxceleb_trainer": (under("__S__.") | {"__L__.weight": CENTERS}, False, False),
    "ECAPA-TDNN": (under("speaker_encoder.") | {"speaker_loss.weight": CENTERS}, False, False),
    "open-metric-learning": ({"state_dict": under("model.") | {"criterion.weight": CENTERS}}, False, False),
    "fast-reid": ({"model": under("backbone.") | {"heads.weight": CENTERS}, "iteration": 3}, False, False),
    "landmarks": (
        {"model_state_dict": under("module.enet.") | {"module.metric_classify.weight": CENTERS}, "epoch": 1},
        False,
        False,
    ),
    "Lightning and its metric loss": ({"state_dict": under("backbone.") | {"loss_func.W": CENTERS.T}}, False, True),
    "Lightning with a second classifier": (
        {"state_dict": under("backbone.") | {"head.weight": CENTERS, "aux.weight": CENTERS, "aux.bias": torch.ones(7)}},
        False,
        True,
    ),
    # FaceX-Zoo has its tensors in both layouts under the same names: its net's last tensor says which side is D.
    "FaceX-Zoo, ArcFace": ({"state_dict": under("backbone.") | {"head.weight": CENTERS.T}, "epoch": 1}, False, True),
    "FaceX-Zoo, ArcNegFace": ({"state_dict": under("backbone.") | {"head.weight": CENTERS}}, False, True),
    "FaceX-Zoo, AdaCos": ({"state_dict": {"head.W": CENTERS} | under("backbone.")}, False, True),
    "Face_Pytorch": ({"iters": 3, "net_state_dict": {"weight": CENTERS}}, False, False),
    "TFace": ({"TFR-ms1m": kernel()}, False, False),
    "CVLface": ({"partial_fc.weight": CENTERS}, False, False),
    "UniFace": ({"state_dict": NET | {"loss.weight": CENTERS, "loss.weight_mom": CENTERS}}, True, False),
    "opensphere": ({"model": {"backbone": NET, "head": {"w": CENTERS, "b": torch.zeros(1)}}}, False, True),
}


@pytest.mark.parametrize("name", FILES)
def test_centers(name: str, tmp_path: Path) -> None:
    content, momentum, _ = FILES[name]
    torch.save(content, tmp_path / "file.ckpt")
    found = other_projects.centers(tmp_path / "file.ckpt")
    assert torch.equal(found.weight, CENTERS) and found.momentum == momentum
    notes: list[str] = []
    written = convert.convert([tmp_path / "file.ckpt"], tmp_path / "centers.safetensors", noted=notes.append)
    against_the_name = name in ("FaceX-Zoo, ArcFace", "FaceX-Zoo, AdaCos")
    assert convert.read(written).num_classes == 7 and len(notes) == momentum + against_the_name


def test_centers_of_a_whole_model_in_safetensors(tmp_path: Path) -> None:
    """As save_pretrained of transformers writes it."""
    theirs = pytest.importorskip("safetensors.torch")
    theirs.save_file(under("backbone.") | {"head.weight": CENTERS}, tmp_path / "model.safetensors")
    convert.convert([tmp_path / "model.safetensors"], tmp_path / "centers.safetensors")
    assert torch.equal(theirs.load_file(tmp_path / "centers.safetensors")["weight"], CENTERS)
    turned = under("backbone.") | {"head.weight": CENTERS.T.contiguous(), "head.t": torch.ones(1)}
    theirs.save_file(turned, tmp_path / "model.safetensors")  # FaceX-Zoo's layout
    found = convert.read(tmp_path / "model.safetensors", embedding_dim=4)
    assert torch.equal(next(found.tensors["weight"].pieces()), CENTERS)
    assert found.notes == [f"{tmp_path / 'model.safetensors'}: the state of its margin is left out: t=1"]
    theirs.save_file(NET, tmp_path / "model.safetensors")
    with pytest.raises(convert.ConvertError, match=r"has no weight; it has conv1\.weight"):
        convert.read(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", [name for name, (*_, net) in FILES.items() if net])
def test_nets(name: str, tmp_path: Path) -> None:
    torch.save(FILES[name][0], tmp_path / "file.ckpt")
    state = read_state(tmp_path / "file.ckpt")
    assert state.keys() == NET.keys() and all(torch.equal(state[key], NET[key]) for key in NET)


def test_the_net_of_cvlface(tmp_path: Path) -> None:
    """Its net and its class centers are in two files."""
    torch.save(under("net."), tmp_path / "model.pt")
    assert read_state(tmp_path / "model.pt").keys() == NET.keys()


def test_nets_whose_own_names_look_alike(tmp_path: Path) -> None:
    """insightface's own backbone has fc and features; another net may have a part called model."""
    for state in (NET, *({f"{name}.weight": torch.ones(2), "neck.weight": torch.ones(3)} for name in ("model", "net"))):
        torch.save(state, tmp_path / "net.pt")
        assert read_state(tmp_path / "net.pt").keys() == state.keys()
    torch.save(NET, tmp_path / "backbone.pth")
    with pytest.raises(TensorFileError, match=r"must hold floating-point class centers: weight \(C, D\), W or kernel"):
        other_projects.centers(tmp_path / "backbone.pth")
    torch.save({"a.kernel": CENTERS.T, "b.kernel": CENTERS.T}, tmp_path / "two.pt")
    with pytest.raises(TensorFileError, match=r"must hold one set of class centers; it has a\.kernel, b\.kernel"):
        other_projects.centers(tmp_path / "two.pt")


def test_their_centers_continue_in_a_head(tmp_path: Path) -> None:
    torch.save(FILES["AdaFace"][0], tmp_path / "adaface.ckpt")
    head = fa.PartialFC(4, 7, margin=fa.AdaFace())
    head.load_full_weight(other_projects.centers(tmp_path / "adaface.ckpt").weight)
    assert torch.equal(head.weight, CENTERS)


def test_the_side_of_the_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """face.evoLVe saves MagFace as ``weight`` (D, C), ArcFace as ``weight`` (C, D). Nothing tells them apart."""
    source, target = tmp_path / "Head_MagFace.pth", tmp_path / "centers.safetensors"
    torch.save({"weight": CENTERS.T.contiguous()}, source)
    assert cli.run(["convert", str(source), str(target)]) == 0
    read = "weight (4, 7) is read as 4 centers of 7 numbers. If that is wrong, give --embedding-dim"
    assert read in capsys.readouterr().err.replace("\n", " ")
    assert cli.run(["convert", str(source), str(target), "--embedding-dim", "4"]) == 0
    shown = capsys.readouterr()
    assert not shown.err and "7 classes of 1 center" in shown.out
    assert torch.equal(next(convert.read(target).tensors["weight"].pieces()), CENTERS)
    with pytest.raises(convert.ConvertError, match="must have centers of embedding_dim=5; they have 7"):
        convert.convert([source], target, embedding_dim=5)
    head = fa.PartialFC(4, 7)
    load_centers(head, list("abcdefg"), source)  # train --centers knows D
    assert torch.equal(head.weight, CENTERS)


WIDE = torch.randn(7, 12, generator=DRAW)
DOUBTFUL: dict[str, tuple[Any, Tensor, str]] = {
    # What the file holds, its class centers by our best guess, and what is said of the guess.
    "square": ({"weight": CENTERS[:4]}, CENTERS[:4], "weight (4, 4) has two equal sides. Its rows are read as"),
    "square kernel": ({"kernel": CENTERS[:4]}, CENTERS[:4].T, "kernel (4, 4) has two equal sides. Its columns are"),
    "square beside a net": (
        under("backbone.") | {"head.weight": CENTERS[:4]},
        CENTERS[:4],
        "head.weight (4, 4) has two equal sides. Its rows are read as",
    ),
    "a net that does not end in D": (
        {"backbone.conv.weight": torch.ones(7, 3, 3, 3), "head.weight": WIDE},
        WIDE.T,
        "head.weight (7, 12) is read as 12 centers of 7 numbers. If that is wrong, give --embedding-dim",
    ),
    "fewer classes than D": ({"weight": WIDE}, WIDE, "weight (7, 12) is read as 7 centers of 12 numbers. If"),
    "a layer of the net": (
        under("backbone.") | {"backbone.attention.W": torch.ones(8, 9), "head.weight": CENTERS},
        torch.ones(9, 8),
        "backbone.attention.W is read as the class centers. head.weight is left out",
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_guess_is_said(name: str, tmp_path: Path) -> None:
    content, weight, said = DOUBTFUL[name]
    torch.save(content, tmp_path / "file.pt")
    found = other_projects.centers(tmp_path / "file.pt")
    assert torch.equal(found.weight, weight) and len(found.notes) == 1
    assert found.notes[0].startswith(f"{tmp_path / 'file.pt'}: {said}")
    if "embedding-dim" in said:
        known = other_projects.centers(tmp_path / "file.pt", embedding_dim=12)
        assert torch.equal(known.weight, WIDE) and known.notes == []


def test_a_net_beside_the_head(tmp_path: Path) -> None:
    """The state of the head is the one that has class centers, wherever the net's lies."""
    head = {"weight": CENTERS}
    for content in ({"model": NET, "head": head}, {"state_dict": NET, "head": head}, head | {"model": NET}):
        torch.save(content, tmp_path / "file.pt")
        assert torch.equal(other_projects.centers(tmp_path / "file.pt").weight, CENTERS)
    for net in ({"head.weight": WIDE}, {"weight": WIDE}):
        torch.save({"model": net, "head": head}, tmp_path / "file.pt")
        with pytest.raises(TensorFileError, match=r"must hold one set of class centers; it has .*weight, weight"):
            other_projects.centers(tmp_path / "file.pt")


def test_dtypes_that_no_head_has(tmp_path: Path) -> None:
    rule = "must have one of the dtypes float32, float64, bfloat16, float16.*; it is "
    torch.save({"weight": CENTERS.to(torch.float8_e4m3fn)}, tmp_path / "a.pt")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": CENTERS.to(torch.float8_e4m3fn)}, tmp_path / "b.safetensors")
    safetensors.save_file({"weight": CENTERS, "names": torch.ones(7).int()}, tmp_path / "c.safetensors")
    for file, got in (("a.pt", "float8_e4m3fn"), ("b.safetensors", "float8_e4m3fn"), ("c.safetensors", "int32")):
        with pytest.raises(convert.ConvertError, match=rule + got):
            convert.convert([tmp_path / file], tmp_path / "centers.safetensors")


def test_shards_of_tface_are_joined(tmp_path: Path) -> None:
    """Its PartialFC saves the tensor (D, rows) alone, under the name of the data."""
    shards = CENTERS[:4], CENTERS[4:]
    files = [tmp_path / f"HEAD_Epoch_3_Split_{rank}_checkpoint.pth" for rank in range(2)]
    for file, rows in zip(files, shards, strict=True):
        torch.save({"TFR-ms1m": {"kernel": rows.T.contiguous()}}, file)
    assert torch.equal(joined(files, tmp_path / "a.safetensors"), CENTERS)
    torch.save({"TFR-ms1m": CENTERS[4:].T.contiguous()}, files[1])
    with pytest.raises(convert.ConvertError, match="it has TFR-ms1m"):
        joined(files, tmp_path / "b.safetensors")
    assert torch.equal(joined(files, tmp_path / "b.safetensors", embedding_dim=4), CENTERS)


def joined(files: list[Path], target: Path, **options: int) -> Tensor:
    return torch.cat(list(convert.read(convert.convert(files, target, **options)).tensors["weight"].pieces()))


def test_the_state_of_a_margin_is_said(tmp_path: Path) -> None:
    theirs = kernel("head.") | {"head.t": torch.zeros(1), "head.batch_mean": torch.tensor([21.5])}
    ours = {f"head.{name}": each for name, each in fa.MarginHead(4, 7, margin=fa.AdaFace()).state_dict().items()}
    for state, values in ((theirs, "batch_mean=21.5"), (ours, "norm_mean=20, norm_std=100")):
        torch.save({"state_dict": under("model.") | state}, tmp_path / "adaface.ckpt")
        said = f"{tmp_path / 'adaface.ckpt'}: the state of its margin is left out: {values}"
        assert convert.read(tmp_path / "adaface.ckpt").notes == [said]
