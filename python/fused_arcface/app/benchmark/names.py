"""The names in the benchmark's rows: a provider and its backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

OURS = "fused_arcface"
"""The name of this package's providers, to which a variant adds a suffix."""

PLAIN = ("torch", "reference")
"""The backend in plain PyTorch, and its name in rows of earlier releases."""


def is_ours(provider: str) -> bool:
    """Return whether a provider, or a recipe, is this package's."""
    return provider.startswith(OURS)


def is_fused(provider: str, backend: str) -> bool:
    """Return whether a provider is this package's and does not store the logits."""
    return is_ours(provider) and backend not in PLAIN


class _Named(Protocol):
    """A provider or a recipe."""

    @property
    def name(self) -> str: ...

    @property
    def backend(self) -> str: ...


_Chosen = TypeVar("_Chosen", bound=_Named)


def chosen(every: Sequence[_Chosen], names: Sequence[str] | None, backend: str | None) -> tuple[_Chosen, ...]:
    """Return the providers or recipes of some names; those of one backend alone, if it is named.

    ``"ours"`` is the name of all of ours. Without names all are chosen.

    Raises:
        ValueError: if a name is unknown; the message lists the names that exist.
    """
    known = {"ours", *(each.name for each in every)}
    unknown = sorted(set(names or ()) - known)
    if unknown:
        raise ValueError(f"providers must be among {', '.join(sorted(known))}; got {', '.join(unknown)}")
    return tuple(
        each
        for each in every
        if (names is None or each.name in names or ("ours" in names and is_ours(each.name)))
        and (backend is None or not is_ours(each.name) or each.backend == backend)
    )


def label(provider: str, backend: str) -> str:
    """Return a name for tables and legends: a peer's name tells its backend.

    >>> label("fused_arcface", "cpu"), label("eager", "torch")
    ('fused_arcface (cpu)', 'eager')
    """
    return f"{provider} ({backend})" if is_ours(provider) else provider
