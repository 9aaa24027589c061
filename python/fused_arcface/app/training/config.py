"""Options of a training run: each one once, with its default, its rule and its help.

The command line, TOML files and the run's folder take them from here.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fused_arcface import backends
from fused_arcface.base.extras import require
from fused_arcface.base.files import write_bytes
from fused_arcface.base.reading import DataError, file_errors, read_bytes
from fused_arcface.base.suggest import did_you_mean
from fused_arcface.base.text import decode, encode
from fused_arcface.margins.text import check_margin

from ..data import formats
from ..data.images import MAX_PIXELS
from ..nets.backbones import NAMES, check_backbone
from .augment import LEVELS
from .schedule import parse_rise

_MOST_BYTES = 1 << 16
"""Largest size of a TOML file of options."""
_MOST_DOTS = 100
"""Most dots in a line. The reader's time grows with the square of the parts of a key: 20,000 parts take 20 seconds."""


class OptionError(ValueError):
    """Raised at the start of a run if options do not fit each other, the data or the machine."""


@dataclass(frozen=True)
class Rule:
    """Type, range and purpose of an option."""

    group: str
    """Heading in the help."""
    help: str
    """Whole sentences with the meaning and the unit. The command line adds the default."""
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    """``least`` itself is not allowed."""
    below: bool = False
    """``most`` itself is not allowed."""
    choices: tuple[str, ...] = ()
    fixed: bool = False
    """A resumed run must keep the value: another one would make another net or other batches."""

    def check(self, name: str, value: Any, types: tuple[type, ...]) -> None:
        """Raise TypeError or ValueError unless ``value`` is of one of ``types`` and in range."""
        if value is None and type(None) in types:
            return
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            allowed = " or ".join(each.__name__ for each in types if each is not type(None))
            raise TypeError(f"{name} must be of type {allowed}; got {type(value).__name__}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{name} must be one of {', '.join(self.choices)}; got {value!r}")
        if isinstance(value, (int, float)):
            low = value > self.least if self.above else value >= self.least
            high = value < self.most if self.below else value <= self.most
            if not (low and high and value < math.inf):
                raise ValueError(f"{name} must be {self._range()}; got {value}")

    def _range(self) -> str:
        low = f"{'>' if self.above else '>='} {self.least:g}"
        return low if self.most == math.inf else f"{low} and {'<' if self.below else '<='} {self.most:g}"


def _option(group: str, default: Any, help: str, **rule: Any) -> Any:
    return dataclasses.field(default=default, metadata={"rule": Rule(group, help, **rule)})


# One function for each group of options, in the order of the help.
_data, _net, _tuning = (partial(_option, group) for group in ("Data", "Net", "Fine-tuning"))
_head, _optimization, _run = (partial(_option, group) for group in ("Head", "Optimization", "Verification and run"))


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; those that are None are chosen when the run starts.

    Raises:
        TypeError, ValueError: if an option has a wrong type or is out of its range.
        MissingExtra: if the backbone is timm's and timm is not installed.

    >>> TrainConfig(data="identities", batch_size=0)
    Traceback (most recent call last):
    ...
    ValueError: batch_size must be >= 2; got 0
    """

    data: str = _data("", f"Images to train on: {formats.listed()}. Required.")
    bad_data: str = _data(
        "skip",
        "With skip, an unreadable image, a bad record, an empty class or a gap is reported and left out. With stop, it "
        "ends the run.",
        choices=("skip", "stop"),
    )
    image_size: int | None = _data(
        None,
        "Side of the images in pixels. Default: the net's own size, otherwise the median of the data, from 32 to 112.",
        least=1,
        most=4096,
        fixed=True,
    )
    channels: int | None = _data(
        None,
        "1 for gray images, 3 for color. Default: the net's own number, otherwise 3 if a sampled image has color.",
        least=1,
        most=3,
        fixed=True,
    )
    flip: bool = _data(True, "Mirror half of the images, chosen at random in each epoch.", fixed=True)
    augment: str = _data(
        "none",
        "Random changes of the images. With light: small shifts, rotations, zooms and changes of brightness and "
        "contrast. With strong: larger ones; some images also get a low resolution, no color or an erased part.",
        choices=LEVELS,
        fixed=True,
    )
    balanced: bool = _data(
        False,
        "Draw all identities equally often, however many images each one has. The number of steps stays the same.",
        fixed=True,
    )
    max_pixels: int = _data(
        MAX_PIXELS, "Largest image that is decoded, in pixels; larger ones count as unreadable.", least=1
    )
    workers: int = _data(2, "Processes that read images on each rank; 0 reads in the training process.", least=0)

    backbone: str = _net("small", f"The embedding net: one of {', '.join(NAMES)}.", fixed=True)
    embedding_dim: int | None = _net(
        None,
        "Dimension of the embeddings. Default: 128 for the small net, otherwise 512.",
        least=1,
        most=16384,
        fixed=True,
    )
    precision: str = _net(
        "fp32",
        "Number format of the net under autocast; fp16 comes with a gradient scaler.",
        choices=("fp32", "bf16", "fp16"),
        fixed=True,
    )

    init: str = _tuning(
        "",
        "Weights that the net starts from: a run, its model.pt or best.pt, or a file such as insightface's "
        "backbone.pth. Prefixes such as module. and backbone. are removed.",
    )
    init_partial: bool = _tuning(
        False,
        "Take what fits of the file of --init, and say what does not: tensors that it lacks, or that have another "
        "shape, begin with new weights. Otherwise these are an error.",
    )
    centers: str = _tuning(
        "",
        "Class centers to start from: a run, a checkpoint or a file of centers. Identities are matched by name, or by "
        "order where the source has no classes.txt. New identities get random centers.",
    )
    freeze: str = _tuning(
        "",
        "Part that is not trained: backbone, so that only the class centers are, or backbone:E for the first E epochs.",
    )

    margin: str = _head(
        "ArcFace(0.5)", "The margin: a class of fused_arcface with its arguments, or MODULE:NAME for your own."
    )
    scale: float | None = _head(
        None,
        "Scale of the logits. Default: 16 for fewer than 1,000 identities, 32 for fewer than 10,000, otherwise 64.",
        least=0,
        above=True,
    )
    margin_schedule: str = _head(
        "",
        "Rise of the margin: exponential:20-40 or linear:20-40 begins without a margin, lets it rise from the start of "
        "epoch 20 and has all of it from the start of epoch 40; exponential:20-40:0.5 begins with half of it.",
    )
    scale_schedule: str = _head(
        "", "Rise of the scale, in the same form: linear:1-10:0.25 begins with a quarter of it."
    )
    sub_centers: int = _head(1, "Centers of each class; an image is compared with the nearest.", least=1, fixed=True)
    label_smoothing: float = _head(
        0.0,
        "Share of the target, from 0 to 1, that is spread over all classes. Needs --center-optimizer joint.",
        least=0,
        most=1,
    )
    sample_rate: float = _head(
        1.0, "Fraction of the classes that a step uses, above 0 and at most 1.", least=0, above=True, most=1
    )
    center_storage: str = _head(
        "device",
        "Place of the class centers and their momentum: device, host (host memory, of which the device gets each "
        "step's sample), or the folder of a file. The last two need --sample-rate below 1 and the fused optimizer.",
    )
    backend: str = _head(
        "auto", "Backend of the head: auto, torch, cpu, triton or cuda; fused-arcface doctor lists them."
    )

    epochs: int = _optimization(20, "Passes over the images.", least=1)
    batch_size: int = _optimization(128, "Images of a step, over all ranks and micro-batches.", least=2, fixed=True)
    accumulation: int = _optimization(
        1,
        "Number of micro-batches that each rank splits its part of a batch into. More of them need less memory.",
        least=1,
    )
    optimizer: str = _optimization("sgd", "Optimizer of the backbone.", choices=("sgd", "adamw"), fixed=True)
    center_optimizer: str = _optimization(
        "fused",
        "Optimizer of the class centers: fused is CenterSGD inside the backward pass, joint is the backbone's.",
        choices=("fused", "joint"),
        fixed=True,
    )
    lr: float | None = _optimization(
        None, "Highest learning rate of the backbone. Default: 0.1 with sgd, 0.001 with adamw.", least=0
    )
    center_lr: float = _optimization(0.1, "Highest learning rate of CenterSGD.", least=0)
    momentum: float = _optimization(
        0.9, "Momentum of SGD and of CenterSGD, at least 0 and below 1.", least=0, most=1, below=True
    )
    weight_decay: float = _optimization(5e-4, "Weight decay of all optimizers.", least=0)
    clip_norm: float = _optimization(
        5.0, "Largest norm of the backbone's gradient; larger ones are scaled down. 0 for no limit.", least=0
    )
    schedule: str = _optimization(
        "cosine", "Decay of the learning rates after the warm-up.", choices=("cosine", "polynomial", "constant")
    )
    power: float = _optimization(2.0, "Exponent of the polynomial schedule.", least=0, above=True)
    warm_up: float = _optimization(
        0.1, "Share of all steps, from 0 to 1, in which the learning rates rise.", least=0, most=1
    )

    verify_data: str = _run(
        "",
        f"Data for verification: {formats.listed(pairs=True)}; or labeled images. Its people must not be in --data. "
        "Default: none; for generated data, identities that are not trained on.",
    )
    verify_every: int = _run(1, "Number of epochs between verifications. The last epoch always has one.", least=1)
    save_every: int = _run(
        0, "Number of steps between checkpoints. Each epoch ends with one; 0 saves only those.", least=0
    )
    keep: int = _run(2, "Number of newest checkpoints to keep.", least=1)
    keep_best: bool = _run(
        True,
        "Keep the checkpoint with the highest verification accuracy too, with its class centers, in RUN/best. Not for "
        "centers in a file, which keeps only their states at the newest checkpoints.",
    )
    seed: int = _run(0, "Seed of the weights, class centers, batches and samples.", least=0, most=2**63 - 1, fixed=True)
    device: str = _run("auto", "Device to train on: cpu, cuda, cuda:N, or auto for a GPU if there is one.")

    def __post_init__(self) -> None:
        for name, (rule, types) in rules().items():
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) >= 2**64:
                raise ValueError(f"{name} must be a number of 64 bits; got one of {value.bit_length()}")
            if float in types and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)  # TOML may have 64 for 64.0
                object.__setattr__(self, name, value)
            rule.check(name, value, types)
        if self.channels == 2:
            raise ValueError("channels must be 1 or 3; got 2")
        backends.check_name(self.backend)
        check_backbone(self.backbone)
        check_margin(self.margin)
        for name in ("margin_schedule", "scale_schedule"):
            text = getattr(self, name)
            try:
                start = parse_rise(text).start if text else 1.0
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
            if name == "scale_schedule" and start == 0:
                raise ValueError(f"scale_schedule must begin above 0, as linear:1-10:0.25 does; got {text!r}")
        _ = self.frozen_epochs  # raises if freeze has another form

    @property
    def frozen_epochs(self) -> int:
        """Epochs at the start in which the backbone is frozen; ValueError if ``freeze`` has a wrong form."""
        if not self.freeze:
            return 0
        found = re.fullmatch("backbone(?::([1-9][0-9]{0,8}))?", self.freeze)
        if found is None:
            raise ValueError(f"freeze must be backbone or backbone:EPOCHS, EPOCHS from 1 on; got {self.freeze!r}")
        return int(found[1] or self.epochs)

    @property
    def keeps_best_run(self) -> bool:
        """True if the checkpoint of the best verification is kept. A file of centers cannot go back to its state."""
        return self.keep_best and self.center_storage in ("device", "host")

    def replace(self, changes: Mapping[str, Any]) -> TrainConfig:
        """Return this configuration with other values; TypeError or ValueError if a name or a value is wrong."""
        for name in changes:
            if name not in rules():
                hint = did_you_mean(name, rules()) or f"; there are {', '.join(rules())}"
                raise ValueError(f"no option is called {name}{hint}")
        return dataclasses.replace(self, **changes)

    def save(self, path: Path) -> None:
        """Write the options as TOML, without those that are None, below a line with their checksum."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        text = encode(require("tomli_w", "train").dumps(values))
        write_bytes(path, _CHECKSUM % zlib.crc32(text) + text)


_CHECKSUM = b"# checksum %08x of the lines below; delete this line if you edit them\n"


def rules() -> dict[str, tuple[Rule, tuple[type, ...]]]:
    """Return rule and types of each option, in order."""
    hints = get_type_hints(TrainConfig)
    return {
        each.name: (each.metadata["rule"], get_args(hints[each.name]) or (hints[each.name],))
        for each in dataclasses.fields(TrainConfig)
    }


def read_options(path: Path) -> dict[str, Any]:
    """Return the options that a TOML file sets; hand them to :meth:`TrainConfig.replace`.

    Raises:
        OptionError: if the file cannot be read, is not TOML, or does not match a checksum in its first line.
    """
    # Python 3.10 has no tomllib; tomli is the same code as a package.
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "train")
    try:
        text = read_bytes(path, _MOST_BYTES)
        first, _, below = text.partition(b"\n")
        if first.startswith(_CHECKSUM[:11]) and first + b"\n" != _CHECKSUM % zlib.crc32(below):
            raise DataError(
                f"{path} does not match its checksum: it was edited, or is damaged. If you edited it, delete its first "
                "line"
            )
        if any(line.count(b".") > _MOST_DOTS for line in text.splitlines()):
            raise DataError(f"{path} must have <= {_MOST_DOTS} dots on a line")
        with file_errors(path):
            options: dict[str, Any] = toml.loads(decode(text))
            return options
    except DataError as error:
        raise OptionError(str(error)) from None
