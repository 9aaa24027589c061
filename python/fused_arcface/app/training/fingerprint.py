"""Fingerprints of data: a resumed run and its ranks notice other images under the same names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import torch

from fused_arcface.base.text import encode_names
from fused_arcface.base.typed_json import typed

from ..data.sources import ImageSource

_SAMPLED = 512  # images whose bytes are read: a second on a disk, and all of a small set
_KEY = 20260101  # of the sample; every run draws the same


@dataclass(frozen=True)
class Fingerprint:
    """Numbers and hashes of a source.

    They change with any name or label, and with the stored bytes of up to 512 images that a fixed key chooses.
    """

    images: int
    identities: int
    names: str
    labels: str
    bytes: str

    @staticmethod
    def of(source: ImageSource) -> Fingerprint:
        """Return the fingerprint of a source; an image that cannot be read counts as such."""
        names = hashlib.sha256(encode_names(source.names))
        labels = hashlib.sha256(source.labels.to(torch.int64).contiguous().numpy().tobytes())
        content = hashlib.sha256()
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(_KEY))[:_SAMPLED]
        for index in order.sort().values.tolist():
            try:
                stored = source.stored(index)
            except (ValueError, OSError):
                stored = b"unreadable"
            content.update(hashlib.sha256(stored).digest())
        digests = (each.hexdigest()[:16] for each in (names, labels, content))
        return Fingerprint(len(source), len(source.names), *digests)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Fingerprint:
        """Return what :meth:`to_json` wrote; ValueError if the text is something else."""
        return typed(Fingerprint, json.loads(text))

    def difference(self, other: Fingerprint) -> str | None:
        """Return what differs, in words: ``names``, for example; None if nothing does."""
        own, others = asdict(self), asdict(other)
        return next((name for name in own if own[name] != others[name]), None)
