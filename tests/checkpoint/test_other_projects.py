"""Class centers and nets in other projects' files: names and layouts as their training scripts write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_arcface as fa
from fused_arcface.app.nets.weights import read_state
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
}


@pytest.mark.parametrize("name", FILES)
def test_centers(name: str, tmp_path: Path) -> None:
    content, momentum, _ = FILES[name]
    torch.save(content, tmp_path / "file.ckpt")
    found, has_momentum = other_projects.centers(tmp_path / "file.ckpt")
    assert torch.equal(found, CENTERS) and has_momentum == momentum
    notes: list[str] = []
    written = convert.convert([tmp_path / "file.ckpt"], tmp_path / "centers.safetensors", noted=notes.append)
    assert convert.read(written).num_classes == 7 and len(notes) == momentum


def test_centers_of_a_whole_model_in_safetensors(tmp_path: Path) -> None:
    """As save_pretrained of transformers writes it."""
    theirs = pytest.importorskip("safetensors.torch")
    theirs.save_file(under("backbone.") | {"head.weight": CENTERS}, tmp_path / "model.safetensors")
    convert.convert([tmp_path / "model.safetensors"], tmp_path / "centers.safetensors")
    assert torch.equal(theirs.load_file(tmp_path / "centers.safetensors")["weight"], CENTERS)
    theirs.save_file(NET, tmp_path / "model.safetensors")
    with pytest.raises(convert.ConvertError, match=r"has no weight; it has conv1\.weight"):
        convert.read(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", [name for name, (*_, net) in FILES.items() if net])
def test_nets(name: str, tmp_path: Path) -> None:
    torch.save(FILES[name][0], tmp_path / "file.ckpt")
    state = read_state(tmp_path / "file.ckpt")
    assert state.keys() == NET.keys() and all(torch.equal(state[key], NET[key]) for key in NET)


def test_nets_whose_own_names_look_alike(tmp_path: Path) -> None:
    """insightface's own backbone has fc and features; another net may have a part called model."""
    for state in (NET, {"model.weight": torch.ones(2), "neck.weight": torch.ones(3)}):
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
    weight, _ = other_projects.centers(tmp_path / "adaface.ckpt")
    head = fa.PartialFC(4, 7, margin=fa.AdaFace())
    head.load_full_weight(weight)
    assert torch.equal(head.weight, CENTERS)
