"""The choice of ``backend="auto"`` on a GPU that is not here: by its capability, the dtype, D and the options."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.cases import Case, make_inputs

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.backends import cuda, hopper
from fused_arcface.base.options import HeadOptions

GPU = torch.device("cuda", 0)
RESULTS = Path(__file__).parents[2] / "bench" / "results"
BF16_512 = backends.ClassPass(torch.bfloat16, 512)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An H100 by what the choice asks of it: all backends can run, and Hopper's kernels are built."""
    found = SimpleNamespace(capability=(9, 0), missing={})
    monkeypatch.delenv("FUSED_ARCFACE_HOPPER", raising=False)
    monkeypatch.setattr(backends.registry, "_unavailable", lambda name, _=None: found.missing.get(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found.capability)
    monkeypatch.setattr(cuda, "_kernels", SimpleNamespace(HOPPER=True))
    return found


def _auto(of_classes: backends.ClassPass | None = BF16_512, **options: object) -> str:
    needs = HeadOptions(options.pop("margin", fa.ArcFace()), **options).needs()  # type: ignore[arg-type]
    return backends.select("auto", GPU, torch.float32, needs, of_classes)


def test_hopper_s_kernels_come_first_where_they_take_the_case(h100: SimpleNamespace) -> None:
    assert _auto() == "cuda"
    assert _auto(label_smoothing=0.1) == "cuda"
    assert _auto(scale=fa.AdaCos()) == "cuda"
    for other in (
        backends.ClassPass(torch.float16, 512),
        backends.ClassPass(torch.float32, 512),
        backends.ClassPass(torch.bfloat16, 256),
        backends.ClassPass(torch.bfloat16, 512, sampled=True),
        None,
    ):
        assert _auto(other) == "triton", other
    # The portable kernels take these.
    assert _auto(sub_centers=3) == "triton"
    assert _auto(margin=fa.CurricularFace()) == "triton"
    assert _auto(margin=fa.InterTopK()) == "cuda"  # Triton has none
    assert backends.select("auto", GPU, torch.float64, of_classes=BF16_512) == "triton"
    assert backends.select("triton", GPU, of_classes=BF16_512) == "triton"
    assert backends.select("auto", torch.device("cpu"), of_classes=BF16_512) == "cpu"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus(capability: tuple[int, int], h100: SimpleNamespace) -> None:
    h100.capability = capability
    assert _auto() == "triton"


def test_builds_and_switches(h100: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernels, or with them turned off, nothing changes; without Triton all is the backend cuda's."""
    cuda._kernels.HOPPER = False
    assert _auto() == "triton"
    cuda._kernels.HOPPER = True
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "0")
    assert _auto() == "triton"
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "cluster-1")
    assert _auto() == "cuda"
    h100.missing["triton"] = "no compiler"
    assert _auto(backends.ClassPass(torch.float32, 512)) == "cuda"
    h100.missing = {"cuda": "this build has no CUDA kernels"}
    monkeypatch.setattr(cuda, "_kernels", None)
    assert _auto() == "triton"


@pytest.mark.parametrize("make", ["function", "sampled", "all"])
def test_a_call_says_what_it_is(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype is autocast's, and a sampled step is one in training alone."""
    seen: list[backends.ClassPass | None] = []

    def select(*arguments: object) -> str:
        seen.append(arguments[4])  # type: ignore[arg-type]
        return "torch"

    monkeypatch.setattr(backends, "select", select)
    x, w, target, _ = make_inputs(Case(4, 9, 6))
    if make == "function":
        fa.margin_softmax_loss(x, w, target)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fa.margin_softmax_loss(x, w, target)
        assert seen == [backends.ClassPass(torch.float32, 6), backends.ClassPass(torch.bfloat16, 6)]
        return
    head = fa.PartialFC(6, 9, sample_rate=0.5 if make == "sampled" else 1.0)
    head(x, target)
    head.eval()(x, target)
    assert seen == [backends.ClassPass(torch.float32, 6, make == "sampled"), backends.ClassPass(torch.float32, 6)]


def test_a_compiled_call_chooses_by_the_width(h100: SimpleNamespace) -> None:
    """One graph for any width has to know the choice as well."""

    def chosen(x: torch.Tensor) -> torch.Tensor:
        of_classes = backends.ClassPass(x.dtype, x.shape[1])
        return x + (backends.registry._leads("cuda", GPU) == of_classes)

    torch.compiler.reset()
    compiled = torch.compile(chosen, fullgraph=True, dynamic=True, backend="eager")
    for width in (512, 256, 512):
        assert compiled(torch.zeros(3, width, dtype=torch.bfloat16)).unique().tolist() == [float(width == 512)]


def _measured(gpu: str) -> dict[backends.ClassPass, list[tuple[str, float, float]]]:
    """Return for each kind of pass its settings with the milliseconds of a forward and a backward pass.

    By ``triton``, the fastest of its forms, and by ``cuda``, with Hopper's kernels where the run had such a row: it
    was before they were on by default.
    """
    times: dict[tuple[str, ...], dict[str, float]] = {}
    with (RESULTS / gpu / "rows.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            name, backend = row["provider"], row["backend"]
            if row["pass"] != "fwd+bwd" or not name.startswith("fused_arcface") or not row["ms"] or "tf32" in name:
                continue
            found = times.setdefault(tuple(row[each] for each in ("dtype", "weight_dtype", "N", "C", "D")), {})
            key = name if backend == "cuda" else backend
            found[key] = min(float(row["ms"]), found.get(key, float("inf")))
    by_pass: dict[backends.ClassPass, list[tuple[str, float, float]]] = {}
    for (dtype, weight_dtype, N, C, D), found in times.items():
        if "triton" in found and "fused_arcface" in found:
            of_classes = backends.ClassPass(getattr(torch, dtype), int(D))
            mine = found.get("fused_arcface-hopper", found["fused_arcface"])
            setting = f"{gpu} {dtype} {weight_dtype} N={N} C={C} D={D}"
            by_pass.setdefault(of_classes, []).append((setting, found["triton"], mine))
    return by_pass


@pytest.mark.parametrize(("gpu", "least"), [("h100", 7), ("h200", 3)])
def test_the_choice_is_the_faster_one_of_the_committed_rows(gpu: str, least: int, h100: SimpleNamespace) -> None:
    measured = _measured(gpu)
    assert sum(map(len, measured.values())) >= least
    for of_classes, settings in measured.items():
        for setting, triton, mine in settings:
            print(f"{setting}: triton {triton:.1f} ms, cuda {mine:.1f} ms, auto takes {_auto(of_classes)}")
            assert _auto(of_classes) == ("cuda" if mine < triton else "triton"), setting


def test_doctor_says_the_same(h100: SimpleNamespace) -> None:
    """The kernels that are in use by their description are those that come first."""
    for capability in ((8, 0), (9, 0)):
        h100.capability = capability
        in_use = hopper.describe(True, capability).startswith("on for bf16 embeddings of 512 columns")
        assert in_use == (cuda.leads(GPU) == BF16_512)
