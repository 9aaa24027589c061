"""Embedding nets by name."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fused_arcface.app.data import ImageSpec
from fused_arcface.app.nets.backbones import build_backbone, own_embedding_dim, own_spec
from fused_arcface.app.nets.iresnet import IResNet
from fused_arcface.base.extras import MissingExtra


def insightface_keys(blocks: tuple[int, ...]) -> set[str]:
    """Names in insightface's ``backbone.pth``, from its ``iresnet.py``."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {"conv1.weight", "prelu.weight", "fc.weight", "fc.bias"}
    keys |= {f"{name}.{each}" for name in ("bn1", "bn2", "features") for each in norm}
    for layer, count in enumerate(blocks, start=1):
        for place in range(count):
            block = f"layer{layer}.{place}"
            keys |= {f"{block}.{name}.weight" for name in ("conv1", "conv2", "prelu")}
            keys |= {f"{block}.{name}.{each}" for name in ("bn1", "bn2", "bn3") for each in norm}
        keys |= {f"layer{layer}.0.downsample.0.weight", *(f"layer{layer}.0.downsample.1.{each}" for each in norm)}
    return keys


@pytest.mark.parametrize(
    ("depth", "blocks", "parameters"),
    # Numbers of parameters as insightface's model zoo has them, in millions.
    [(18, (2, 2, 2, 2), 24.03), (50, (3, 4, 14, 3), 43.59), (100, (3, 13, 30, 3), 65.16)],
)
def test_iresnet_has_insightfaces_parameters(depth: int, blocks: tuple[int, ...], parameters: float) -> None:
    with torch.device("meta"):
        net = IResNet(depth)
    assert set(net.state_dict()) == insightface_keys(blocks)
    assert round(sum(each.numel() for each in net.parameters()) / 1e6, 2) == parameters
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["fc.weight"] == (512, 25088) and shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["layer3.0.conv2.weight"] == (256, 256, 3, 3) and shapes["layer3.0.downsample.0.weight"] == (
        256,
        128,
        1,
        1,
    )
    assert not net.features.weight.requires_grad


def test_iresnet_computes_what_its_description_says() -> None:
    """One block, step by step with functions."""
    net = IResNet(18, embedding_dim=4, size=32, channels=1).eval()
    for module in net.modules():  # statistics that are not 0 and 1
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    block, x = net.layer2[0], torch.randn(2, 64, 8, 8)

    def norm(x: torch.Tensor, bn: nn.Module) -> torch.Tensor:
        return nn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5)

    y = nn.functional.conv2d(norm(x, block.bn1), block.conv1.weight, padding=1)
    y = nn.functional.prelu(norm(y, block.bn2), block.prelu.weight)
    y = norm(nn.functional.conv2d(y, block.conv2.weight, stride=2, padding=1), block.bn3)
    shortcut = norm(nn.functional.conv2d(x, block.downsample[0].weight, stride=2), block.downsample[1])
    assert torch.allclose(block(x), y + shortcut, atol=1e-5)
    assert net(torch.randn(3, 1, 32, 32)).shape == (3, 4)


@pytest.mark.parametrize("size", [1, 20, 33])
def test_nets_take_any_size(size: int) -> None:
    for name in ("small", "iresnet18"):
        net = build_backbone(name, 8, ImageSpec(size, 3)).eval()
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 8)


def test_names() -> None:
    with pytest.raises(ValueError, match=r"backbone must be one of small, iresnet18, .*timm:NAME; got 'resnet'"):
        build_backbone("resnet", 8, ImageSpec(8, 1))
    assert own_spec("small") is None and own_spec("iresnet50") == ImageSpec(112, 3)
    assert own_embedding_dim("small") == 128 and own_embedding_dim("iresnet50") == 512


def test_timm_is_asked_for_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: timm needs torchvision, which the tests do without."""
    calls: list[tuple[str, dict]] = []

    def create_model(name: str, **options: object) -> nn.Module:
        calls.append((name, options))
        return nn.Identity()

    config = SimpleNamespace(to_dict=lambda: {"input_size": (3, 96, 96), "fixed_input_size": True})
    models = SimpleNamespace(get_pretrained_cfg=lambda name: config)
    timm = SimpleNamespace(
        is_model=lambda name: name == "vit", create_model=create_model, __version__="9", models=models
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    assert own_spec("timm:vit") == ImageSpec(96, 3)
    build_backbone("timm:vit", 8, ImageSpec(64, 1))
    assert calls == [("vit", {"pretrained": False, "num_classes": 8, "in_chans": 1, "img_size": 64})]
    with pytest.raises(ValueError, match="backbone must be a model of timm 9; got 'timm:none'"):
        build_backbone("timm:none", 8, ImageSpec(8, 1))


def test_timm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r'pip install "fused_arcface\[timm\]"'):
        build_backbone("timm:vit", 8, ImageSpec(8, 1))
