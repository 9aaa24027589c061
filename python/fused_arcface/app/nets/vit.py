"""Vision transformers for faces (Dosovitskiy et al., arXiv:2010.11929).

Sizes and names of parameters are those of insightface's ``vit_*``, so their ``backbone.pth`` loads. All patches
together give the embedding; there is no class token. In training a share of the patches may be left out and replaced by
one learned token at the end (as He et al. mask, arXiv:2111.06377).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PATCH = 9
_HEADS = 8
_EPS = 2e-5


class ViTSize(NamedTuple):
    """Figures of one net."""

    width: int
    depth: int
    drop_path: float
    """Share of the images for which the last block is left out in training; it grows linearly from 0."""
    masked: float
    """Share of the patches left out in training."""


SIZES = {
    "vit_t": ViTSize(256, 12, 0.1, 0.1),
    "vit_t_dp005_mask0": ViTSize(256, 12, 0.05, 0.0),
    "vit_s": ViTSize(512, 12, 0.1, 0.1),
    "vit_s_dp005_mask_0": ViTSize(512, 12, 0.05, 0.0),
    "vit_b": ViTSize(512, 24, 0.1, 0.1),
    "vit_b_dp005_mask_005": ViTSize(512, 24, 0.05, 0.05),
    "vit_l_dp005_mask_005": ViTSize(768, 24, 0.05, 0.05),
    "vit_h": ViTSize(1024, 48, 0.1, 0.0),
}
"""Figures by insightface's names."""


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.ReLU6(), fc2=nn.Linear(4 * width, width))
        )
        self._drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        """Leave the branch out for some images of the batch, in training."""
        if not self.training or self._drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self._drop_path
        return branch * kept / (1 - self._drop_path)


class VisionTransformer(nn.Module):
    """Images ``(N, channels, size, size)`` to embeddings ``(N, D)``, not normalized.

    Args:
        name: key of :data:`SIZES`.
        embedding_dim: D, the length of an embedding.
        size: side of the images in pixels, >= 9; insightface's nets have 112.
        channels: number of channels of the images.

    Raises:
        ValueError: if an image is smaller than a patch.

    >>> VisionTransformer("vit_t", 8, size=18).eval()(torch.zeros(2, 3, 18, 18)).shape
    torch.Size([2, 8])
    """

    def __init__(self, name: str, embedding_dim: int = 512, size: int = 112, channels: int = 3) -> None:
        super().__init__()
        if size < _PATCH:
            raise ValueError(f"size must be >= {_PATCH}, a patch of {name}; got {size}")
        width, depth, drop_path, self._masked = SIZES[name]
        patches = (size // _PATCH) ** 2
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, width, _PATCH, _PATCH)))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(_Block(width, drop_path * place / (depth - 1)) for place in range(depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * patches, width, bias=False),
            nn.BatchNorm1d(width, eps=_EPS),
            nn.Linear(width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, eps=_EPS),
        )
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        order: Tensor | None = None
        if self.training and self._masked > 0:
            order = torch.rand(x.shape[:2], device=x.device).argsort(1)
            kept = order[:, : int(x.shape[1] * (1 - self._masked))]
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.float())
        if order is not None:
            masked = self.mask_token.expand(len(x), order.shape[1] - x.shape[1], -1)
            x = torch.cat([x, masked.to(x.dtype)], 1)
            x = x.gather(1, order.argsort(1)[..., None].expand_as(x))  # each patch back in its place
        return self.feature(x.flatten(1))
