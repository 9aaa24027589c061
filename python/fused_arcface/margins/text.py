"""A margin as text: what command lines and configuration files hold. ``ArcFace(0.5, boundary='fold')`` is a margin's
own repr."""

from __future__ import annotations

import ast
import importlib
import re

from ..base.suggest import did_you_mean
from ..head import MarginHead
from ..partial_fc import PartialFC
from .angular import Margin


def parse_margin(text: str) -> Margin:
    """The margin that a text names: one of this package's with its arguments, its name in any case, or ``MODULE:NAME``
    for a callable of one's own.

    Raises:
        ValueError: no such margin, or arguments that it does not take.

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
    """Check a margin's text as :func:`parse_margin` would, but import nothing: of ``MODULE:NAME`` the form alone.

    Raises:
        ValueError: see there.
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
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except _UnknownMargin as unknown:
        names = [each.__name__ for each in _margins().values()]
        near = did_you_mean(str(unknown), names)
        raise ValueError(f"margin must be one of {', '.join(names)}, or MODULE:NAME; got {text!r}{near}") from None
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"margin {text!r}: {error}") from None


class _UnknownMargin(Exception):
    """A name that is no margin's."""


def _value(node: ast.expr) -> object:
    """A margin, made of its name or its call, also inside another's; or a number, a text, None."""
    if not isinstance(node, (ast.Call, ast.Name)):
        value: object = ast.literal_eval(node)
        return value
    name = node.func if isinstance(node, ast.Call) else node
    known = _margins()
    if not isinstance(name, ast.Name) or name.id.lower() not in known:
        raise _UnknownMargin(ast.unparse(name))
    make = known[name.id.lower()]
    if isinstance(node, ast.Name):
        return make()
    return make(*map(_value, node.args), **{str(each.arg): _value(each.value) for each in node.keywords})


def _margins() -> dict[str, type]:
    """The package's margins by their names in small letters."""
    import fused_arcface as package

    public = [getattr(package, name) for name in package.__all__]
    return {each.__name__.lower(): each for each in public if _makes_margins(each)}


def _makes_margins(public: object) -> bool:
    """Whether a public name is a class whose instances are called with cosines: margins are, and heads with rows."""
    if not isinstance(public, type) or issubclass(public, (MarginHead, PartialFC)):
        return False
    return any("__call__" in vars(base) for base in public.__mro__)


def _own(text: str) -> object:
    module, _, name = text.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"margin {text!r} cannot be imported: {error}") from None
    return found() if isinstance(found, type) else found
