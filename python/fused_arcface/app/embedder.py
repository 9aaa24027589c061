"""A trained net in use: images in, unit embeddings out.

``fa.load_embedder`` and the commands ``embed``, ``similarity``, ``export``, ``verify`` and ``identify`` call it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_arcface.base.extras import require
from fused_arcface.base.reading import DataError
from fused_arcface.base.suggest import missing_path

from .data.images import ImageSpec, fit_image, read_image
from .nets.backbones import build_backbone, own_spec
from .nets.weights import fit_state, read_state
from .thresholds import KeptThresholds, read_thresholds
from .training.runs import RunError, RunFolder, load_backbone


class Embedder(nn.Module):
    """A net with its preprocessing: images to embeddings of norm 1.

    Args:
        net: images ``(N, *spec.shape)`` fp32 in [-1, 1] to embeddings ``(N, D)``; put into evaluation mode.
        spec: the images that the net takes.
        thresholds: the thresholds of the net's last verification, if they were kept.

    >>> embedder = Embedder(nn.Flatten(), ImageSpec(size=2, channels=1))
    >>> embedder(np.full((5, 7), 255, np.uint8))
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """

    def __init__(self, net: nn.Module, spec: ImageSpec, thresholds: KeptThresholds | None = None) -> None:
        super().__init__()
        self.net, self.spec, self.thresholds = net, spec, thresholds
        self.eval()

    def forward(self, images: Any) -> Tensor:
        """Return embeddings ``(N, D)`` of norm 1, fp32, on the net's device.

        Args:
            images: one image, or a list, generator or other iterable of images, each of these kinds:

                - a path, or the bytes of an image file;
                - an image of Pillow, of any size and mode;
                - an array of uint8, ``(height, width)`` or ``(height, width, 1, 3 or 4)``, RGB, of any size; one with a
                  further axis in front is a batch;
                - a tensor of uint8, ``(1 or 3, height, width)``, of any size; with a further axis in front, a batch;
                - a floating-point tensor ``(channels, size, size)`` or ``(N, channels, size, size)`` in [-1, 1], the
                  net's own input. It is moved to the net's device and dtype.

        Raises:
            ImageError: if a file cannot be read as an image.
            TypeError, ValueError: if an image is of another kind, dtype or shape.
        """
        pixels = self.preprocess(images)
        return F.normalize(self.net(pixels).float())

    def preprocess(self, images: Any) -> Tensor:
        """Return images of the kinds that :meth:`forward` takes as the net's input ``(N, *spec.shape)``."""
        # A net without parameters gets fp32 on the CPU.
        place = next(self.net.parameters(), torch.empty(0))
        if isinstance(images, Tensor) and images.is_floating_point():
            return self._batch(images).to(place)
        parts = [self._read(image) for image in _as_list(images)]
        return (torch.stack(parts) if parts else torch.zeros(0, *self.spec.shape)).to(place)

    def _batch(self, images: Tensor) -> Tensor:
        """Check a floating-point tensor, and return it as a batch."""
        batch = images[None] if images.dim() == 3 else images
        if batch.dim() != 4 or tuple(batch.shape[1:]) != self.spec.shape:
            raise ValueError(f"images must be (N, {', '.join(map(str, self.spec.shape))}); got {tuple(images.shape)}")
        # Interpolation may overshoot 1 a little, so the limit is 2. A graph cannot hold the check.
        if not torch.compiler.is_compiling() and batch.numel() and (most := float(batch.detach().abs().max())) > 2:
            raise ValueError(f"images of a floating-point dtype must be in [-1, 1]; got values up to {most:g}")
        return batch

    def _read(self, image: Any) -> Tensor:
        if isinstance(image, (str, os.PathLike)):
            return read_image(Path(image), self.spec)
        if isinstance(image, bytes):
            return read_image(image, self.spec)
        if isinstance(image, Tensor):
            if image.is_floating_point():
                return self._batch(image)[0].float().cpu()
            image = np.ascontiguousarray(image.cpu().movedim(0, -1).numpy())
        if isinstance(image, np.ndarray):
            image = _of_array(image)
        pil = require("PIL.Image", "train")
        if not isinstance(image, pil.Image):
            raise TypeError(f"images must be paths, images of Pillow, arrays or tensors; got {type(image).__name__}")
        return fit_image(require("PIL.ImageOps", "train").exif_transpose(image), self.spec)


def _as_list(images: Any) -> Sequence[Any]:
    """Return one image, a batch or a sequence of images as a sequence of images."""
    if isinstance(images, (Tensor, np.ndarray)):
        return list(images) if images.ndim == 4 else [images]
    whole = isinstance(images, (str, bytes, os.PathLike, Mapping)) or not isinstance(images, Iterable)
    return [images] if whole else list(images)


def _of_array(image: np.ndarray[Any, Any]) -> Any:
    """Return an array of uint8 as an image of Pillow."""
    if image.dtype != np.uint8:
        raise TypeError(f"an image's array must be of dtype uint8, from 0 to 255; got {image.dtype}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))) or not image.size:
        raise ValueError(f"an image must be (height, width) or (height, width, 1, 3 or 4); got {image.shape}")
    return require("PIL.Image", "train").fromarray(image)


def load_embedder(
    source: str | os.PathLike[str],
    backbone: str | None = None,
    *,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    trust: bool = False,
) -> Embedder:
    """Load a trained net with its preprocessing.

    Args:
        source: a run's folder, whose newest checkpoint is taken; a file of a run, ``model.pt`` or ``best.pt``; or any
            file of a net's weights, such as insightface's ``backbone.pth``.
        backbone: the net's name, see ``fused-arcface train --help``; needed for a file that does not lie in a run's
            folder.
        device: device of the net.
        image_size: side in pixels of the images that a file's net takes; None: the net's own, 112 for insightface's.
        trust: run the code that a checkpoint of format 1 may hold. Give it only for files of people you trust.

    Returns:
        A module from paths, images of Pillow, arrays or tensors to embeddings ``(N, D)`` of norm 1; see
        :meth:`Embedder.forward`. Its parameters need no gradient; images may have one.

    Raises:
        RunError: if the folder is no run, or has no checkpoint yet.
        DataError: if the file cannot be read, or has the weights of another net.
        ValueError: if the backbone is unknown or not named, or the device cannot be used.

    >>> import tempfile; file = Path(tempfile.mkdtemp()) / "backbone.pth"
    >>> torch.save(build_backbone("small", 64, ImageSpec(size=16, channels=1)).state_dict(), file)
    >>> embedder = load_embedder(file, "small", image_size=16)
    >>> first, second = embedder([np.zeros((20, 30), np.uint8), np.ones((40, 40, 3), np.uint8)])
    >>> bool(-1.001 < first @ second < 1.001)  # the cosine
    True
    """
    path, thresholds = Path(source), None
    check_device(device)
    if not path.exists():
        raise RunError(missing_path(path))
    if backbone is None or path.is_dir():
        for name, value in (("backbone", backbone), ("image_size", image_size)):
            if value is not None:
                raise ValueError(
                    f"{name} is for files of weights; {path} is of a run, which knows its own; got {value!r}"
                )
    if path.is_dir():
        net, spec = load_backbone(path, device, trust=trust)
        thresholds = RunFolder(path).thresholds
    elif backbone is None:
        net, spec, thresholds = _of_run_file(path)
    else:
        net, spec = _of_weights(path, backbone, image_size)
    kept = None if thresholds is None else read_thresholds(thresholds)
    return Embedder(net.to(device), spec, kept).requires_grad_(False)


def check_device(device: torch.device | str) -> None:
    """Raise ValueError unless tensors can be made on a device."""
    try:
        torch.device(device)
    except RuntimeError:  # its text lists twenty devices
        raise ValueError(f"device must be cpu, cuda, cuda:N or another device of torch; got {device!r}") from None
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None


def _of_run_file(path: Path) -> tuple[nn.Module, ImageSpec, Path]:
    """Return a net with the weights in a run's file, its images, and the file of its thresholds."""
    folder = RunFolder(path.parent)
    if not folder.config.is_file():
        raise ValueError(
            f"{path} does not lie in a run's folder, so its net must be named: backbone must be one of the names in "
            "fused-arcface train --help, iresnet50 for example"
        )
    net, spec = folder.build_net()
    fit_state(net, read_state(path), path)
    return net, spec, folder.best_thresholds if path.name == folder.best.name else folder.thresholds


def _of_weights(path: Path, backbone: str, image_size: int | None) -> tuple[nn.Module, ImageSpec]:
    """Return a net with a file's weights, and its images: channels of the first convolution, the given or own size."""
    state, own = read_state(path), own_spec(backbone)
    if image_size is None and own is None:
        raise ValueError(f"backbone {backbone} takes images of any size: image_size must be given for {path}")
    channels = next((value.shape[1] for value in state.values() if value.dim() == 4), 3)
    if channels not in (1, 3):
        raise DataError(f"{path} has no weights of an image net: its first convolution takes {channels} channels")
    spec = ImageSpec(image_size or (own.size if own is not None else 0), channels)
    # All nets here end in batch normalization or a linear map, whose vectors have D elements.
    vectors = [value.numel() for value in state.values() if value.dim() == 1]
    if not vectors:
        raise DataError(f"{path} has no weights of this net: it has no vectors")
    net = build_backbone(backbone, vectors[-1], spec)
    fit_state(net, state, path)
    return net, spec
