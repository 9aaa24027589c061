"""Embedding nets by name: the small one, IResNet, MobileFaceNet, vision transformers, and timm's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fused_arcface.base.extras import require
from fused_arcface.base.suggest import did_you_mean

from ..data.images import ImageSpec
from . import mobilefacenet, vit
from .iresnet import LAYERS, IResNet
from .small import SmallNet

_TIMM = "timm:"
_NETS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "small": lambda embedding_dim, size, channels: SmallNet(embedding_dim, channels),
    **{f"iresnet{depth}": partial(IResNet, depth) for depth in LAYERS},
    **{name: partial(mobilefacenet.MobileFaceNet, name) for name in mobilefacenet.SIZES},
    **{name: partial(vit.VisionTransformer, name) for name in vit.SIZES},
}
"""How a net is made of D, the side of the images and their number of channels."""
NAMES = (*_NETS, f"{_TIMM}NAME")


def check_backbone(name: str) -> None:
    """Raise ValueError unless ``name`` is one of :data:`NAMES`, or MissingExtra if timm is needed and not installed."""
    if name.startswith(_TIMM):
        known = require("timm", "timm")
        if not known.is_model(name.removeprefix(_TIMM)):
            raise ValueError(f"backbone must be a model of timm {known.__version__}; got {name!r}")
    elif name not in _NETS:
        raise ValueError(f"backbone must be one of {', '.join(NAMES)}; got {name!r}{did_you_mean(name, NAMES)}")


def build_backbone(name: str, embedding_dim: int, spec: ImageSpec) -> nn.Module:
    """Return a new net from images ``(N, *spec.shape)`` to embeddings ``(N, embedding_dim)``.

    Raises:
        ValueError, MissingExtra: see :func:`check_backbone`.

    >>> import torch
    >>> build_backbone("small", 64, ImageSpec(size=32, channels=1))(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 64])
    """
    check_backbone(name)
    if name.startswith(_TIMM):
        timm_name = name.removeprefix(_TIMM)
        # Nets of patches are made for one size of image, convolutional ones take any and do not know the argument.
        size = {"img_size": spec.size} if _timm_config(timm_name).get("fixed_input_size") else {}
        return require("timm", "timm").create_model(
            timm_name, pretrained=False, num_classes=embedding_dim, in_chans=spec.channels, **size
        )
    return _NETS[name](embedding_dim, spec.size, spec.channels)


def own_spec(name: str) -> ImageSpec | None:
    """Return the images that a net was designed for; None if it takes any."""
    if name.startswith(_TIMM):
        channels, size, _ = _timm_config(name.removeprefix(_TIMM)).get("input_size", (3, 224, 224))
        return ImageSpec(size, channels)
    return None if name == "small" else ImageSpec(size=112, channels=3)


def own_embedding_dim(name: str) -> int:
    """Return the D that suits a net: 512 as in the papers, less for the small one."""
    return 128 if name == "small" else 512


def _timm_config(name: str) -> dict[str, Any]:
    return require("timm.models", "timm").get_pretrained_cfg(name).to_dict()
