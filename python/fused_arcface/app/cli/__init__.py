"""The command line: one module for each command. A command's module is imported when the command is called."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import fused_arcface

from .look import PlainCommand, give_look

COMMANDS = (
    "doctor",
    "gradcheck",
    "demo",
    "bench",
    "convert",
    "train",
    "embed",
    "similarity",
    "verify",
    "identify",
    "templates",
    "export",
    "compare",
)
"""Names of the commands, in the order of ``--help``. Each is a function in the module of the same name; the class
``Command`` of that module, if there is one, parses its arguments."""

_CHECKED = ("doctor", "gradcheck", "demo", "bench")
"""Commands that check all their arguments themselves. Any other ValueError in them is a fault and has a traceback."""

_INTERRUPTED = 130
_LEAST_WIDTH = 20  # columns


def load_command(name: str) -> PlainCommand:
    """Import a command and return what typer makes of it.

    The text in a parameter's annotation is its help: ``Annotated[int, typer.Option(min=1), "Number of trainings."]``.
    """
    module = importlib.import_module(f".{name}", __name__)
    function = getattr(module, name)
    signature = inspect.signature(function, eval_str=True)
    parameters = [each.replace(annotation=_with_help(each.annotation)) for each in signature.parameters.values()]
    function.__signature__ = signature.replace(parameters=parameters)
    single = typer.Typer(add_completion=False)
    single.command(name, cls=getattr(module, "Command", PlainCommand))(function)
    command = get_command(single)
    assert isinstance(command, PlainCommand)
    if name in _CHECKED:
        command.mendable = ()
    return command


def _with_help(annotation: Any) -> Any:
    """Return a parameter's annotation with its text as the help of its typer option."""
    match get_args(annotation):
        case (kind, *options, str(text)):
            option = options[0] if options else typer.Option()
            option.help = text
            return Annotated[kind, option]
    return annotation


class _Unloaded(TyperCommand):
    """A command in the list of ``--help``, which does not import it."""

    def __init__(self, name: str) -> None:
        super().__init__(name, help=_summary(name))

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command and let it parse its arguments."""
        assert self.name is not None
        return load_command(self.name).make_context(info_name, args, parent, **extra)


def _summary(name: str) -> str:
    """Return the first line of a command's docstring, from its source."""
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    (function,) = (each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == name)
    return (ast.get_docstring(function) or "").partition("\n")[0]


class _Commands(TyperGroup):
    """The commands, each of them unloaded until it is called."""

    def __init__(self, **attributes: Any) -> None:
        attributes["commands"] = {name: _Unloaded(name) for name in COMMANDS}
        super().__init__(**attributes)
        for option in self.params:
            give_look(option)

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option ``--help``."""
        return give_look(super().get_help_option(ctx))


app = typer.Typer(
    name="fused-arcface",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fused-arcface {fused_arcface.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train, evaluate, check and measure the fused margin-softmax head.

    `fused-arcface COMMAND --help` lists a command's options.
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the one of the process. An error that a user can mend is one line.

    Returns:
        The exit status: 0; 1 for a failed check, a missing library or a file that cannot be used; 2 for a wrong
        argument, a path that does not exist included; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding does not have is shown as an escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Some systems set 0 where there is no terminal; rich would print nothing.
    width = os.environ.get("COLUMNS", "")
    if width.isdigit() and int(width) < _LEAST_WIDTH:
        del os.environ["COLUMNS"]
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(args=given or ["--help"], prog_name="fused-arcface", standalone_mode=False)
        if status == _INTERRUPTED:  # typer ends a command after Ctrl-C with this status and without a word
            raise KeyboardInterrupt
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except (Exception, KeyboardInterrupt) as error:
        from .errors import explain  # not needed for the help

        return explain(error)
    return status if isinstance(status, int) else 0
