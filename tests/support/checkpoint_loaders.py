"""Checkpoints as a fuzz harness takes them: a path becomes data, or one error type is raised."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

from fused_arcface import checkpoint
from fused_arcface.checkpoint import directory as folder
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
    """:func:`load_checkpoint` of a copy in ``work`` of which one file has other content, of either format.

    The manifest is made to fit the content, as a stranger would: it reaches the parser behind the checksums.
    """
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(directory, work)
    (work / name).write_bytes(data)
    if name != "manifest.json":
        manifest = json.loads((work / "manifest.json").read_bytes())
        if manifest["version"] == 1:
            manifest["files"][name] = len(data)
        else:
            del manifest["crc32"]
            blocks = range(0, len(data), BLOCK)
            sums = [zlib.crc32(data[start : start + BLOCK]) for start in blocks]
            manifest["files"][name] = {"size": len(data), "crc32": sums}
            manifest["crc32"] = folder._crc32(manifest)
        (work / "manifest.json").write_text(json.dumps(manifest))
    return load_checkpoint(work)
