"""Margins as text, for command lines and configuration files.

A margin's own repr, such as ``ArcFace(0.5, boundary='fold')``, is its text.
"""

from __future__ import annotations

import ast
import importlib
import re

from ..base.suggest import did_you_mean
from .protocol import Margin
from .registry import REGISTRY


def parse_margin(text: str) -> Margin:
    """Return the margin that a text names.

    Args:
        text: a margin of this package with its arguments, or its name alone, in any case; or ``MODULE:NAME`` of a
            user's own callable. A class is called without arguments.

    Raises:
        ValueError: if there is no such margin, or it does not take the arguments.

    >>> parse_margin("cosface(0.4)")
    CosFace(margin=0.4)
    >>> parse_margin("MVSoftmax(CosFace(0.3), t=1.2)")
    MVSoftmax(margin=CosFace(margin=0.3), t=1.2, kind='adaptive', form='code')
    >>> parse_margin("ArcFace")
    ArcFace(margin=0.5, boundary='hard', gradient='exact')
    """
    margin = _own(text) if ":" in text and "(" not in text else _named(text)
    if not callable(margin):
        raise ValueError(f"margin must be a margin or MODULE:NAME of a callable; got {text!r}")
    return margin


def check_margin(text: str) -> None:
    """Check a margin's text without an import: of ``MODULE:NAME`` only the form is checked.

    Raises:
        ValueError: as :func:`parse_margin`.
    """
    if ":" not in text or "(" in text:
        parse_margin(text)
    elif imported_module(text) is None:
        raise ValueError(f"margin must be a margin or MODULE:NAME of a callable; got {text!r}")


def imported_module(text: str) -> str | None:
    """Return the module whose code runs when :func:`parse_margin` resolves the text; None for this package's margins.

    >>> imported_module("mine.margins:Steep")
    'mine.margins'
    >>> imported_module("ArcFace(0.5)")
    """
    found = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):[^\W\d]\w*", text)
    return found[1] if found else None


def _named(text: str) -> object:
    """Return the margin of this package that a text names."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except LookupError as unknown:
        names = [entry.name for entry in REGISTRY]
        near = did_you_mean(str(unknown), names)
        raise ValueError(f"margin must be one of {', '.join(names)}, or MODULE:NAME; got {text!r}{near}") from None
    except SyntaxError as error:
        raise ValueError(f"margin {text!r}: {error.msg}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"margin {text!r}: {error}") from None


def _value(node: ast.expr) -> object:
    """Return the margin of a name or a call, also inside another call; or a literal's value.

    Raises:
        LookupError: for a name that no margin has.
    """
    if not isinstance(node, (ast.Call, ast.Name)):
        value: object = ast.literal_eval(node)
        return value
    name = node.func if isinstance(node, ast.Call) else node
    known = {entry.name.lower(): entry.margin for entry in REGISTRY}
    if not isinstance(name, ast.Name) or name.id.lower() not in known:
        raise LookupError(ast.unparse(name))
    make = known[name.id.lower()]
    if isinstance(node, ast.Name):
        return make()
    return make(*map(_value, node.args), **{str(each.arg): _value(each.value) for each in node.keywords})


def _own(text: str) -> object:
    """Return the callable that ``MODULE:NAME`` names, an instance if it is a class."""
    module, _, name = text.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"margin {text!r} cannot be imported: {error}") from None
    return found() if isinstance(found, type) else found
