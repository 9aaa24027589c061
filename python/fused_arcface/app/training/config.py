"""What a training run is: every option once, with its default, its rule and its help. The command line, TOML files and
the run's folder all take them from here."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fused_arcface import backends
from fused_arcface.base.extras import require
from fused_arcface.base.files import write_bytes
from fused_arcface.base.reading import DataError, file_errors, read_bytes
from fused_arcface.base.text import decode, encode
from fused_arcface.margins.text import check_margin

from ..data.images import MAX_PIXELS
from ..nets.backbones import NAMES, check_backbone

_MOST_BYTES = 1 << 16
"""Of a TOML file of options."""
_MOST_DOTS = 100
"""The time of Python's reader grows with the square of the parts of a key: 20,000 of them take 20 seconds."""


class OptionError(ValueError):
    """Options that do not fit each other, the data or the machine; found when a run starts."""


@dataclass(frozen=True)
class Rule:
    """What an option must be, and what it is for."""

    help: str
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    """``least`` itself is not allowed."""
    below: bool = False
    """``most`` itself is not allowed."""
    choices: tuple[str, ...] = ()
    fixed: bool = False
    """A run that is resumed keeps it: another value would make another net, or other batches."""

    def check(self, name: str, value: Any, types: tuple[type, ...]) -> None:
        """Raises unless ``value`` is of one of ``types`` and in range.

        Raises:
            TypeError, ValueError: with name, rule and what was received.
        """
        if value is None and type(None) in types:
            return
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            rule = " or ".join(each.__name__ for each in types if each is not type(None))
            raise TypeError(f"{name} must be of type {rule}; got {type(value).__name__}")
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


def _option(default: Any, help: str, **rule: Any) -> Any:
    return dataclasses.field(default=default, metadata={"rule": Rule(help, **rule)})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; None is chosen by the data, the net or the machine when the run starts.

    Raises:
        TypeError, ValueError: an option of a wrong type or out of its range, named, with what was received.
        MissingExtra: a backbone of timm without timm.

    >>> TrainConfig(data="identities", batch_size=0)
    Traceback (most recent call last):
    ...
    ValueError: batch_size must be >= 2; got 0
    """

    data: str = _option("", "Folder of one folder an identity; .rec file or its folder; identities[:IDSxIMAGES].")
    epochs: int = _option(20, "Passes over the images.", least=1)
    bad_data: str = _option(
        "skip",
        "What happens at an unreadable image, a bad record, an empty class or a gap: skip reports it and goes on, stop "
        "ends with it.",
        choices=("skip", "stop"),
    )
    verify_data: str = _option("", "1:1 verification: a .bin set, file of pairs or labeled images, of other people.")
    verify_every: int = _option(1, "Epochs from one verification to the next; the last epoch has one.", least=1)
    image_size: int | None = _option(None, "Side in pixels; the net's own or the images'.", least=1, fixed=True)
    channels: int | None = _option(None, "1 or 3; the net's own or the images'.", least=1, most=3, fixed=True)
    flip: bool = _option(True, "Mirror every other image, drawn anew each epoch.", fixed=True)
    max_pixels: int = _option(MAX_PIXELS, "Pixels of the largest image that is decoded; others are bad.", least=1)
    workers: int = _option(2, "Processes that read images; 0 for none.", least=0)

    backbone: str = _option("small", f"One of {', '.join(NAMES)}.", fixed=True)
    embedding_dim: int | None = _option(None, "D; 128 for the small net, else 512.", least=1, fixed=True)

    init: str = _option("", "Weights to start from: a run's model.pt, or insightface's backbone.pth.")

    margin: str = _option("ArcFace(0.5)", "A margin of fused_arcface with its arguments, or MODULE:NAME.")
    scale: float | None = _option(
        None, "Of the logits; 16 below 1000 identities, 32 below 10 000, 64 from there.", least=0, above=True
    )
    sub_centers: int = _option(1, "Centers of each class, the nearest of which counts.", least=1, fixed=True)
    label_smoothing: float = _option(
        0.0, "Share of the target that all classes get; needs joint class centers.", least=0, most=1
    )
    sample_rate: float = _option(1.0, "Fraction of the classes in a step.", least=0, above=True, most=1)
    backend: str = _option("auto", "Of the head: auto, torch, cpu, triton or cuda.")

    batch_size: int = _option(128, "Images of a step, over all ranks and micro-batches.", least=2, fixed=True)
    accumulation: int = _option(1, "Micro-batches that each rank's share of a batch is cut into.", least=1)
    optimizer: str = _option("sgd", "Of the backbone: sgd or adamw.", choices=("sgd", "adamw"), fixed=True)
    center_optimizer: str = _option(
        "fused",
        "fused: the class centers by CenterSGD inside the backward pass; joint: by the backbone's optimizer.",
        choices=("fused", "joint"),
        fixed=True,
    )
    lr: float | None = _option(None, "Greatest learning rate; 0.1 with sgd, 0.001 with adamw.", least=0)
    center_lr: float = _option(0.1, "Greatest learning rate of CenterSGD.", least=0)
    momentum: float = _option(0.9, "Of SGD and CenterSGD.", least=0, most=1, below=True)
    weight_decay: float = _option(5e-4, "Of all optimizers.", least=0)
    clip_norm: float = _option(5.0, "Greatest norm of the backbone's gradient; 0 for any.", least=0)
    schedule: str = _option(
        "cosine", "How the learning rates fall after the warm-up.", choices=("cosine", "polynomial", "constant")
    )
    power: float = _option(2.0, "Of the polynomial schedule.", least=0, above=True)
    warm_up: float = _option(0.1, "Share of the steps in which the learning rates rise.", least=0, most=1)
    precision: str = _option(
        "fp32", "Of the autocast; fp16 with a gradient scaler.", choices=("fp32", "bf16", "fp16"), fixed=True
    )

    seed: int = _option(0, "Of weights, class centers, batches and samples.", least=0, most=2**63 - 1, fixed=True)
    device: str = _option("auto", "auto, cpu, cuda or cuda:N.")
    save_every: int = _option(
        0, "Steps from one checkpoint to the next, beside that of each epoch; 0 for none.", least=0
    )
    keep: int = _option(2, "Checkpoints that are kept.", least=1)

    def __post_init__(self) -> None:
        for name, (rule, types) in rules().items():
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) >= 2**64:
                raise ValueError(f"{name} must be a number of 64 bits; got one of {value.bit_length()}")
            if float in types and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)  # TOML's 64
                object.__setattr__(self, name, value)
            rule.check(name, value, types)
        if self.channels == 2:
            raise ValueError("channels must be 1 or 3; got 2")
        backends.check_name(self.backend)
        check_backbone(self.backbone)
        check_margin(self.margin)

    def replace(self, changes: Mapping[str, Any]) -> TrainConfig:
        """This configuration with other values.

        Raises:
            TypeError, ValueError: an unknown option, or a wrong value.
        """
        for name in changes:
            if name not in rules():
                near = difflib.get_close_matches(name, rules(), 1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(rules())}"
                raise ValueError(f"no option is called {name}{hint}")
        return dataclasses.replace(self, **changes)

    def save(self, path: Path) -> None:
        """Written as TOML, without the options that are None."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        write_bytes(path, encode(require("tomli_w", "train").dumps(values)))


def rules() -> dict[str, tuple[Rule, tuple[type, ...]]]:
    """Rule and types of each option, in order."""
    hints = get_type_hints(TrainConfig)
    return {
        each.name: (each.metadata["rule"], get_args(hints[each.name]) or (hints[each.name],))
        for each in dataclasses.fields(TrainConfig)
    }


def read_options(path: Path) -> dict[str, Any]:
    """The options that a TOML file sets; hand them to :meth:`TrainConfig.replace`.

    Raises:
        OptionError: it cannot be read or is no TOML.
    """
    # Before Python 3.11 the standard library has no reader, and the package that it came from takes its place.
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "train")
    try:
        text = read_bytes(path, _MOST_BYTES)
        if any(line.count(b".") > _MOST_DOTS for line in text.splitlines()):
            raise DataError(f"{path} must have <= {_MOST_DOTS} dots on a line")
        with file_errors(path):
            found: dict[str, Any] = toml.loads(decode(text))
    except DataError as error:
        raise OptionError(str(error)) from None
    return found
