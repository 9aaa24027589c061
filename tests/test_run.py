"""The script behind ``make test``: each test runs in one of its sessions, and what fails is told."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

script = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "run.py")))


def test_each_marker_belongs_to_one_session() -> None:
    for marks in (set(), {"serial"}, {"interpreter"}, {"slow"}, {"distributed"}):
        meant = {name: name in marks for name in ("serial", "interpreter", "slow", "distributed")}
        assert sum(eval(session.marks, {}, meant) for session in script.SESSIONS) == 1, marks


@pytest.mark.parametrize(
    ("codes", "limit", "code"),
    [((0, 0, 0), "9", 0), ((0, 5, 0), "9", 0), ((0, 1, 0), "9", 1), ((0, 0, 2), "9", 1), ((0, 0, 0), "-1", 1)],
    ids=["green", "nothing chosen", "a failure", "an interrupt", "too long"],
)
def test_exit_code(codes: tuple[int, ...], limit: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=codes[len(commands) - 1])

    monkeypatch.setattr(subprocess, "run", run)
    assert script.main(["--limit", limit, "-m", "not full", "-k", "x"]) == code
    assert len(commands) == 3
    for command in commands:
        assert command[command.index("-k") + 1] == "x"
        assert command[command.index("-m", 3) + 1].endswith(" and (not full)")
