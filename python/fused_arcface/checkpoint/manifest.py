"""The manifest of a checkpoint: its files, a checksum for each block of them, and one of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from ..base import files
from . import version1
from .storage import ALIGNMENT, BLOCK, METADATA, CheckpointError, FileRecord, numbers

FORMAT = "fused_arcface.checkpoint"
VERSION = 2
NAME = "manifest.json"
STEP_NAME = re.compile(r"step_(\d{10,19})(?:\.(\d{1,9}))?")
"""Name of a checkpoint's directory: its step, and a number if there are several of that step."""


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been checked."""

    version: int
    head: dict[str, Any]
    """Options of the head."""
    files: dict[str, FileRecord]
    """Sizes and checksums of the files; format 1 has no checksums."""
    block: int = BLOCK
    """Bytes that have a checksum together."""


def write(directory: Path, step: int, options: dict[str, Any], written: dict[str, FileRecord]) -> None:
    """Write the manifest of a directory whose other files are written."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "head": options,
        "block": BLOCK,
        "files": {name: asdict(written[name]) for name in sorted(written)},
    }
    files.write_text(directory / NAME, json.dumps({**content, "crc32": crc32(content)}, indent=2) + "\n")


def read(directory: Path) -> Manifest:
    """Read and check the manifest of a directory, but not the files that it lists.

    Raises:
        CheckpointError: if it is not one of this package, of a later version of it, or damaged.
    """
    content = read_content(directory)
    listed = content["files"]
    with boundary(directory, NAME):
        if METADATA not in listed or any(name != os.path.basename(name) for name in listed):
            raise ValueError("its list of files is not that of a checkpoint")
        if content["version"] == 1:
            return Manifest(1, content["head"], {name: FileRecord(numbers([listed[name]])[0]) for name in listed})
        (block,) = numbers([content["block"]])
        if block == 0 or block % ALIGNMENT:
            raise ValueError(f"block must be a multiple of {ALIGNMENT}; got {block}")
        return Manifest(VERSION, content["head"], {name: _record(listed[name], block) for name in listed}, block)


def read_content(directory: Path) -> dict[str, Any]:
    """Return the content of a manifest, after checking the parts that both formats have."""
    file = directory / NAME
    if not file.exists() and not STEP_NAME.fullmatch(directory.name):
        raise CheckpointError(f"{directory} is a checkpoint of another program: it has no {NAME}")
    with boundary(directory, NAME):
        if not file.is_file():
            raise ValueError("it is no file")
        content: Any = json.loads(file.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{directory} is a checkpoint of another program: its {NAME} does not say {FORMAT}")
        version = content.get("version")
        if type(version) is int and version > VERSION:
            raise CheckpointError(f"{directory} was saved by a later version of this package: format {version}")
        if version == VERSION and content.pop("crc32") != crc32(content):
            raise ValueError("its own checksum differs")
        if version not in (1, VERSION) or not all(isinstance(content[key], dict) for key in ("head", "files")):
            raise ValueError("it is not the manifest of a checkpoint")
    return content


def _record(entry: dict[str, Any], block: int) -> FileRecord:
    (size,), sums = numbers([entry["size"]]), list(numbers(entry["crc32"]))
    if len(sums) != -(-size // block):
        raise ValueError(f"{size} bytes have {-(-size // block)} checksums; got {len(sums)}")
    return FileRecord(size, sums)


def crc32(content: dict[str, Any]) -> int:
    """Return the checksum of a manifest without its own."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextlib.contextmanager
def boundary(directory: Path, name: str) -> Iterator[None]:
    """Turn any error that a parser raises into one that names the file."""
    try:
        yield
    except version1.NeedsTrust as error:
        raise version1.NeedsTrust(
            f"{directory}: {error}. If you trust whoever made it, say so: --trust, or trust=True"
        ) from None
    except CheckpointError:
        raise
    # A parser may raise anything for bytes that are no such file; torch's error is a BaseException.
    except (Exception, CheckpointException) as error:
        text = str(error) or type(error).__name__
        raise CheckpointError(f"{directory} is damaged: {name} cannot be read: {text[:300]}") from error
