"""Errors that a user can mend: one line on the terminal and an exit status, in every command."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import typer

from fused_arcface.base.extras import MissingExtra
from fused_arcface.base.files import is_device
from fused_arcface.base.reading import DataError, NoSuchData
from fused_arcface.base.suggest import did_you_mean, missing_path
from fused_arcface.base.text import listed

from .terminal import say, terminal

Errors = tuple[type[Exception], ...]

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
            raise WrongOption(f"{option} must be {listed(names, 'or')}; got {value}{did_you_mean(value, names)}")
        return value

    return check


def check_file(option: str, path: Path | None) -> None:
    """Raise WrongOption unless a file for results can be written. Nothing is written yet, and no folder is made."""
    if path is None:
        return
    if path.is_dir():
        raise WrongOption(f"{option} must be a file; {path} is a folder")
    if not is_device(path):
        check_folder(option, path, Path(os.path.realpath(path)).parent)


def check_folder(option: str, path: Path | None, folder: Path | None = None) -> None:
    """Raise WrongOption unless a folder for results can be made and written to: ``folder``, or ``path`` itself.

    The folder is not made here, so that an error in another option leaves nothing behind.
    """
    if path is None:
        return
    wanted = Path(os.path.realpath(folder or path))
    existing = next(each for each in (wanted, *wanted.parents) if each.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise WrongOption(f"{option} {path} cannot be written to: {error.strerror}") from None


def explain(error: BaseException, options: Collection[str] = (), mendable: Errors = ()) -> int:
    """Print an error that ended a command and return the exit status. Raise an error that no user can mend.

    ``options`` are the names of the command's options, with underscores. ``mendable`` are further errors in arguments.
    """
    hint = ""
    # UsageError, which typer does not export.
    usage: Any = typer.BadParameter.__base__
    if isinstance(error, usage):
        command = error.ctx.command_path if error.ctx is not None else "fused-arcface"
        text, hint, status = error.format_message(), f"See {command} --help", WRONG_ARGUMENT
    elif isinstance(error, KeyboardInterrupt):
        text, status = "Interrupted.", INTERRUPTED
    else:
        text, status = _text(error), _status(error, mendable)
    console = terminal(stderr=True, soft_wrap=True)
    console.print(with_option(text, options), style="bold red", markup=False)
    if hint:
        say(console, hint)
    return status


def with_option(text: str, options: Collection[str]) -> str:
    """Return the message of an error about an argument with the name of the option, as on the command line.

    >>> with_option("batch_size must be >= 2; got 1", ["batch_size"]), with_option("data does not exist", ["data"])
    ('--batch-size must be >= 2; got 1', 'data does not exist')
    """
    found = re.match(r"([a-z_]+)(:| '| .*\b(?:must|needs|is for|used|available)\b)", text)
    if found is None or found[1] not in options or " does not exist" in text.partition(":")[0]:
        return text
    return f"--{found[1].replace('_', '-')}{text[found.end(1) :]}"


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        if isinstance(error, FileNotFoundError):
            return missing_path(error.filename)
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _status(error: BaseException, mendable: Errors) -> int:
    """Return the status of an error: a path that does not exist is a wrong argument; a damaged file is not."""
    from fused_arcface.checkpoint import CheckpointError
    from fused_arcface.checkpoint.centers import ConvertOptionError
    from fused_arcface.store import StoreError

    from ..export import ExportError
    from ..training.outcomes import TrainingError

    if isinstance(error, (ConvertOptionError, FileNotFoundError, NoSuchData)):
        return WRONG_ARGUMENT
    if isinstance(error, (CheckpointError, DataError, ExportError, MissingExtra, OSError, StoreError, TrainingError)):
        return FAILED
    if isinstance(error, mendable):
        return WRONG_ARGUMENT
    raise error
