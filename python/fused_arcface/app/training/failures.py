"""The error with which a training that has begun fails, on all ranks alike."""

from __future__ import annotations

import os


class TrainingError(RuntimeError):
    """Raised if a training cannot continue; the message says why, and how to resume if that is possible."""


def disk_error(path: object, error: OSError, way_back: str) -> TrainingError:
    """Return the error for a file of a run that could not be written."""
    why = os.strerror(error.errno) if error.errno else str(error)
    return TrainingError(f"{error.filename or path} cannot be written: {why}; {way_back}")
