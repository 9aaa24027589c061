"""Checkpoints as a fuzz harness takes them: a path becomes data, or one error type is raised."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

from fused_arcface import checkpoint
from fused_arcface.checkpoint import manifest as manifests
from fused_arcface.checkpoint.storage import BLOCK

ERROR = checkpoint.CheckpointError


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return all that a checkpoint's directory holds: every value and every tensor.

    Raises:
        CheckpointError: whatever is wrong with it.
    """
    saved = checkpoint.find(path)
    names = saved.names | {key.partition(".")[0] for key in saved.tensors}
    return {name: checkpoint.load_state(path, name) for name in names - {"head"}} | {
        "head": checkpoint.head_values(saved)
    }


def load_file(directory: Path, name: str, data: bytes, work: Path) -> dict[str, Any]:
    """Return what :func:`load_checkpoint` finds in a copy in ``work`` of which one file has other content.

    The checkpoint may be of either format.
    """
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(directory, work)
    (work / name).write_bytes(data)
    refit_manifest(work / name)
    return load_checkpoint(work)


def refit_manifest(changed: Path) -> None:
    """Make a checkpoint's manifest fit a changed file, as a stranger would, so that a parser sees what has changed.

    A changed manifest stays as it is, but for its own checksum if it still is a JSON object.
    """
    file = changed.with_name("manifest.json")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return
    if not isinstance(manifest, dict):
        return
    data = changed.read_bytes()
    if changed != file and manifest["version"] == 1:
        manifest["files"][changed.name] = len(data)
    elif changed != file:
        sums = [zlib.crc32(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]
        manifest["files"][changed.name] = {"size": len(data), "crc32": sums}
    if manifest.pop("crc32", None) is not None:
        with contextlib.suppress(ValueError, RecursionError):
            manifest["crc32"] = manifests.crc32(manifest)
    file.write_text(json.dumps(manifest))
