"""The implementations that are measured, each with its requirements, its formula and its number of products."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_arcface import backends
from fused_arcface.base.precision import fp32_products
from fused_arcface.functional import margin_softmax_loss

from . import peers
from .cases import Case, Inputs
from .names import OURS, PLAIN, chosen, is_fused, is_ours
from .truth import MARGIN, SCALE, Formula, PassResult

Run = Callable[[bool], PassResult]
"""Runs one pass over its inputs: with gradients (True) or the loss alone."""


@dataclass(frozen=True)
class Provider:
    """An implementation of the head, or a yardstick beside it."""

    name: str
    backend: str
    """The backend's name of ours; of others the library that computes."""
    formula: Formula
    open: Callable[[Inputs], Run]
    """Prepares a run over inputs, for example another layout of the class centers; this is not timed."""
    reason_against: Callable[[Case, torch.device], str | None]
    """Returns the reason why it cannot run a case on a device, or None."""
    products: tuple[int, int] = (2, 6)
    """Flops of its matrix products in units of N·C·D, without and with gradients."""
    environment: dict[str, str] = field(default_factory=dict)
    tf32: bool = False
    own_weight: bool = False
    """If true, a run holds the class centers in another layout in place of the inputs'."""
    tolerance: float | None = None
    """Relative error at which its result counts as right; None: by the dtypes. bf16 cosines cost 0.1 of a logit."""

    @property
    def is_ours(self) -> bool:
        return is_ours(self.name)

    @property
    def is_fused(self) -> bool:
        """True if it is ours and does not store the logits."""
        return is_fused(self.name, self.backend)

    def __str__(self) -> str:
        return f"{self.name} ({self.backend})"

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Make the process settings that its runs need, and put them back afterwards."""
        environment = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            with fp32_products(self.tf32):
                yield
        finally:
            for name, value in environment.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _differentiated(loss: peers.Loss) -> Callable[[Inputs], Run]:
    """Open runs of a loss over leaves that share the inputs' memory."""
    return lambda inputs: HeadRun(loss, *inputs)


class HeadRun:
    """Passes of a loss over new leaves that share the inputs' memory."""

    def __init__(self, loss: peers.Loss, embeddings: Tensor, weight: Tensor, target: Tensor, transposed: bool = False):
        self._loss, self._target, self._transposed = loss, target, transposed
        self._embeddings = embeddings.detach().requires_grad_()
        self.weight = weight if weight.requires_grad else weight.detach().requires_grad_()
        """The class centers, (C, D) or, transposed, (D, C): the leaf that an optimizer updates."""

    def __call__(self, backward: bool) -> PassResult:
        if not backward:
            with torch.no_grad():
                return PassResult(self._loss(self._embeddings, self.weight, self._target))
        self._embeddings.grad = self.weight.grad = None
        value = self.backward()
        outcome = PassResult(value, self._embeddings.grad, self.weight.grad)
        self._embeddings.grad = self.weight.grad = None
        if self._transposed and outcome.d_weight is not None:
            return outcome._replace(d_weight=outcome.d_weight.T)
        return outcome

    def backward(self) -> Tensor:
        """Return the mean loss (); leave its gradients where an optimizer looks for them."""
        value = self._loss(self._embeddings, self.weight, self._target)
        value.backward()
        return value.detach()


def _open_metric_learning(inputs: Inputs) -> Run:
    weight, loss = peers.metric_learning(inputs.weight)
    return HeadRun(loss, inputs.embeddings, weight, inputs.target, transposed=True)


def _open_products(inputs: Inputs) -> Run:
    x, w = inputs.embeddings, inputs.weight

    def run(backward: bool) -> PassResult:
        scores = x @ w.T
        return PassResult(scores[:, :64], scores @ w, scores.T @ x) if backward else PassResult(scores[:, :64])

    return run


def _open_products_preallocated(inputs: Inputs) -> Run:
    x, w = inputs.embeddings, inputs.weight
    kept: list[Tensor] = []

    def run(backward: bool) -> PassResult:
        if not kept:  # in the first pass, which warms up
            kept.extend((x.new_empty(x.shape[0], w.shape[0]), torch.empty_like(x), torch.empty_like(w)))
        scores, d_x, d_w = kept
        torch.mm(x, w.T, out=scores)
        if not backward:
            return PassResult(scores[:, :64])
        return PassResult(scores[:, :64], torch.mm(scores, w, out=d_x), torch.mm(scores.T, x, out=d_w))

    return run


def _needs(
    *, module: str = "", device: str = "", same_dtype: bool = False, weight_dtype: str = "", torch_has: str = ""
) -> Callable[[Case, torch.device], str | None]:
    def reason(case: Case, on: torch.device) -> str | None:
        if module and importlib.util.find_spec(module) is None:
            return f"the package {module} is not installed"
        if torch_has and not hasattr(torch.nn.functional, torch_has):
            return f"torch {torch.__version__} has no F.{torch_has}"
        if device and on.type != device:
            return f"runs on {device} only"
        if same_dtype and case.dtype != case.weight_dtype:
            return "takes embeddings and class centers of one dtype"
        if weight_dtype and weight_dtype not in (case.dtype, case.weight_dtype):
            return f"computes in {weight_dtype}"
        return None

    return reason


_OF_BF16_COSINES = 0.5  # times a logit's error at s = 64; a wrong formula is off by more in fp32, where it is tested
_OF_BF16_SUMS = 0.5  # of gradients that are added up in bf16, a part of the rows or classes after the other

# With more logits the plain backend would take a tenth of the whole run, and eager computes the same.
_PLAIN_LOGITS = 4_000_000


def _ours(name: str, backend: str, environment: dict[str, str] | None = None, tf32: bool = False) -> Provider:
    def loss(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        options: Any = {"margin": MARGIN, "scale": SCALE, "backend": backend}
        value: Tensor = margin_softmax_loss(embeddings, weight, target, **options)
        return value

    def reason(case: Case, device: torch.device) -> str | None:
        unusable = backends.available()[backend]
        if unusable is not None:
            return unusable
        try:
            backends.select(backend, device)
        except (RuntimeError, ValueError) as error:
            return str(error)
        if backend == "torch" and case.N * case.C > _PLAIN_LOGITS:
            return "does what eager does, slower; measured at small shapes"
        if (environment or {}).get("FUSED_ARCFACE_ISA") == "avx512" and case.dtype != "bfloat16":
            return "has the same kernels as avx512_bf16" if backends.load("cpu").isa() == "avx512_bf16" else None
        return "tf32 is a way to compute fp32" if tf32 and case.dtype != "float32" else None

    return Provider(name, backend, "margin", _differentiated(loss), reason, (2, 8), environment or {}, tf32)


def _all_ours() -> Iterator[Provider]:
    for backend in backends.available():
        yield _ours(OURS, backend)
    for isa in _slower_isas():
        yield _ours(f"{OURS}-{isa}", "cpu", {"FUSED_ARCFACE_ISA": isa})
    for backend in backends.available():
        if backend not in ("cpu", *PLAIN):  # a way to compute that only GPUs have
            yield _ours(f"{OURS}-tf32", backend, tf32=True)


def _slower_isas() -> Sequence[str]:
    """Return the instruction sets of the CPU backend on this machine, without the one that it chooses itself."""
    if backends.available()["cpu"] is not None:
        return ()
    from fused_arcface import _native

    return [isa for isa in _native.isas() if isa != backends.load("cpu").isa()]


def all_providers() -> tuple[Provider, ...]:
    """Return every provider that this package knows, usable here or not, ours first."""
    fp32 = _needs(same_dtype=True, weight_dtype="float32")
    fp32_cuda = _needs(same_dtype=True, weight_dtype="float32", device="cuda")
    same = _needs(same_dtype=True)

    def lazily_compiled(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return peers.compiled()(embeddings, weight, target)

    def lazily_compiled_plain(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return peers.compiled_plain()(embeddings, weight, target)

    insightface_fp16 = partial(peers.insightface, fp16=True)
    chunked = partial(peers.linear_cross_entropy, chunked=True)
    torch_linear = _needs(torch_has="linear_cross_entropy", same_dtype=True)

    def torch_linear_chunked(case: Case, device: torch.device) -> str | None:
        # torch's documentation of LinearCrossEntropyOptions; at fewer rows it is some twenty times slower than without
        # chunks.
        return torch_linear(case, device) or (None if case.N >= case.D else "torch advises its chunks for N >= D")

    straight: Formula = "straight_through"
    linear: Formula = "linear"
    return (
        *_all_ours(),
        Provider("eager", "torch", "margin", _differentiated(peers.eager), _needs()),
        Provider("plain", "torch", "margin", _differentiated(peers.plain), same, tolerance=_OF_BF16_COSINES),
        Provider(
            "plain-autocast",
            "torch",
            "margin",
            _differentiated(peers.plain_under_autocast),
            _needs(weight_dtype="bfloat16"),
            tolerance=_OF_BF16_COSINES,
        ),
        Provider("compiled", "torch", "margin", _differentiated(lazily_compiled), _needs()),
        Provider(
            "compiled-plain",
            "torch",
            "margin",
            _differentiated(lazily_compiled_plain),
            _needs(device="cuda", same_dtype=True),
            tolerance=_OF_BF16_COSINES,
        ),
        Provider("insightface", "torch", straight, _differentiated(peers.insightface), fp32),
        Provider("insightface-tf32", "torch", straight, _differentiated(peers.insightface), fp32_cuda, tf32=True),
        Provider("insightface-fp16", "torch", straight, _differentiated(insightface_fp16), fp32_cuda),
        Provider(
            "pytorch-metric-learning",
            "torch",
            "margin",
            _open_metric_learning,
            _needs(module="pytorch_metric_learning", same_dtype=True),
            own_weight=True,
        ),
        Provider("linear_cross_entropy", "torch", linear, _differentiated(peers.linear_cross_entropy), torch_linear),
        Provider("linear_cross_entropy-chunked", "torch", linear, _differentiated(chunked), torch_linear_chunked),
        Provider(
            "cut_cross_entropy",
            "triton",
            linear,
            _differentiated(peers.cut_cross_entropy),
            _needs(module="cut_cross_entropy", device="cuda", same_dtype=True, weight_dtype="bfloat16"),
            (2, 8),
            tolerance=_OF_BF16_SUMS,
        ),
        Provider(
            "liger",
            "triton",
            linear,
            _differentiated(peers.liger),
            _needs(module="liger_kernel", device="cuda", same_dtype=True),
            tolerance=_OF_BF16_SUMS,
        ),
        Provider("products", "torch", "products", _open_products, same),
        Provider("products-preallocated", "torch", "products", _open_products_preallocated, same),
    )


def select(names: Sequence[str] | None = None, backend: str | None = None) -> tuple[Provider, ...]:
    """Return the providers of some names, see :func:`~fused_arcface.app.benchmark.names.chosen`.

    >>> [str(provider) for provider in select(["fused_arcface", "eager"], backend="cpu")]
    ['fused_arcface (cpu)', 'eager (torch)']
    """
    known = backends.available()
    backend = None if backend is None else backends.canonical(backend)
    if backend is not None and backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}; got {backend!r}")
    return chosen(all_providers(), names, backend)
