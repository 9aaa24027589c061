"""Backends: implementations of the head's stages, chosen by name. :mod:`fused_arcface.backends.registry` lists them."""

from .registry import (
    BACKENDS,
    FEATURES,
    NAMES,
    ClassPass,
    available,
    canonical,
    check_name,
    describe,
    device_type,
    has,
    load,
    select,
)

__all__ = [
    "BACKENDS",
    "FEATURES",
    "NAMES",
    "ClassPass",
    "available",
    "canonical",
    "check_name",
    "describe",
    "device_type",
    "has",
    "load",
    "select",
]
