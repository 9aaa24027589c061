"""``gradcheck``: every margin, boundary, backend and dtype against the reference in fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.progress import track
from rich.table import Table

from .terminal import terminal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fused_arcface.margins.angular import Margin

QUANTITIES = ("loss", "d_embeddings", "d_weight")
DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# What an error may exceed twice the reference's own in the same dtype by: some roundings of the dtype that is computed
# in, an exponent's multiplied by s = 64, and for a gradient one rounding to the dtype that it is stored in.
COMPUTED = {"float64": 5e-13, "float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6}
STORED = {"float64": 0.0, "float32": 0.0, "bfloat16": 4e-3, "float16": 5e-4}
SCALE = 64.0
# Angles in radians to the target's center. They lie well before and past the boundaries of the margins that are
# checked, and away from their jumps: at θ = π/2 (easy), θ = π - 0.5 (hard), 1.7·θ = π and 1.2·θ + 0.4 = π.
ANGLES = (0.02, 0.3, 0.8, 1.2, 1.7, 2.1, 2.9, 3.1)


class Problem(NamedTuple):
    """Inputs in fp64; a dtype's are these, rounded."""

    embeddings: Tensor
    """(N, D)"""
    weight: Tensor
    """(C, D)"""
    target: Tensor
    """(N,)"""
    margin: Margin
    scale: float
    options: dict[str, Any]
    """Further ones of the loss."""


def gradcheck(
    backend: Annotated[str, typer.Option(help="A backend's name, or all usable ones.")] = "all",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}, or all.")] = "all",
    failures: Annotated[bool, typer.Option("--failures", help="List only what fails.")] = False,
) -> None:
    """Check loss and gradients of every margin, boundary, backend and dtype; exit status 1 if one fails.

    An error is the largest difference to the fp64 reference on the same
    inputs, relative to the largest value. Twice the error of the reference
    computed in that dtype is allowed, plus a few roundings. In fp64, exact
    gradients are compared with finite differences as well
    (torch.autograd.gradcheck).
    """
    from fused_arcface import backends
    from fused_arcface.base.options import HeadOptions

    backend = backend if backend == "all" else backends.canonical(backend)
    available = backends.available()
    if backend != "all" and backend not in available:
        raise typer.BadParameter(f"--backend must be all or one of {', '.join(available)}; got {backend}")
    if backend != "all" and available[backend] is not None:
        raise typer.BadParameter(f"--backend {backend} is not available: {available[backend]}")
    usable = [name for name, reason in available.items() if reason is None and backend in ("all", name)]
    if dtype != "all" and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype must be all or one of {', '.join(DTYPES)}; got {dtype}")
    chosen = tuple(DTYPES) if dtype == "all" else (dtype,)

    console = terminal()
    cases = [
        (name, margin, options, each)
        for name in usable
        for margin, options in subjects()
        if all(backends.has(name, feature) for feature in HeadOptions(margin, **options).needs())
        for each in chosen
    ]
    tables = {name: _table(name) for name in usable}
    failed = 0
    for name, margin, options, each in track(cases, "checking", console=console, transient=True):
        found = check(name, margin, each, options)
        failed += not found.passed
        if not (failures and found.passed):
            tables[name].add_row(describe(margin, options), DTYPES[each], *found.cells())
    for table in tables.values():
        if table.row_count:
            console.print(table)
            console.print()
    console.print("ST: straight-through gradient. fd: finite differences agree as well.", highlight=False)
    console.print("K: centers of each class. ε: label smoothing.", highlight=False)
    color = "red" if failed else "green"
    console.print(f"[bold {color}]{len(cases) - failed} of {len(cases)} combinations pass[/]", highlight=False)
    if failed:
        raise typer.Exit(1)


def _table(backend: str) -> Table:
    title = f"backend {backend}: largest relative errors against the reference in fp64"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for heading in ("margin", "dtype", *QUANTITIES, "allowed", "result"):
        table.add_column(heading, justify="right" if heading in (*QUANTITIES, "allowed") else "left", no_wrap=True)
    return table


class Check(NamedTuple):
    """What one combination gave."""

    errors: dict[str, float]
    allowed: dict[str, float]
    numerical: bool | None
    """Whether finite differences agree; None where they were not taken."""

    @property
    def passed(self) -> bool:
        # Not "none is greater": an error that is NaN is a failure.
        return all(self.errors[q] <= self.allowed[q] for q in QUANTITIES) and self.numerical is not False

    def cells(self) -> list[str]:
        """Errors, what the gradients' may be, and the result, for a table."""
        errors = []
        for quantity in QUANTITIES:
            color = "default" if self.errors[quantity] <= self.allowed[quantity] else "bold red"
            errors.append(f"[{color}]{self.errors[quantity]:.1e}[/]")
        result = "[green]pass[/]" if self.passed else "[bold red]FAIL[/]"
        numerical = {None: "", True: ", fd", False: ", fd differ"}[self.numerical]
        return [*errors, f"{max(self.allowed.values()):.1e}", result + numerical]


def check(backend: str, margin: Margin, dtype: str, options: dict[str, Any] | None = None) -> Check:
    """Check one combination; ``options`` are further ones of the loss."""
    import torch

    problem = sample_problem(margin, options, device=device_of(backend))
    errors = errors_against_fp64(backend, getattr(torch, dtype), problem)
    eager = errors_against_fp64(None, getattr(torch, dtype), problem)
    allowed = {
        quantity: 2 * eager[quantity] + COMPUTED[dtype] + (quantity != "loss") * STORED[dtype]
        for quantity in QUANTITIES
    }
    return Check(errors, allowed, numerical_gradcheck(backend, margin, options) if dtype == "float64" else None)


def margins() -> Iterator[Margin]:
    """Every margin, each boundary and gradient mode that it has, and a user's own function."""
    from typing import get_args

    from fused_arcface import (
        ArcFace,
        CombinedMargin,
        CosFace,
        InterclassFilter,
        MagFace,
        MVSoftmax,
        NormSoftmax,
        SphereFace,
    )
    from fused_arcface.margins.angular import Boundary, GradientMode

    yield NormSoftmax()
    yield CosFace(0.35)
    for gradient in get_args(GradientMode):
        yield SphereFace(1.7, gradient)
        for boundary in get_args(Boundary):
            yield ArcFace(0.5, boundary, gradient)
            yield CombinedMargin(1.2, 0.4, 0.1, boundary, gradient)
    yield squared
    yield from stateful_margins()
    yield MagFace(lower_norm=0.7, upper_norm=1.8)  # of the problem's norms, most within
    yield MVSoftmax(CosFace(0.35))
    yield MVSoftmax(kind="fixed")
    yield InterclassFilter(ArcFace(), 0.2)


def stateful_margins() -> Iterator[Margin]:
    """Those with a state, as after some training."""
    from fused_arcface import AdaFace, CurricularFace, ElasticFace

    adaptive = AdaFace()
    adaptive.norm_mean.fill_(1.2)
    adaptive.norm_std.fill_(0.4)
    curricular = CurricularFace()
    curricular.t.fill_(0.4)
    yield from (adaptive, ElasticFace(), ElasticFace(0.35, kind="cos"), curricular)


def subjects() -> Iterator[tuple[Margin, dict[str, Any]]]:
    """Every margin, and with one of them the options of the loss."""
    from fused_arcface import ArcFace

    for margin in margins():
        yield margin, {}
    yield ArcFace(), {"sub_centers": 3}
    yield ArcFace(), {"label_smoothing": 0.1}


def squared(target_cosine: Tensor) -> Tensor:
    """A margin as a user may write one."""
    return target_cosine - 0.1 * (1 + target_cosine) ** 2


_GRADIENT = {"straight_through": "ST"}
_OPTIONS = {"sub_centers": "K", "label_smoothing": "ε"}


def describe(margin: Margin, options: dict[str, Any] | None = None) -> str:
    """A margin in a table: its name, boundary and gradient mode; and the loss's further options."""
    if margin is squared:
        return "a function"
    parts = [getattr(margin, name, "") for name in ("kind", "boundary")]
    parts.append(_GRADIENT.get(getattr(margin, "gradient", ""), ""))
    parts += [f"{_OPTIONS[name]}={value}" for name, value in (options or {}).items()]
    return " ".join(filter(None, (type(margin).__name__, *parts)))


def device_of(backend: str) -> str:
    """The kind of device that a backend is checked on."""
    return "cuda" if backend in ("triton", "cuda") else "cpu"


def sample_problem(
    margin: Margin | None = None,
    options: dict[str, Any] | None = None,
    *,
    rows: int = 16,
    classes: int = 50,
    dim: int = 32,
    scale: float = SCALE,
    device: str = "cpu",
    angles: tuple[float, ...] = ANGLES,
) -> Problem:
    """Embeddings at given angles to their class centers, norms from 0.5 to 2; the same for the same arguments."""
    import torch
    import torch.nn.functional as F

    from fused_arcface import ArcFace

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sub_centers = (options or {}).get("sub_centers", 1)
    weight, target = normal(classes * sub_centers, dim), torch.randint(classes, (rows,), generator=generator)
    center = F.normalize(weight[target * sub_centers])
    aside = normal(rows, dim)
    aside = F.normalize(aside - (aside * center).sum(1, keepdim=True) * center)
    theta = torch.tensor(angles, dtype=torch.float64).repeat(rows // len(angles) + 1)[:rows, None]
    norm = 0.5 + 1.5 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    embeddings = norm * (theta.cos() * center + theta.sin() * aside)
    tensors = embeddings.to(device), weight.to(device), target.to(device)
    return Problem(*tensors, margin or ArcFace(), scale, options or {})


def errors_against_fp64(backend: str | None, dtype: torch.dtype, problem: Problem) -> dict[str, float]:
    """Relative error of loss and both gradients, by :data:`QUANTITIES`, of a backend, or of the reference itself
    (None)."""
    import torch

    from fused_arcface import margin_softmax_loss, reference

    embeddings, weight = problem.embeddings.to(dtype), problem.weight.to(dtype)

    def loss(embeddings: Tensor, weight: Tensor, backend: str | None) -> Tensor:
        # A margin with a state starts from the same one.
        common = {"margin": copy.deepcopy(problem.margin), "scale": problem.scale, "reduction": "none"}
        common |= problem.options
        if backend is None:
            return reference.margin_softmax_loss(embeddings, weight, problem.target, **common)  # type: ignore
        return margin_softmax_loss(embeddings, weight, problem.target, backend=backend, **common)  # type: ignore

    def results(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (embeddings, weight)]
        rows = loss(leaves[0], leaves[1], backend)
        return [rows.detach(), *torch.autograd.grad(rows.mean(), leaves)]

    expected = results(torch.float64, None)
    found = results(dtype, backend)
    return {
        quantity: float((a.double() - b).abs().max() / b.abs().max())
        for quantity, a, b in zip(QUANTITIES, found, expected, strict=True)
    }


def numerical_gradcheck(backend: str, margin: Margin, options: dict[str, Any] | None = None) -> bool | None:
    """torch.autograd.gradcheck of a small problem in fp64; None where a straight-through gradient is no derivative.

    What a margin takes as given, with no gradient, is held: AdaFace's norms; the state of those that have one.
    """
    import torch
    import torch.nn.functional as F

    from fused_arcface import AdaFace, margin_softmax_loss

    if getattr(margin, "gradient", "exact") != "exact":
        return None
    # Moderate angles and scale: finite differences lose their digits where the loss is curved most.
    angles = (0.3, 0.8, 1.2, 1.7, 2.1, 2.9)
    sizes = {"rows": 6, "classes": 7, "dim": 5}
    problem = sample_problem(margin, options, **sizes, scale=8.0, device=device_of(backend), angles=angles)
    norms = problem.embeddings.norm(dim=1, keepdim=True)

    def loss(embeddings: Tensor, weight: Tensor) -> Any:
        if isinstance(margin, AdaFace):
            embeddings = norms * F.normalize(embeddings)
        held = copy.deepcopy(margin)
        if isinstance(held, torch.nn.Module):
            held.eval()
        arguments = {"margin": held, "scale": problem.scale, "reduction": "none", "backend": backend}
        return margin_softmax_loss(embeddings, weight, problem.target, **arguments, **problem.options)  # type: ignore

    leaves = (problem.embeddings.requires_grad_(), problem.weight.requires_grad_())
    return bool(torch.autograd.gradcheck(loss, leaves, raise_exception=False, fast_mode=False))
