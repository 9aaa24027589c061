"""The command line: one module for each command, and a line here that names it. Heavy imports stand inside the
commands."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import typer

from fused_arcface.base.extras import MissingExtra
from fused_arcface.base.reading import DataError

from .bench import bench
from .compare import compare
from .convert import convert
from .demo import demo
from .doctor import doctor
from .embed import embed
from .export import export
from .gradcheck import gradcheck
from .identify import identify
from .similarity import similarity
from .terminal import terminal
from .train import TrainCommand, train
from .verify import verify

_INTERRUPTED = 130

app = typer.Typer(
    name="fused-arcface",
    help="The fused margin-softmax head: look it over, check it, see it train, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(gradcheck)
app.command()(demo)
app.command()(bench)
app.command()(convert)
app.command(cls=TrainCommand)(train)
app.command()(embed)
app.command()(similarity)
app.command()(export)
app.command()(verify)
app.command()(identify)
app.command()(compare)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own by default; what a user can put right ends in one line, not in a traceback.

    Returns:
        The exit status: 0, 1 for a failed check, a missing library or a file that cannot be used, 2 for wrong usage,
        130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # A name or a sign that the terminal's encoding does not have is shown as an escape; it ends nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    error = terminal(stderr=True, soft_wrap=True)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="fused-arcface")
    except SystemExit as exit_:
        if exit_.code == _INTERRUPTED:  # typer ends a command after Ctrl-C with this status and without a word
            error.print("Interrupted.", style="bold red")
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except (MissingExtra, DataError) as wrong:
        error.print(str(wrong), style="bold red", markup=False)
        return 1
    except OSError as failed:
        said = str(failed) if failed.filename is None else f"{failed.filename}: {failed.strerror}"
        error.print(said, style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        error.print("Interrupted.", style="bold red")
        return _INTERRUPTED
    return 0
