"""Runs pytest with the package in another folder: ``make test-sanitized`` builds it there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def main(folder: str, arguments: list[str]) -> int:
    # The editable installation comes before every folder; without it the first folder with the package counts.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
    sys.path.insert(0, folder)
    import fused_arcface

    assert Path(folder).resolve() in Path(fused_arcface.__file__).resolve().parents, fused_arcface.__file__
    return pytest.main(["-q", *arguments])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
