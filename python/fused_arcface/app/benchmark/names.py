"""The names in the benchmark's rows: a provider and its backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fused_arcface import backends

OURS = "fused_arcface"
"""The name of this package's providers, to which a variant adds a suffix."""

PLAIN = ("torch", "reference")
"""The backend in plain PyTorch, and its name in rows of earlier releases."""


def is_ours(provider: str) -> bool:
    """Return whether a provider or a setup is this package's."""
    return provider.startswith(OURS)


def is_fused(provider: str, backend: str) -> bool:
    """Return whether a provider is this package's and does not store the logits."""
    return is_ours(provider) and backend not in PLAIN


@dataclass(frozen=True)
class Named:
    """A provider or a training setup: an implementation that is measured, by name and backend."""

    name: str
    backend: str
    """Of ours the backend; of others the library that computes."""

    @property
    def is_ours(self) -> bool:
        return is_ours(self.name)

    @property
    def is_fused(self) -> bool:
        return is_fused(self.name, self.backend)

    def __str__(self) -> str:
        return f"{self.name} ({self.backend})"


_Chosen = TypeVar("_Chosen", bound=Named)


def chosen(every: Sequence[_Chosen], names: Sequence[str] | None, backend: str | None) -> tuple[_Chosen, ...]:
    """Return the providers or setups with these names. The name ``"ours"`` chooses all of ours, None chooses every one.

    If a backend is named, ours are chosen with this backend only.

    Raises:
        ValueError: if a name is unknown; the message lists the names that exist.
    """
    if backend is not None and backends.canonical(backend) not in backends.available():
        raise ValueError(f"backend must be one of {', '.join(backends.available())}; got {backend!r}")
    known = {"ours", *(each.name for each in every)}
    unknown = sorted(set(names or ()) - known)
    if unknown:
        raise ValueError(f"providers must be among {', '.join(sorted(known))}; got {', '.join(unknown)}")
    return tuple(
        each
        for each in every
        if (names is None or each.name in names or ("ours" in names and each.is_ours))
        and (backend is None or not each.is_ours or each.backend == backends.canonical(backend))
    )


def label(provider: str, backend: str) -> str:
    """Return a name for tables and legends. The backend is added to ours alone.

    >>> label("fused_arcface", "cpu"), label("eager", "torch")
    ('fused_arcface (cpu)', 'eager')
    """
    return f"{provider} ({backend})" if is_ours(provider) else provider
