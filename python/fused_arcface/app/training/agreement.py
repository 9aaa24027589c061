"""Check that all ranks train with the same options on the same data."""

from __future__ import annotations

from dataclasses import asdict

from fused_arcface.base.reading import DataError

from ..data.sources import ImageSource
from .config import OptionError, TrainConfig, rules
from .fingerprint import Fingerprint
from .world import World

_OF_ONE_RANK = ("data", "verify_data", "init", "centers", "workers", "device")
"""Options that may differ between ranks: paths, and what a machine has."""


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
    values = {"options": ({**call, **options, **used}, OptionError), "data": (asdict(data), DataError)}
    for what, (compared, failure) in values.items():
        try:
            world.check_agreement(what, compared)
        except ValueError as error:
            raise failure(str(error)) from None
    return data
