"""``train``: an embedding net and its class centers on files. The options are those of ``training.config``."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fused_arcface.checkpoint import CheckpointError
from fused_arcface.margins.text import imported_module

from ..data import DataError
from ..training.config import OptionError, TrainConfig, read_options, rules
from ..training.failures import TrainingError
from ..training.runs import RunError, RunFolder
from ..training.trainer import train as train_run
from ..training.world import is_first_rank, resume_command
from .terminal import terminal
from .training_progress import TrainingProgress

_WRONG_USAGE = 2
RESUME = "last"  # as the value of --resume without one


class TrainCommand(TyperCommand):
    """``train``, whose --resume may stand alone: typer knows no option with a value that can be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], ""]
        filled = [
            f"--resume={RESUME}" if each == "--resume" and after != "auto" else each
            for each, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, filled)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer is to see it: in place of its keywords an option for each field of ``TrainConfig``, None
    where it is not given."""
    parameters = [
        each
        for each in inspect.signature(command, eval_str=True).parameters.values()
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    defaults = TrainConfig()
    for name, (rule, types) in rules().items():
        default = getattr(defaults, name)
        kind = next(each for each in types if each is not type(None))
        shown = "" if default in (None, "") else f" Default: {str(default).lower() if kind is bool else default}."
        optional: Any = kind | None
        annotation = Annotated[optional, typer.Option(help=rule.help + shown, show_default=False)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


@_with_options
def train(
    output: Annotated[Path, typer.Option(help="The run's folder: options, log, checkpoints, the finished net.")],
    config: Annotated[Path | None, typer.Option(help="TOML file of options; those on the command line win.")] = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="[auto]",
            help="Go on with the run in --output, on any number of ranks; auto: or begin one, if there is none.",
            show_default=False,
        ),
    ] = "",
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Import the margin MODULE:NAME that the resumed run or --config names, and run the code that a "
            "resumed checkpoint of an old format may hold. Give it only for runs whose author you trust.",
        ),
    ] = False,
    **options: Any,
) -> None:
    """Train an embedding net with a margin-softmax head on a folder, a RecordIO file or generated images.

    Several processes train together under torchrun: torchrun --nproc-per-node 8
    -m fused_arcface train ... Ctrl-C saves and says how to go on.
    """
    console, error = terminal(soft_wrap=True), terminal(stderr=True, soft_wrap=True)
    try:
        if resume not in ("", RESUME, "auto"):
            raise OptionError(f"--resume takes auto or nothing; got {resume!r}")
        goes_on = resume == RESUME or (resume == "auto" and RunFolder(output).config.exists())
        given = {name: value for name, value in options.items() if value is not None}
        chosen = _choose(output, config, goes_on, given)
        _check_trust(chosen.margin, trust or "margin" in given)
        outcome = train_run(
            chosen,
            output,
            resume="auto" if resume == "auto" else goes_on,
            trust=trust,
            listener=TrainingProgress(console, error, chosen.epochs),
        )
    except KeyboardInterrupt:
        if is_first_rank() and RunFolder(output).config.exists():
            error.print("Interrupted before all was saved. To go on from the last checkpoint:", markup=False)
            error.print(f"  {resume_command(output)}", style="bold", markup=False, highlight=False)
        raise
    except (CheckpointError, DataError, OptionError, RunError, TrainingError) as wrong:
        error.print(str(wrong), style="bold red", markup=False)
        raise typer.Exit(_WRONG_USAGE if isinstance(wrong, (OptionError, RunError)) else 1) from None
    if outcome.signal is not None:
        if is_first_rank():
            error.print(f"Saved after step {outcome.step} of {outcome.steps}. To go on:", markup=False)
            error.print(f"  {resume_command(output)}", style="bold", markup=False, highlight=False)
        raise typer.Exit(128 + outcome.signal)
    if is_first_rank():
        console.print(f"{outcome.step} steps are done; the net is in {RunFolder(output).model}", markup=False)


def _choose(output: Path, file: Path | None, resume: bool, given: dict[str, Any]) -> TrainConfig:
    """The command line over the file over the resumed run's options over the defaults."""
    chosen = RunFolder(output).read_config() if resume else TrainConfig()
    if file is not None:
        chosen = _replace(chosen, read_options(file), f"{file}: ")
    return _replace(chosen, given)


def _check_trust(margin: str, trusted: bool) -> None:
    """Raise if training would import code that the user has not named: a run or a file may be a stranger's."""
    module = imported_module(margin)
    if module is not None and not trusted:
        raise OptionError(
            f"margin {margin} imports the module {module}, and it comes from a file. If you trust whoever wrote it, "
            f"name it on the command line, --margin {shlex.quote(margin)}, or add --trust"
        )


def _replace(config: TrainConfig, options: dict[str, Any], place: str = "") -> TrainConfig:
    try:
        return config.replace(options)
    except (TypeError, ValueError) as wrong:
        raise OptionError(f"{place}{wrong}") from None
