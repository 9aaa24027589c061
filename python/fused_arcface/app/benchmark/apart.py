"""Measure several settings of a script, each in its own process, so that each has its own peak of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .report import add_rows


def measure_apart(settings: Iterable[str], line: str, folder: Path | None, name: str) -> None:
    """Run this script again for each setting, with ``--one SETTING``; it then prints that setting's row as JSON.

    Args:
        settings: values of ``--one``.
        line: the text to print for a row, a format string with the row's fields.
        folder: the folder of NAME.csv and NAME.json that the rows are added to; None to write nothing.
        name: NAME.
    """
    rows: list[dict[str, Any]] = []
    for setting in settings:
        done = subprocess.run([sys.executable, *sys.argv, "--one", setting], stdout=subprocess.PIPE, check=False)
        if done.returncode != 0:
            reason = "out of memory" if done.returncode == -9 else f"failed: {done.returncode}"
            print(f"{setting}: {reason}", flush=True)
            continue
        rows.append(json.loads(done.stdout))
        print(line.format(**rows[-1]), flush=True)
    if folder and rows:
        add_rows(folder, name, rows)
