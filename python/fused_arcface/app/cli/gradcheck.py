"""``gradcheck``: every margin, boundary, backend and dtype against the reference in fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track
from rich.table import Column, Table

from .errors import WrongOption, one_of
from .tables import numbers, titled
from .terminal import terminal

if TYPE_CHECKING:
    from fused_arcface.margins import Margin

    from ..agreement import Agreement

DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def gradcheck(
    backend: Annotated[str, "Name of a backend, or all for every usable one."] = "all",
    dtype: Annotated[
        str,
        typer.Option(callback=one_of("--dtype", (*DTYPES, "all"))),
        f"Dtype to check: one of {', '.join(DTYPES)}, or all.",
    ] = "all",
    failures: Annotated[bool, typer.Option("--failures"), "List only what fails."] = False,
) -> None:
    """Check loss and gradients of every margin, boundary, backend and dtype; exit status 1 if one fails.

    An error is the largest difference from plain PyTorch in fp64 on the same
    inputs, relative to the largest value. The limit is twice the error of
    plain PyTorch in the checked dtype, plus a few roundings. In fp64, exact
    gradients are also compared with finite differences
    (torch.autograd.gradcheck).
    """
    import torch

    from fused_arcface import backends
    from fused_arcface.base.options import HeadOptions

    from .. import agreement

    backend = backend if backend == "all" else backends.canonical(backend)
    available = backends.available()
    if backend != "all" and backend not in available:
        raise WrongOption(f"--backend must be all or one of {', '.join(available)}; got {backend}")
    if backend != "all" and available[backend] is not None:
        raise WrongOption(f"--backend {backend} is not available: {available[backend]}")
    usable = [name for name, reason in available.items() if reason is None and backend in ("all", name)]
    chosen = tuple(DTYPES) if dtype == "all" else (dtype,)

    console = terminal()
    cases = [
        (name, margin, options, each)
        for name in usable
        for margin, options in agreement.subjects()
        if all(backends.has(name, feature) for feature in HeadOptions(margin, **options).needs())
        for each in chosen
    ]
    tables = {name: _table(name, agreement.QUANTITIES) for name in usable}
    failed = 0
    for name, margin, options, each in track(cases, "checking", console=console, transient=True):
        found = agreement.check(name, margin, getattr(torch, each), options)
        failed += not found.passed
        if not (failures and found.passed):
            tables[name].add_row(_describe(margin, options), DTYPES[each], *_cells(found))
    for table in tables.values():
        if table.row_count:
            console.print(table, "")
    console.print("ST: straight-through gradient. fd: finite differences agree as well.", highlight=False)
    console.print("K: centers of each class. ε: label smoothing.", highlight=False)
    color = "red" if failed else "green"
    console.print(f"[bold {color}]{len(cases) - failed} of {len(cases)} combinations pass[/]", highlight=False)
    if failed:
        raise typer.Exit(1)


def _table(backend: str, quantities: tuple[str, ...]) -> Table:
    """Return an empty table for the results of one backend."""
    title = f"backend {backend}: largest relative errors against the reference in fp64"
    names = [Column(heading, no_wrap=True) for heading in ("margin", "dtype", "result")]
    columns = (*names[:2], *numbers(*quantities, "allowed", no_wrap=True), names[2])
    return titled(title, *columns, box=None, padding=(0, 1, 0, 0))


def _cells(found: Agreement) -> list[str]:
    """Return the errors, the largest allowed one and the result, for a row of the table."""
    errors = []
    for quantity, error in found.errors.items():
        color = "default" if error <= found.allowed[quantity] else "bold red"
        errors.append(f"[{color}]{error:.1e}[/]")
    result = "[green]pass[/]" if found.passed else "[bold red]FAIL[/]"
    numerical = {None: "", True: ", fd", False: ", fd differ"}[found.numerical]
    return [*errors, f"{max(found.allowed.values()):.1e}", result + numerical]


_OPTIONS = {"sub_centers": "K", "label_smoothing": "ε"}


def _describe(margin: Margin, options: dict[str, Any]) -> str:
    """Return a margin's name, kind, boundary and gradient mode, and the loss's further options."""
    name = "a function" if hasattr(margin, "__name__") else type(margin).__name__
    parts = [getattr(margin, name, "") for name in ("kind", "boundary")]
    parts.append("ST" if getattr(margin, "gradient", "") == "straight_through" else "")
    parts += [f"{_OPTIONS[name]}={value}" for name, value in options.items()]
    return " ".join(filter(None, (name, *parts)))
