"""The implementations that are measured, each with its requirements and the formula that it computes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_arcface import backends
from fused_arcface.base.precision import fp32_products
from fused_arcface.functional import margin_softmax_loss

from . import peers
from .cases import Case, Inputs
from .names import OURS, PLAIN, Named, chosen
from .truth import MARGIN, SCALE, Formula, PassResult

Run = Callable[[bool], PassResult]
"""Runs one pass over its inputs: with gradients (True) or the loss alone."""
Reason = Callable[[Case, torch.device], str | None]
"""Returns the reason why an implementation cannot run a case on a device, or None."""


@dataclass(frozen=True)
class Provider(Named):
    """An implementation of the head, or a yardstick beside it."""

    formula: Formula
    open: Callable[[Inputs], Run]
    """Prepares a run over inputs, for example another layout of the class centers; this is not timed."""
    reason_against: Reason
    products: tuple[int, int] = (2, 6)
    """Flops of its matrix products in units of N·C·D, without and with gradients."""
    environment: dict[str, str] = field(default_factory=dict)
    tf32: bool = False
    own_weight: bool = False
    """If true, a run holds the class centers in another layout, and the inputs' are not needed."""
    tolerance: float | None = None
    """Largest relative error of a right result if an input is bf16. None: the same as for other providers."""

    def timed(self, inputs: Inputs, backward: bool) -> Callable[[], PassResult]:
        """Return a function that makes the settings and runs one pass."""
        run = self.open(inputs)

        def timed() -> PassResult:
            with self.settings():
                return run(backward)

        return timed

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


class HeadRun:
    """Passes of a loss over new leaves that share the inputs' memory."""

    def __init__(self, loss: peers.Loss, inputs: Inputs, transposed: bool = False) -> None:
        self._loss, self._target, self._transposed = loss, inputs.target, transposed
        self._embeddings = inputs.embeddings.detach().requires_grad_()
        self.weight = inputs.weight if inputs.weight.requires_grad else inputs.weight.detach().requires_grad_()
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
    return HeadRun(loss, inputs._replace(weight=weight), transposed=True)


def _open_products(inputs: Inputs, preallocated: bool = False) -> Run:
    x, w, _ = inputs
    results: list[Tensor | None] = [None, None, None]  # None: new memory in each pass

    def run(backward: bool) -> PassResult:
        if preallocated and results[0] is None:  # in the first pass, which warms up
            results[:] = x.new_empty(x.shape[0], w.shape[0]), torch.empty_like(x), torch.empty_like(w)
        scores = torch.mm(x, w.T, out=results[0])
        if not backward:
            return PassResult(scores[:, :64])
        return PassResult(scores[:, :64], torch.mm(scores, w, out=results[1]), torch.mm(scores.T, x, out=results[2]))

    return run


@dataclass(frozen=True)
class Needs:
    """The requirements of an implementation. A call returns the reason why a case on a device does not meet them."""

    module: str = ""
    device: str = ""
    same_dtype: bool = False
    weight_dtype: str = ""
    torch_has: str = ""
    """A function of ``torch.nn.functional``."""
    chunked: bool = False
    """If true, torch divides the rows into chunks."""

    def __call__(self, case: Case, device: torch.device) -> str | None:
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"the package {self.module} is not installed"
        if self.torch_has and not hasattr(torch.nn.functional, self.torch_has):
            return f"torch {torch.__version__} has no F.{self.torch_has}"
        if self.device and device.type != self.device:
            return f"runs on {self.device} only"
        if self.same_dtype and case.dtype != case.weight_dtype:
            return "takes embeddings and class centers of one dtype"
        if self.weight_dtype and self.weight_dtype not in (case.dtype, case.weight_dtype):
            return f"computes in {self.weight_dtype}"
        # See torch's documentation of LinearCrossEntropyOptions. With fewer rows, chunks make the loss about twenty
        # times slower.
        return "torch advises its chunks for N >= D" if self.chunked and case.N < case.D else None


# The tolerance of providers whose cosines are bf16, which changes a logit by 0.1 at s = 64, or which add the gradients
# of parts of the rows or classes in bf16. A wrong formula is found in fp32.
_ROUGH = 0.5

# With more logits our backend in plain PyTorch would take a tenth of the whole run, and eager computes the same.
_PLAIN_LOGITS = 4_000_000


def _ours(name: str, backend: str, isa: str = "", tf32: bool = False) -> Provider:
    loss: Any = partial(margin_softmax_loss, margin=MARGIN, scale=SCALE, backend=backend)
    environment = {"FUSED_ARCFACE_ISA": isa} if isa else {}
    reason = partial(_reason_against_ours, backend, isa, tf32)
    return Provider(name, backend, "margin", partial(HeadRun, loss), reason, (2, 8), environment, tf32)


def _reason_against_ours(backend: str, isa: str, tf32: bool, case: Case, device: torch.device) -> str | None:
    unusable = backends.available()[backend]
    if unusable is not None:
        return unusable
    try:
        backends.select(backend, device)
    except (RuntimeError, ValueError) as error:
        return str(error)
    if backend == "torch" and case.N * case.C > _PLAIN_LOGITS:
        return "does what eager does, slower; measured at small shapes"
    if isa == "avx512" and case.dtype != "bfloat16":
        return "has the same kernels as avx512_bf16" if backends.load("cpu").isa() == "avx512_bf16" else None
    return "tf32 is a way to compute fp32" if tf32 and case.dtype != "float32" else None


def _all_ours() -> Iterator[Provider]:
    for backend in backends.available():
        yield _ours(OURS, backend)
    for isa in _slower_isas():
        yield _ours(f"{OURS}-{isa}", "cpu", isa)
    for backend in backends.available():
        if backend not in ("cpu", *PLAIN):  # only GPUs compute in tf32
            yield _ours(f"{OURS}-tf32", backend, tf32=True)


def _slower_isas() -> list[str]:
    """Return the instruction sets of the CPU backend on this machine, without the one that it chooses itself."""
    if backends.available()["cpu"] is not None:
        return []
    from fused_arcface import _native

    return [isa for isa in _native.isas() if isa != backends.load("cpu").isa()]


def all_providers() -> tuple[Provider, ...]:
    """Return every provider that this package knows, usable here or not, ours first."""
    same, same_cuda = Needs(same_dtype=True), Needs(same_dtype=True, device="cuda")
    fp32, fp32_cuda = (replace(each, weight_dtype="float32") for each in (same, same_cuda))
    torch_linear = Needs(same_dtype=True, torch_has="linear_cross_entropy")
    cut = Needs("cut_cross_entropy", "cuda", same_dtype=True, weight_dtype="bfloat16")
    liger = replace(same_cuda, module="liger_kernel")
    metric_learning = replace(same, module="pytorch_metric_learning")
    chunked = partial(peers.linear_cross_entropy, chunked=True)
    fp16 = partial(peers.insightface, fp16=True)
    return (
        *_all_ours(),
        _peer("eager", peers.eager),
        _peer("plain", peers.plain, same, tolerance=_ROUGH),
        _peer("plain-autocast", peers.plain_under_autocast, Needs(weight_dtype="bfloat16"), tolerance=_ROUGH),
        _peer("compiled", peers.compiled),
        _peer("compiled-plain", partial(peers.compiled, loss=peers.plain), same_cuda, tolerance=_ROUGH),
        _peer("insightface", peers.insightface, fp32, "straight_through"),
        _peer("insightface-tf32", peers.insightface, fp32_cuda, "straight_through", tf32=True),
        _peer("insightface-fp16", fp16, fp32_cuda, "straight_through"),
        Provider("pytorch-metric-learning", "torch", "margin", _open_metric_learning, metric_learning, own_weight=True),
        _peer("linear_cross_entropy", peers.linear_cross_entropy, torch_linear, "linear"),
        _peer("linear_cross_entropy-chunked", chunked, replace(torch_linear, chunked=True), "linear"),
        _peer("cut_cross_entropy", peers.cut_cross_entropy, cut, "linear", "triton", products=(2, 8), tolerance=_ROUGH),
        _peer("liger", peers.liger, liger, "linear", "triton", tolerance=_ROUGH),
        Provider("products", "torch", "products", _open_products, same),
        Provider("products-preallocated", "torch", "products", partial(_open_products, preallocated=True), same),
    )


def _peer(
    name: str,
    loss: peers.Loss,
    needs: Needs = Needs(),
    formula: Formula = "margin",
    backend: str = "torch",
    **more: Any,
) -> Provider:
    return Provider(name, backend, formula, partial(HeadRun, loss), needs, **more)


def select(names: Sequence[str] | None = None, backend: str | None = None) -> tuple[Provider, ...]:
    """Return the providers with these names, see :func:`~fused_arcface.app.benchmark.names.chosen`.

    >>> [str(provider) for provider in select(["fused_arcface", "eager"], backend="cpu")]
    ['fused_arcface (cpu)', 'eager (torch)']
    """
    return chosen(all_providers(), names, backend)
