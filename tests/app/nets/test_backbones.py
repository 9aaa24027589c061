"""Embedding nets by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.net_files import load_weights
from torch import nn

from fused_arcface.app.data import ImageSpec
from fused_arcface.app.nets.backbones import build_backbone, own_embedding_dim, own_spec
from fused_arcface.app.nets.iresnet import IResNet
from fused_arcface.app.nets.weights import Misfit
from fused_arcface.base.extras import MissingExtra
from fused_arcface.base.reading import DataError


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


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "shapes"),
    # Numbers and shapes of insightface's own modules, built from its mobilefacenet.py and vit.py.
    [
        ("mbf", 2059520, 333, {"layers.1.layers.0.weight": (128, 2, 3, 3), "features.layers.2.weight": (512, 512)}),
        (
            "mbf_large",
            6314880,
            606,
            {
                "layers.1.layers.1.layers.2.layers.0.weight": (256, 128, 1, 1),
                "features.layers.0.layers.0.weight": (512, 1, 7, 7),
            },
        ),
        (
            "vit_t",
            19137792,
            150,
            {"pos_embed": (1, 144, 256), "mask_token": (1, 1, 256), "feature.0.weight": (256, 36864)},
        ),
        (
            "vit_b",
            113833472,
            282,
            {
                "blocks.23.attn.qkv.weight": (1536, 512),
                "blocks.0.mlp.fc1.bias": (2048,),
                "feature.2.weight": (512, 512),
            },
        ),
    ],
)
def test_mbf_and_vit_have_insightfaces_parameters(name: str, parameters: int, tensors: int, shapes: dict) -> None:
    with torch.device("meta"):
        net = build_backbone(name, 512, ImageSpec(112, 3))
    state = net.state_dict()
    assert sum(each.numel() for each in net.parameters()) == parameters and len(state) == tensors
    assert {each: tuple(state[each].shape) for each in shapes} == shapes


def test_a_vision_transformer_leaves_patches_out_in_training_alone() -> None:
    """With nothing between the patches and the end, each place has its own patch or the token of a masked one."""
    net = build_backbone("vit_t", 8, ImageSpec(90, 3))
    net.blocks, net.norm, net.feature = nn.ModuleList(), nn.Identity(), nn.Identity()
    images = torch.randn(3, 3, 90, 90)
    whole = net.eval()(images).unflatten(1, (100, 256))
    expected = net.patch_embed.proj(images).flatten(2).transpose(1, 2) + net.pos_embed
    assert torch.equal(whole, expected)
    masked = net.train()(images).unflatten(1, (100, 256))
    own, token = (masked == expected).all(2), (masked == net.mask_token).all(2)
    assert (own ^ token).all() and token.sum(1).tolist() == [10, 10, 10] and (token[0] != token[1]).any()


def test_weights_are_found_under_the_names_of_training_loops(tmp_path: Path) -> None:
    net = build_backbone("small", 8, ImageSpec(16, 1))
    state = net.state_dict()

    def saved(value: object) -> Path:
        torch.save(value, tmp_path / "net.pt")
        return tmp_path / "net.pt"

    for value in (
        {f"module.{name}": tensor for name, tensor in state.items()},
        {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
        {"state_dict_backbone": state, "state_optimizer": {"state": {}}},
        # A Lightning module: the net beside a head, whose weights are left out.
        {"state_dict": {**{f"backbone.{name}": each for name, each in state.items()}, "head.weight": torch.ones(3, 8)}},
    ):
        other = build_backbone("small", 8, ImageSpec(16, 1))
        assert load_weights(other, saved(value)) == []
        assert all(torch.equal(other.state_dict()[name], state[name]) for name in state)
    (note,) = load_weights(net, saved({**state, "extra.weight": torch.ones(1)}))
    assert note.endswith(
        f"1 of its {len(state) + 1} tensors are not used, because the net has none of that name: extra.weight"
    )
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    few = {name: torch.zeros_like(tensor) for name, tensor in state.items() if "projection.1" not in name}
    with pytest.raises(DataError, match=r"has no weights of this net: projection\.1\.weight is missing$"):
        load_weights(net, saved(few))
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)
    with pytest.raises(DataError, match="it must hold tensors by name"):
        load_weights(net, saved([1.0]))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "backbone.", "module.backbone._orig_mod."])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_every_prefix_is_removed(prefix: str, container: str | None, tmp_path: Path) -> None:
    state = build_backbone("small", 8, ImageSpec(16, 1)).state_dict()
    value = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({container: value, "epoch": 3} if container else value, tmp_path / "net.pt")
    net = build_backbone("small", 8, ImageSpec(16, 1))
    assert load_weights(net, tmp_path / "net.pt") == []
    assert all(torch.equal(net.state_dict()[name], state[name]) for name in state)


def test_what_fits_is_taken_where_the_user_allows_it(tmp_path: Path) -> None:
    """Another embedding dimension, a layer that is missing and one that is too much."""
    source = build_backbone("small", 16, ImageSpec(16, 1)).state_dict()
    gone = next(iter(source))
    torch.save(
        {**{f"module.{n}": t for n, t in source.items() if n != gone}, "module.old": torch.ones(2)}, tmp_path / "x"
    )
    net = build_backbone("small", 8, ImageSpec(16, 1))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    other = {name for name in before if source[name].shape != before[name].shape} | {gone}
    with pytest.raises(Misfit, match=re.escape(f"{gone} is missing; ")):
        load_weights(net, tmp_path / "x")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    (note,) = load_weights(net, tmp_path / "x", partial=True)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name] if name in other else source[name]), name
    assert note.startswith(
        f"{tmp_path / 'x'}: {len(before) - len(other)} of the net's {len(before)} tensors are taken from it, "
        f"the others begin with new weights: {gone} is missing; "
    )
    assert len(other) == 6 and note.count(" must be ") == 4 and " and 1 more. " in note
    assert note.endswith(f". 1 of its {len(source)} tensors are not used, because the net has none of that name: old")
    torch.save({"other": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(DataError, match="has no weights of this net") as caught:
        load_weights(net, tmp_path / "x", partial=True)
    assert not isinstance(caught.value, Misfit)
