"""Options that a run chooses by its data, net and machine, and checks that options and ranks fit together."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_arcface import backends
from fused_arcface.base.options import HeadOptions
from fused_arcface.base.reading import DataError
from fused_arcface.base.suggest import missing_path
from fused_arcface.margins.schedule import at_strength
from fused_arcface.margins.text import parse_margin

from ..data import formats
from ..data.formats import generated, open_source, unseen_source
from ..data.images import ImageSpec
from ..data.pair_sets import paired, read_pair_set
from ..data.sources import ImageSet, ImageSource, common_spec, set_of
from ..nets.backbones import own_embedding_dim, own_spec
from .config import OptionError, TrainConfig, rules
from .fingerprint import Fingerprint
from .world import World

_LR = {"sgd": 0.1, "adamw": 0.001}
_OF_ONE_RANK = ("data", "verify_data", "init", "centers", "workers", "device")
"""Options that may differ between ranks: paths, and what a machine has."""


def open_data(config: TrainConfig) -> ImageSource:
    """Open the images to train on.

    Raises:
        OptionError: if the option is not given.
        DataError: if there are none, or something is wrong with them and ``bad_data`` is ``"stop"``.
    """
    if not config.data:
        raise OptionError(f"data must be {formats.listed()}; got nothing")
    source = open_source(config.data, config.max_pixels)
    check_problems(source.problems, config.bad_data)
    if len(source.names) < 2:
        raise DataError(f"{config.data} must hold two identities or more; got {len(source.names)}")
    return source


def check_problems(problems: Sequence[str], bad_data: str | None) -> None:
    """Raise DataError for the first problem in the data, if there is one and ``bad_data`` is ``"stop"``."""
    if problems and bad_data == "stop":
        raise DataError(f"{problems[0]}; bad_data is stop, so this is an error")


def open_verification(config: TrainConfig) -> ImageSet | None:
    """Open the pairs to verify on.

    The options name them. Otherwise they are unseen images if the package makes the data itself, or None.

    Raises:
        OptionError: if they cannot be read, or no pairs can be made of them.
    """
    try:
        if config.verify_data:
            found = read_pair_set(config.verify_data, max_pixels=config.max_pixels)
            check_problems(found.problems, config.bad_data)
            return found
        unseen, name = unseen_source(config.data), f"unseen {config.data}"
        return paired(set_of(unseen, name), name) if unseen is not None else None
    except DataError as error:
        raise OptionError(f"verify_data: {error}") from None


def resolve(config: TrainConfig, source: ImageSource, world: World) -> TrainConfig:
    """Return the options with a value for each; OptionError if they do not fit each other, the data or the ranks."""
    for name in ("init", "centers", "verify_data"):
        text = getattr(config, name)
        if text and not Path(text).exists() and text.partition(":")[0] not in generated.NAMES:
            raise OptionError(f"{name}: {missing_path(text)}")
    # A run may be resumed from another folder: paths become absolute. The folder of the centers need not exist yet.
    paths = {name: getattr(config, name) for name in ("data", "verify_data", "init", "centers")}
    changes: dict[str, Any] = {
        **{name: str(Path(path).resolve()) for name, path in paths.items() if path and Path(path).exists()},
        "embedding_dim": config.embedding_dim or own_embedding_dim(config.backbone),
        "lr": _LR[config.optimizer] if config.lr is None else config.lr,
        "scale": config.scale or _scale(len(source.names)),
    }
    if config.center_storage not in ("device", "host", ""):
        changes["center_storage"] = str(Path(config.center_storage).resolve())
    if config.image_size is None or config.channels is None:
        spec: ImageSpec = own_spec(config.backbone) or common_spec(source)
        changes |= {"image_size": config.image_size or spec.size, "channels": config.channels or spec.channels}
    if config.label_smoothing and config.center_optimizer == "fused":
        raise OptionError(
            "label_smoothing needs center_optimizer joint: its gradient reaches every class center in each step; got "
            f"label_smoothing {config.label_smoothing} with center_optimizer {config.center_optimizer}"
        )
    rows, parts = min(config.batch_size, len(source)), world.world_size * config.accumulation
    if rows < 2 * parts:
        raise OptionError(
            f"batch_size must be >= {2 * parts}, and so must the number of images: each of the {world.world_size} × "
            f"{config.accumulation} parts (ranks × micro-batches) needs two; got {config.batch_size} and {len(source)}"
        )
    if config.precision == "fp16" and config.center_optimizer == "joint" and world.world_size > 1:
        raise OptionError(
            "precision fp16 on several ranks needs center_optimizer fused: a gradient that overflows in one rank's "
            "class centers would make that rank alone leave the step out"
        )
    try:
        margin = parse_margin(config.margin)
        if config.margin_schedule:
            at_strength(margin, 1.0)
        backends.select(config.backend, world.device, needs=HeadOptions(margin, sub_centers=config.sub_centers).needs())
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(str(error)) from None
    return config.replace(changes)


def agreed_fingerprint(world: World, config: TrainConfig, source: ImageSource, **call: object) -> Fingerprint:
    """Return the fingerprint of the data, if all ranks have the same data, options and other arguments (``call``).

    Raises:
        OptionError: if options or arguments differ between ranks.
        DataError: if data do.
    """
    with world.together():
        data = Fingerprint.of(source)
    options = {name: getattr(config, name) for name in rules() if name not in _OF_ONE_RANK}
    # Paths may differ between machines, but not their use.
    used = {f"use of {name}": bool(getattr(config, name)) for name in ("init", "centers")}
    world.check_agreement("options", {**call, **options, **used}, OptionError)
    world.check_agreement("data", asdict(data), DataError)
    return data


@contextlib.contextmanager
def temporary_centers(config: TrainConfig, world: World, goes_on: bool) -> Iterator[TrainConfig]:
    """Yield options for a dry run. It writes nothing, so class centers in a file go to a temporary one."""
    if config.center_storage in ("device", "host"):
        yield config
        return
    with world.together():
        if goes_on or world.world_size > 1:
            raise OptionError(
                "with center_storage in a folder a dry run must begin anew, on one rank: it would write there"
            )
    with tempfile.TemporaryDirectory() as folder:
        yield config.replace({"center_storage": folder})


def _scale(identities: int) -> float:
    """Return the scale for a number of identities.

    The papers' 64 suits 10⁵ identities. With some hundred, a softmax is sharp enough at 16 and learns faster.
    """
    return 16.0 if identities < 1000 else 32.0 if identities < 10_000 else 64.0
