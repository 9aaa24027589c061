"""The script behind ``make test``: each test runs in one of its sessions, and what fails is told."""

from __future__ import annotations

import re
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


def test_a_session_reads_all_files_with_its_mark() -> None:
    """A mark in a helper would not be seen in the files that use it, except ``INTERPRETED``."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("*.py")}
    interpreter, serial = (f"mark.{name}" for name in ("interpreter", "serial"))
    assert [name for name, text in texts.items() if interpreter in text] == ["triton_cases.py"]
    assert all(name.startswith("test_") for name, text in texts.items() if serial in text and name != "run.py")
    of_interpreter, of_serial = (script.files_with(session.mark) for session in script.SESSIONS[1:])
    use = {name for name, text in texts.items() if re.search(r"^from .* import .*\bINTERPRETED\b", text, re.MULTILINE)}
    assert {Path(each).name for each in of_interpreter} == use and len(use) == 5
    assert {Path(each).name for each in of_serial} == {"test_large.py", "test_memory.py"}


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
