"""The look of every option in ``--help``: a flag has no type, a range has a short one, a default is a sentence.

The options of the commands that use a net have groups.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

_GROUPS = {
    "Net": ("checkpoint", "backbone", "image_size", "device", "batch_size", "flip", "trust"),
    "Comparison": ("distance", "p", "shrinkage", "normalize", "folds", "engine", "threshold", "far"),
    "Results": ("output", "save_embeddings", "predictions", "json", "pictures", "report", "ranks"),
}
_REST = "Data"


class PlainCommand(TyperCommand):
    """A command whose options have this look."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        options: list[Any] = list(self.params)
        names = [option.name for option in options]
        for option in options:
            give_look(option)
            if "checkpoint" in names and option.param_type_name == "option" and not option.rich_help_panel:
                found = (group for group, members in _GROUPS.items() if option.name in members)
                option.rich_help_panel = next(found, _REST)

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option ``--help``."""
        return give_look(super().get_help_option(ctx))


def give_look(option: Any) -> Any:
    """Give an option of typer the look, and return it. Bounds of a number that is no integer are floats."""
    flag = getattr(option, "is_flag", False)
    least = getattr(option, "min", None)
    if flag:
        option.metavar = ""
    elif least is not None:
        option.metavar = "<float>" if isinstance(least, float) else "<int>"
    if getattr(option, "show_default", False) and option.default is not None and option.default != "":
        if not flag and option.help:
            option.help += f" Default: {option.default}."
        option.show_default = False
    return option
