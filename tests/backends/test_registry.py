"""The choice of a backend: by name, by itself, and the reasons given when there is none."""

from __future__ import annotations

import inspect
import platform
from typing import get_args

import pytest
import torch
from support.cases import Case, make_inputs

import fused_arcface as fa
from fused_arcface import _native, backends, calls
from fused_arcface.backends import cpu, native
from fused_arcface.base.options import HeadOptions


def test_available() -> None:
    found = fa.backends.available()
    assert list(found) == [row.name for row in backends.BACKENDS]
    assert {"torch", "cpu", "triton", "cuda"} <= found.keys()
    assert found["torch"] is None and found["cpu"] is None
    assert found["reference"] is None  # the earlier name
    for name in ("triton", "cuda"):
        if not torch.cuda.is_available():
            assert isinstance(found[name], str) and found[name]


def test_instruction_sets() -> None:
    isas = _native.isas()
    assert isas[-1] == "portable" and len(set(isas)) == len(isas)
    assert cpu.isa() == isas[0]
    if platform.machine() != "x86_64":
        assert isas == ["portable"]


def test_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_ISA", "portable")
    assert cpu.isa() == "portable"
    # Two flops a lane: the portable kernels hold 6 × 2 vectors of 16 bytes.
    assert cpu.multiply_adds(10) == 2 * 10 * 12 * 4
    monkeypatch.delenv("FUSED_ARCFACE_ISA")
    assert cpu.isa() == _native.isas()[0]


def test_instruction_set_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_ISA", "avx1024")
    reason = f"FUSED_ARCFACE_ISA=avx1024 names none of this machine's instruction sets: {', '.join(_native.isas())}"
    assert fa.backends.available()["cpu"] == reason
    x, w, target, _ = make_inputs(Case())
    with pytest.raises(RuntimeError) as raised:
        fa.margin_softmax_loss(x, w, target, backend="cpu")
    assert str(raised.value) == f"backend 'cpu' is not available: {reason}"


def test_compiled_part_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is given, "auto" does without and says so, the named backend does not fall back."""
    monkeypatch.setattr(native, "_import_error", "no such file")
    assert fa.backends.available()["cpu"] == (
        "the compiled module fused_arcface._native cannot be imported: no such file"
    )
    x, w, target, _ = make_inputs(Case())
    with pytest.warns(
        UserWarning, match="backend 'torch' is used, plain PyTorch by blocks of classes, as 'cpu' is not available: "
    ):
        assert backends.select("auto", x.device) == "torch"
    torch.testing.assert_close(
        fa.margin_softmax_loss(x, w, target), fa.reference.margin_softmax_loss(x, w, target), rtol=1e-6, atol=0
    )
    with pytest.raises(RuntimeError, match="no such file"):
        fa.margin_softmax_loss(x, w, target, backend="cpu")


def test_auto_takes_the_kernels() -> None:
    assert backends.select("auto", torch.device("cpu")) == "cpu"
    assert backends.select("auto", torch.device("meta")) == "torch"


def test_the_earlier_name_of_the_plain_backend(recwarn: pytest.WarningsRecorder) -> None:
    x, w, target, _ = make_inputs(Case())
    expected = fa.margin_softmax_loss(x, w, target, backend="torch")
    assert torch.equal(fa.margin_softmax_loss(x, w, target, backend="reference"), expected)
    for make in (fa.MarginHead, fa.PartialFC):
        head = make(x.shape[1], w.shape[0], backend="reference")
        assert head.backend == "torch"
        head.backend = "reference"
        assert head(x, target).isfinite()
    assert backends.load("reference") is backends.load("torch") and backends.has("reference", "sub_centers")
    assert not recwarn.list


@pytest.mark.parametrize("row", backends.BACKENDS, ids=lambda row: row.name)
def test_a_row_of_the_registry(row: backends.registry.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row says is what the backend's functions take, and what ``select`` goes by."""
    module = backends.load(row.name)
    assert row.features <= backends.FEATURES.keys()
    monkeypatch.setattr(backends.registry, "_unavailable", lambda *_: None)
    device = torch.device(row.device_type or "cpu")
    for feature in backends.FEATURES:
        if feature in row.features:
            assert backends.select(row.name, device, needs={feature: "it"}) == row.name
        else:
            with pytest.raises(ValueError, match=f"^backend '{row.name}' does not have it: .* do$"):
                backends.select(row.name, device, needs={feature: "it"})
    if hasattr(module, "class_stats"):  # Triton's functions need its compiler
        parameters = inspect.signature(module.class_stats).parameters
        assert ("negatives" in parameters) == ("sub_centers" in row.features)
        assert ("class_count" in parameters) == ("padding" in row.features)
        for stage in (module.class_max, module.class_stats, module.weight_grad):
            assert ("classes" in inspect.signature(stage).parameters) == ("gathering" in row.features)
    fastest = max(
        (each for each in backends.BACKENDS if each.device_type == row.device_type), key=lambda each: each.priority
    )
    assert row.device_type is None or backends.select("auto", device) == fastest.name


def test_falling_back_names_each_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that can run and lacks both features, one that lacks one; then one that has what is needed."""
    reasons = {"triton": "no compiler", "cuda": None}
    monkeypatch.setattr(backends.registry, "_unavailable", reasons.get)
    needs = {"permutation": "the permutation of a sample", "binary_losses": "the binary losses of SphereFace2"}
    with pytest.warns(UserWarning, match="blocks of classes") as warned:
        assert backends.select("auto", torch.device("cuda"), needs=needs) == "torch"
    assert [
        str(each.message).removeprefix("backend 'torch' is used, plain PyTorch by blocks of classes, as ")
        for each in warned
    ] == [
        "'triton' does not have the binary losses of SphereFace2",
        "'cuda' does not have the permutation of a sample and the binary losses of SphereFace2",
    ]
    monkeypatch.setitem(reasons, "triton", None)
    del needs["binary_losses"]
    assert backends.select("auto", torch.device("cuda"), needs=needs) == "triton"


def test_triton_is_not_taken_for_margins_that_turn_the_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.registry, "_unavailable", lambda *_: None)
    needs = HeadOptions(fa.InterTopK()).needs()
    assert backends.select("auto", torch.device("cuda"), needs=needs) == "cuda"
    expected = (
        r"^backend 'triton' does not have the turned negatives of InterTopK: 'torch' and 'cpu'.* and 'cuda'.* do$"
    )
    with pytest.raises(ValueError, match=expected):
        backends.select("triton", torch.device("cuda"), needs=needs)


def test_named_backend_on_another_device() -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        backends.select("cpu", torch.device("cuda", 1))
    assert str(raised.value) == "backend 'cpu' needs tensors on cpu; got cuda:1"


@pytest.mark.parametrize("name", ["gpu", "", None, "CPU"])
def test_unknown_name(name: object) -> None:
    x, w, target, _ = make_inputs(Case())
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        fa.margin_softmax_loss(x, w, target, backend=name)
    names = ", ".join(map(repr, backends.NAMES))
    assert str(raised.value) == f"backend must be one of 'auto', {names}; got {name!r}"


def test_editors_offer_every_backend() -> None:
    (literal, _) = get_args(calls.Backend)
    assert set(get_args(literal)) == {"auto", *backends.NAMES, *backends.registry.ALIASES}


PLAIN = (1, 0, (0.0, 1.0, 0.0, 0.0), None)
"""Negatives, as the kernels take them."""


def test_native_refuses_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_ISA", "avx1024")
    with pytest.raises(ValueError, match="instruction set not available on this machine: avx1024"):
        _native.weight_grad(0, (0,) * 6, (0,) * 6, 0, 1.0, 0, 0, 0, (0,) * 6, 1, PLAIN, 0)


def test_native_refuses_products_that_there_are_not() -> None:
    assert not _native.has_products(_native.FLOAT16)
    for code in (_native.FLOAT16, -1, 4):
        with pytest.raises(ValueError, match=f"no products in the dtype of this code: {code}"):
            _native.weight_grad(code, (0,) * 6, (0,) * 6, 0, 1.0, 0, 0, 0, (0,) * 6, 1, PLAIN, 0)


def test_codes_of_dtypes_are_those_of_the_kernels() -> None:
    for name in ("float32", "float64", "bfloat16", "float16"):
        assert native.dtype_code(getattr(torch, name)) == getattr(_native, name.upper())


def test_the_dtype_of_the_centers_counts() -> None:
    device, other = torch.device("cpu"), torch.float8_e4m3fn  # a dtype that no kernel reads
    assert backends.select("auto", device, weight_dtype=other) == "torch"
    with pytest.raises(TypeError) as raised:
        backends.select("cpu", device, weight_dtype=other)
    listed = "float32, float64, bfloat16, float16"
    assert str(raised.value) == f"backend 'cpu' needs embeddings and weight of {listed}; got float8_e4m3fn"
