"""``train``: an embedding net and its class centers on files. The options are those of ``training.config``."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fused_arcface.margins.text import imported_module

from ..training.config import OptionError, Rule, TrainConfig, read_options, rules
from ..training.events import Event
from ..training.runs import RunError, RunFolder
from ..training.trainer import train as train_run
from ..training.trainer import try_out
from ..training.world import is_first_rank, resume_command
from .look import PlainCommand
from .reporting import NoReport, Refresh, ReportFile, ReportInOutput, say_report
from .terminal import say, terminal
from .training_progress import TrainingProgress, explain_end, explain_trial

if TYPE_CHECKING:
    from ..report.document import Report

RESUME = "last"  # as the value of --resume without one


class Command(PlainCommand):
    """``train`` with an optional value of --resume, which typer does not know."""

    mendable = (OptionError, RunError)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        filled = [
            f"--resume={RESUME}" if each == "--resume" and after != "auto" else each
            for each, after in pairwise([*args, ""])
        ]
        return super().parse_args(ctx, filled)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` an option for each field of ``TrainConfig`` in place of its keywords, None if not given."""
    *parameters, _ = inspect.signature(command, eval_str=True).parameters.values()
    defaults = TrainConfig()
    for name, (rule, types) in rules().items():
        kind: Any = types[0] | None
        option = typer.Option(rich_help_panel=rule.group)
        annotation = Annotated[kind, option, _help(rule, getattr(defaults, name))]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _help(rule: Rule, default: Any) -> str:
    """Return an option's sentences, its choices and its default; rich takes square brackets for its own."""
    text = rule.help
    if rule.choices:
        text += f" One of {', '.join(rule.choices)}."
    if default not in (None, ""):
        shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
        text += f" Default: {shown}."
    return text


@_with_options
def train(
    output: Annotated[Path, "Folder of the run: options, log, checkpoints and the finished net."],
    config: Annotated[Path | None, "TOML file of options. Options on the command line override it."] = None,
    resume: Annotated[
        str,
        typer.Option("--resume", metavar="[auto]", show_default=False),
        "Resume the run in --output, on any number of ranks. --resume auto starts one if there is none.",
    ] = "",
    trust: Annotated[
        bool,
        typer.Option("--trust"),
        "Allow the margin MODULE:NAME of a resumed run or of --config, and a checkpoint of an old format, to "
        "run code. Use it only if you trust the author.",
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run"),
        "Check everything, make the first step, print options, time and memory. Nothing is written.",
    ] = False,
    report: ReportInOutput = None,
    no_report: NoReport = False,
    **options: Any,
) -> None:
    """Train an embedding net with a margin-softmax head on a folder, a RecordIO file or generated images.

    Several processes train together under torchrun: torchrun --nproc-per-node 8
    -m fused_arcface train ... On Ctrl-C or SIGTERM the run saves a checkpoint and
    prints the command to resume.
    """
    console, error = (terminal(stderr=each, soft_wrap=True, optional=True) for each in (False, True))
    page = ReportFile(None if dry_run else report, no_report or dry_run, RunFolder(output).report)

    def make_report() -> Report:
        from ..report.training import training_report

        return training_report(RunFolder(output))

    try:
        if resume not in ("", RESUME, "auto"):
            raise OptionError(f"--resume takes auto or nothing; got {resume!r}")
        goes_on = resume == RESUME or (resume == "auto" and RunFolder(output).config.exists())
        given = {name: value for name, value in options.items() if value is not None}
        chosen = _choose(output, config, goes_on, given)
        _check_trust(chosen.margin, trust or "margin" in given)
        progress = TrainingProgress(console, error, chosen.epochs)
        refresh = Refresh(lambda: page.write_or_note(make_report))

        def listener(event: Event) -> None:
            progress(event)
            refresh(event)

        how: Any = "auto" if resume == "auto" else goes_on
        if dry_run:
            trial = try_out(chosen, output, resume=how, listener=listener)
            if is_first_rank():
                explain_trial(console, trial)
            return
        outcome = train_run(chosen, output, resume=how, trust=trust, listener=listener)
    except KeyboardInterrupt:
        if is_first_rank() and RunFolder(output).config.exists():
            error.print("Interrupted before everything was saved. Resume from the last checkpoint with:", markup=False)
            say(error, f"  {resume_command(output)}", "bold")
        raise
    written = page.write_or_note(make_report) if is_first_rank() else []
    if outcome.signal is not None:
        if is_first_rank():
            error.print(f"Saved after step {outcome.step} of {outcome.steps}. Resume with:", markup=False)
            say(error, f"  {resume_command(output)}", "bold")
        raise typer.Exit(128 + outcome.signal)
    if is_first_rank():
        explain_end(console, RunFolder(output), outcome.step)
        say_report(console, written)


def _choose(output: Path, file: Path | None, resume: bool, given: dict[str, Any]) -> TrainConfig:
    """Return the options: those of the command line, then of the file, then of the resumed run, then the defaults."""
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
