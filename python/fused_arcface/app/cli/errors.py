"""Errors that a user can mend: one line on the terminal and an exit status, in every command."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from fused_arcface.base.extras import MissingExtra
from fused_arcface.base.reading import DataError, NoSuchData
from fused_arcface.base.suggest import did_you_mean, missing_path

from .terminal import terminal

FAILED, WRONG_ARGUMENT, INTERRUPTED = 1, 2, 130
"""Exit statuses: a check that failed or a file that cannot be used; a wrong argument; Ctrl-C."""


class WrongOption(typer.BadParameter):
    """An option whose value is wrong; the message has the option's name, its rule and what was received."""

    def format_message(self) -> str:
        """Return the message without typer's words before it."""
        return self.message


def one_of(option: str, names: Sequence[str]) -> Callable[[str], str]:
    """Return a callback for a typer option that checks its value against a list of names."""

    def check(value: str) -> str:
        if value not in names:
            listed = f"{', '.join(names[:-1])} or {names[-1]}"
            raise WrongOption(f"{option} must be {listed}; got {value}{did_you_mean(value, names)}")
        return value

    return check


def make_folder(option: str, path: Path) -> None:
    """Make a folder for results; one that cannot be written to is an error before the minutes are spent, not after."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise WrongOption(f"{option} {path} cannot be written to: {error.strerror}") from None


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """End the command with the message and the status of an error in what the user gave."""
    from fused_arcface.checkpoint import CheckpointError

    from ..export import ExportError
    from ..training.failures import TrainingError

    try:
        yield
    except (CheckpointError, ExportError, TrainingError, OSError, ValueError) as wrong:
        raise ended(wrong) from None


def ended(error: BaseException, text: str = "") -> typer.Exit:
    """Print an error, or ``text`` in its place, and return the exit with its status."""
    _show(text or _text(error))
    return typer.Exit(_status(error))


def explain(error: BaseException) -> int:
    """Print an error that ended a command and return the exit status. Raise an error that no user can mend."""
    hint = ""
    # typer brings a click of its own, or imports the one that is installed; this is the error of whichever it uses.
    usage: Any = typer.BadParameter.__base__
    if isinstance(error, usage):
        command = error.ctx.command_path if error.ctx is not None else "fused-arcface"
        text, hint, status = error.format_message(), f"See {command} --help", WRONG_ARGUMENT
    elif isinstance(error, KeyboardInterrupt):
        text, status = "Interrupted.", INTERRUPTED
    elif isinstance(error, (MissingExtra, DataError, OSError)):
        text, status = _text(error), _status(error)
    else:
        raise error
    _show(text, hint)
    return status


def _show(text: str, hint: str = "") -> None:
    """Print an error, and a line of advice below it."""
    console = terminal(stderr=True, soft_wrap=True)
    console.print(text, style="bold red", markup=False)
    if hint:
        console.print(hint, markup=False, highlight=False)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        if isinstance(error, FileNotFoundError):
            return missing_path(error.filename)
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _status(error: BaseException) -> int:
    """Return the status of an error: a path that does not exist is a wrong argument; a damaged file is not."""
    from fused_arcface.checkpoint.centers import ConvertOptionError

    if isinstance(error, (ConvertOptionError, FileNotFoundError, NoSuchData)):
        return WRONG_ARGUMENT
    plain = isinstance(error, ValueError) and not isinstance(error, DataError)
    return WRONG_ARGUMENT if plain else FAILED
