"""``doctor``: versions, devices, and the backends that can be used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import typer
from rich.table import Column, Table

from .terminal import terminal


def doctor() -> None:
    """Show versions, devices and backends; exit status 1 if even plain PyTorch fails."""
    console = terminal()
    try:
        import torch

        import fused_arcface
    except ImportError as error:
        console.print(f"fused_arcface cannot be imported: {error}", style="bold red", markup=False)
        raise typer.Exit(1) from None

    from ..measure.machine import processors

    facts = _table(f"fused_arcface {fused_arcface.__version__}")
    available = fused_arcface.backends.available()
    facts.add_row("python", f"{platform.python_version()} ({sys.executable})")
    facts.add_row("package", os.path.dirname(fused_arcface.__file__))
    facts.add_row("torch", torch.__version__)
    for library in ("triton", "numpy"):
        facts.add_row(library, _version(library))
    facts.add_row("system", f"{platform.system()} {platform.machine()}")
    facts.add_row("CPU", f"{processors()} processors usable, torch uses {torch.get_num_threads()} threads")
    facts.add_row("CPU kernels", fused_arcface.backends.describe("cpu") if available["cpu"] is None else "none")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        facts.add_row(f"cuda:{index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if available["cuda"] is None:
        facts.add_row("Hopper kernels", fused_arcface.backends.describe("cuda"))
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"no device found (torch is built for CUDA {built})" if built else "torch is built without it"
        facts.add_row("CUDA", why)
    console.print(facts)

    backends = _table("backends", Column())
    works = {}
    for name, reason in available.items():
        problem = reason or _trial(name)
        works[name] = problem is None
        mark = "[green]usable[/]" if works[name] else "[red]fails[/]" if reason is None else "[yellow]missing[/]"
        backends.add_row(name, mark, problem or "")
    console.print(backends)
    chosen = fused_arcface.backends.select("auto", torch.device("cpu"))
    console.print(f'"auto" takes on the CPU: {chosen}', highlight=False)
    if not works["torch"]:
        raise typer.Exit(1)


def _table(title: str, *between: Column) -> Table:
    columns = (Column(style="bold", no_wrap=True), *between, Column(overflow="fold"))
    return Table(*columns, title=title, title_justify="left", show_header=False)


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _trial(name: str) -> str | None:
    """Return the fault in the loss and gradients of one small batch by an available backend, None if they are right."""
    import numpy as np
    import torch

    from ..agreement import device_of, errors_against_fp64, sample_problem

    try:
        problem = sample_problem(rows=9, classes=33, dim=24, device=device_of(name))
        worst = np.max([*errors_against_fp64(name, torch.float32, problem).values()])  # NaN if one of them is
    except Exception as error:  # a broken installation may raise any error, and the user wants to see it
        return f"{type(error).__name__}: {error}"
    return None if worst <= 1e-4 else f"wrong result: relative error {worst:.1e} in fp32"
