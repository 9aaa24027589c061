"""``doctor``: what is installed, what the machine has, and which backends can be used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import typer
from rich.table import Table

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

    facts = Table(title=f"fused_arcface {fused_arcface.__version__}", title_justify="left", show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("python", f"{platform.python_version()} ({sys.executable})")
    facts.add_row("package", os.path.dirname(fused_arcface.__file__))
    facts.add_row("torch", torch.__version__)
    for library in ("triton", "numpy"):
        facts.add_row(library, _version(library))
    facts.add_row("system", f"{platform.system()} {platform.machine()}")
    facts.add_row("CPU", _processor(torch.get_num_threads()))
    facts.add_row("CPU kernels", _instruction_set())
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        facts.add_row(f"cuda:{index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if fused_arcface.backends.available()["cuda"] is None:
        facts.add_row("Hopper kernels", fused_arcface.backends.describe("cuda"))
    if not torch.cuda.is_available():
        why = (
            f"no device found (torch is built for CUDA {torch.version.cuda})"
            if torch.version.cuda
            else "torch is built without it"
        )
        facts.add_row("CUDA", why)
    console.print(facts)

    backends = Table(title="backends", title_justify="left", show_header=False)
    backends.add_column(style="bold", no_wrap=True)
    backends.add_column()
    backends.add_column(overflow="fold")
    works = {}
    for name, reason in fused_arcface.backends.available().items():
        problem = reason or _trial(name)
        works[name] = problem is None
        mark = "[green]usable[/]" if works[name] else "[red]fails[/]" if reason is None else "[yellow]missing[/]"
        backends.add_row(name, mark, problem or "")
    console.print(backends)
    console.print(
        f'"auto" takes on the CPU: {fused_arcface.backends.select("auto", torch.device("cpu"))}', highlight=False
    )
    if not works["torch"]:
        raise typer.Exit(1)


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor(threads: int) -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} processors usable, torch uses {threads} threads"


def _instruction_set() -> str:
    """Return the instruction set in use, and the others that the compiled module has for this machine."""
    from fused_arcface import backends

    return "none" if backends.available()["cpu"] is not None else backends.describe("cpu")


def _trial(name: str) -> str | None:
    """Try loss and gradients of one small batch with an available backend.

    Returns:
        None if they are right, otherwise the fault.
    """
    import numpy as np
    import torch

    from ..agreement import device_of, errors_against_fp64, sample_problem

    try:
        problem = sample_problem(rows=9, classes=33, dim=24, device=device_of(name))
        worst = np.max([*errors_against_fp64(name, torch.float32, problem).values()])  # NaN if one of them is
    except Exception as error:  # whatever a broken installation raises is what the user came to see
        return f"{type(error).__name__}: {error}"
    return None if worst <= 1e-4 else f"wrong result: relative error {worst:.1e} in fp32"
