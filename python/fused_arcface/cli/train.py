"""``train``: an embedding net and its class centres on files. The options are those of ``training.config``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint import CheckpointError
from ..data import DataError
from ..training.config import OptionError, TrainConfig, read_options, rules
from ..training.runs import RunError, RunFolder
from ..training.trainer import train as train_run
from ..training.world import is_first_rank, resume_command
from .terminal import terminal
from .training_progress import TrainingProgress

_WRONG_USAGE = 2


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
        bool, typer.Option("--resume", help="Go on with the run in --output, on any number of ranks.")
    ] = False,
    **options: Any,
) -> None:
    """Train an embedding net with a margin-softmax head on a folder, a RecordIO file or generated images.

    Several processes train together under torchrun: torchrun --nproc-per-node 8
    -m fused_arcface train ... Ctrl-C saves and says how to go on.
    """
    console, error = terminal(soft_wrap=True), terminal(stderr=True, soft_wrap=True)
    try:
        chosen = _choose(output, config, resume, {name: value for name, value in options.items() if value is not None})
        outcome = train_run(chosen, output, resume=resume, listener=TrainingProgress(console, error, chosen.epochs))
    except (CheckpointError, DataError, OptionError, RunError) as wrong:
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


def _replace(config: TrainConfig, options: dict[str, Any], place: str = "") -> TrainConfig:
    try:
        return config.replace(options)
    except (TypeError, ValueError) as wrong:
        raise OptionError(f"{place}{wrong}") from None
