"""The names in the benchmark's rows: a provider and its backend."""

from __future__ import annotations

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


def label(provider: str, backend: str) -> str:
    """Return a name for tables and legends: a peer's name tells its backend.

    >>> label("fused_arcface", "cpu"), label("eager", "torch")
    ('fused_arcface (cpu)', 'eager')
    """
    return f"{provider} ({backend})" if is_ours(provider) else provider
