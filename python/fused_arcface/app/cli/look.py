"""The look of every option in ``--help``: a flag has no type, a range has a short one, a default is a sentence.

The options of the commands that use a net have groups. All wrong values of paths and numbers are errors of one form.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args

from typer.core import TyperCommand

_GROUPS = {
    "Net": ("checkpoint", "backbone", "image_size", "device", "batch_size", "flip", "trust"),
    "Comparison": ("distance", "p", "shrinkage", "normalize", "folds", "engine", "threshold", "far"),
    "Results": ("output", "save_embeddings", "predictions", "json", "pictures", "report", "ranks"),
}
_REST = "Data"


class PlainCommand(TyperCommand):
    """A command whose options have this look."""

    mendable: tuple[type[Exception], ...] = (ValueError,)
    """Types of errors that mean a wrong argument, beside those in files and data."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        options: list[Any] = list(self.params)
        names = [option.name for option in options]
        parameters = inspect.signature(self.callback).parameters if self.callback is not None else {}
        for option in options:
            give_look(option)
            _name_rules(option, _kind(parameters[option.name].annotation))
            if "checkpoint" in names and option.param_type_name == "option" and not option.rich_help_panel:
                found = (group for group, members in _GROUPS.items() if option.name in members)
                option.rich_help_panel = next(found, _REST)

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option ``--help``."""
        return give_look(super().get_help_option(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command. For an error that the user can mend, print one line and return its exit status."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            from .errors import explain

            options = [str(option.name) for option in self.params if option.param_type_name == "option"]
            return explain(error, options, self.mendable)


def give_look(option: Any) -> Any:
    """Give an option of typer the look, and return it. Its bounds are floats if it takes any number."""
    flag = getattr(option, "is_flag", False)  # an argument has none
    if flag:
        option.metavar = ""
    elif option.min is not None:
        option.metavar = "<float>" if isinstance(option.min, float) else "<int>"
    if option.show_default and option.default is not None and option.default != "":
        if option.help and (option.secondary_opts or not flag):
            shown = (option.opts if option.default else option.secondary_opts)[0] if flag else option.default
            option.help += f" Default: {shown}."
        option.show_default = False
    return option


def _name_rules(option: Any, kind: Any) -> None:
    """Let a wrong path or number raise an error with the option's name, its rule and the value."""
    rule = {Path: "the name of a file or folder", int: "a whole number", float: "a number"}.get(kind)
    if rule is None:
        return
    process = option.process_value
    bounds = [(">=", option.min), ("<=", option.max)]

    def checked(ctx: Any, value: Any) -> Any:
        import typer

        from .errors import WrongOption

        each = value if isinstance(value, (list, tuple)) else [value]
        try:
            if kind is Path and "" in each:
                raise typer.BadParameter("an empty text")
            return process(ctx, value)
        except typer.BadParameter as error:
            if isinstance(error, WrongOption) or value in (None, (), []):  # a value that is missing
                raise
            limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
            shown = ", ".join(repr(text) if text == "" else str(text) for text in each)
            name = option.opts[0] if option.param_type_name == "option" else option.metavar or option.name
            must = f"{rule} {limits}" if limits else rule
            raise WrongOption(f"{name} must be {must}; got {shown}", ctx=ctx, param=option) from None

    option.process_value = checked


def _kind(annotation: Any) -> Any:
    """Return the type of an option's value, or of each of its values: ``Path``, ``int``, ``float`` or another."""
    while arguments := get_args(annotation):
        annotation = arguments[0]
    return annotation
