"""The GPU benchmark's choice of implementations, on a machine without a GPU, and the calls of the peers."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.benchmark_reports import CPU

from fused_arcface import backends
from fused_arcface.app.benchmark import peers, runner
from fused_arcface.app.benchmark.cases import Case, make_inputs
from fused_arcface.app.benchmark.providers import HeadRun, Provider, all_providers
from fused_arcface.app.benchmark.truth import error_of, truth
from fused_arcface.app.measure.timing import Timing

BENCH = Path(__file__).parents[3] / "bench"
GPU = torch.device("cuda")
BF16 = Case(32, 300, 64, "bfloat16", "bfloat16")

# The signatures are those of cut-cross-entropy 25.1.1 and of Liger 0.8.5.
CUT_CROSS_ENTROPY = """
import torch
def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False,
                         filter_eps="high", impl="cce"):
    assert filter_eps is None, "skips gradients"
    return torch.nn.functional.cross_entropy((e @ c.T).float(), targets, ignore_index=ignore_index)
"""
LIGER = """
import torch
class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    def __init__(self, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean"):
        super().__init__()
    def forward(self, lin_weight, _input, target, bias=None):
        # Gradients are computed here, for each input that asks for one.
        assert torch.is_grad_enabled() == _input.requires_grad == lin_weight.requires_grad
        return torch.nn.functional.cross_entropy((_input @ lin_weight.T).float(), target)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make packages with the names and signatures of the peers importable."""
    (tmp_path / "cut_cross_entropy").mkdir()
    (tmp_path / "cut_cross_entropy" / "__init__.py").write_text(CUT_CROSS_ENTROPY)
    (tmp_path / "liger_kernel" / "transformers").mkdir(parents=True)
    (tmp_path / "liger_kernel" / "__init__.py").write_text("")
    (tmp_path / "liger_kernel" / "transformers" / "__init__.py").write_text(LIGER)
    for name in ("cut_cross_entropy", "liger_kernel", "liger_kernel.transformers"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))


def named(name: str) -> Provider:
    (found,) = (each for each in all_providers() if each.name == name)
    return found


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["cut_cross_entropy", "liger"])
def test_peers_are_called_by_their_published_signature(name: str) -> None:
    assert named(name).reason_against(BF16, GPU) is None
    inputs = make_inputs(BF16, CPU)
    run = HeadRun(getattr(peers, name), inputs)
    right = truth(inputs, "linear")
    for backward in (False, True):
        outcome = run(backward)
        assert error_of(outcome, right) < 0.02
        assert (outcome.d_weight is not None) == backward


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, module in (
        ("cut_cross_entropy", "cut_cross_entropy"),
        ("liger", "liger_kernel"),
        ("pytorch-metric-learning", "pytorch_metric_learning"),
    ):
        assert named(name).reason_against(BF16, GPU) == f"the package {module} is not installed"
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    reason = named("linear_cross_entropy").reason_against(BF16, GPU)
    assert reason == f"torch {torch.__version__} has no F.linear_cross_entropy"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    pytest.importorskip("triton", reason="Triton is not installed here")
    return runpy.run_path(str(BENCH / "gpu_benchmark.py"))


def test_each_turn_has_its_providers(script: dict[str, Any]) -> None:
    of_cases: dict[str, list[tuple[str, str]]] = {}
    for turn in script["TURNS"]:
        found = [(each.name, each.backend) for each in script["providers_of"](turn)]
        of_cases.setdefault(str(turn.case), []).extend(found)
    assert next(iter(of_cases)) == "N=4096 C=1 000 000 D=512 bfloat16"
    assert all(len(set(found)) == len(found) for found in of_cases.values()), "none is measured twice"

    def providers(case: str) -> set[tuple[str, str]]:
        return set(of_cases[case])

    ours = {("fused_arcface", "triton"), ("fused_arcface", "cuda")}
    linear = {("liger", "triton"), ("cut_cross_entropy", "triton"), ("linear_cross_entropy", "torch")}
    insightface = {(f"insightface{suffix}", "torch") for suffix in ("", "-tf32", "-fp16")}
    plain = {(name, "torch") for name in ("eager", "compiled", "compiled-plain", "pytorch-metric-learning")}
    assert providers("N=1024 C=1 000 000 D=512 bfloat16") >= ours | linear | plain
    assert providers("N=4096 C=1 000 000 D=512 float32") == insightface
    assert providers("N=1024 C=1 000 000 D=512 float32") >= ours | insightface | {("fused_arcface-tf32", "triton")}
    assert providers("N=256 C=10 000 D=512 bfloat16") >= ours | plain
    assert [turn.replayed for turn in script["TURNS"] if turn.replayed] == [("plain", "compiled-plain")]
    assert {("fused_arcface-flash", "triton"), ("fused_arcface-chunks", "triton")} <= providers(
        "N=4096 C=1 000 000 D=512 bfloat16"
    )


@pytest.mark.parametrize("described", ["", "not built: that takes nvcc 12.8 or later", "on for bf16 embeddings"])
def test_other_configurations_are_measured_where_the_kernels_are(
    described: str, script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "describe", lambda name: described)
    names = {each.name for each in script["providers_of"](script["TURNS"][0])}
    expected = {f"fused_arcface-hopper-{name}" for name in ("0", "cluster-1", "unordered", "cluster-1-unordered")}
    assert {name for name in names if "hopper" in name} == (expected if described.startswith("on") else set())


@pytest.mark.slow
def test_each_turn_is_written_and_said(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ceiling = runner.machine.Ceiling("torch", 64, Timing((1.0,)), 0.0, 1e9)
    monkeypatch.setattr(runner.machine, "measure_ceiling", lambda device, dtype: ceiling)
    monkeypatch.setattr(runner.memory, "can_measure", lambda device: False)
    monkeypatch.setitem(script["measure"].__globals__, "run_benchmark", quick(script["run_benchmark"]))
    Turn, case = script["Turn"], Case(6, 300, 16)
    turns = [
        *(Turn(Case(6, C, 16), ("eager", "compiled-plain"), ours=C == 300) for C in (300, 301)),
        Turn(case, ("plain",), ours=False),  # again: another turn of the first case
    ]
    assert script["measure"](turns, tmp_path, 60, CPU) is not None
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["C"], row["pass"]) for row in rows if row["provider"] == "eager"] == [
        *((300, "fwd"), (300, "fwd+bwd"), (301, "fwd"), (301, "fwd+bwd"))
    ]
    assert [(row["C"], row["pass"]) for row in rows if row["provider"] == "plain"] == [(300, "fwd"), (300, "fwd+bwd")]
    assert [row["provider"] for row in rows].count("ceiling") == 1
    assert all(row["graph_ms"] is None and row["triton"] and row["commit"] for row in rows)
    said = capsys.readouterr().out
    assert "compiled-plain (torch): runs on cuda only" in said and "fused_arcface (triton): " in said
    assert script["measure"](turns, tmp_path / "late", -1, CPU) is None and not (tmp_path / "late").exists()
    assert "N=6 C=301 D=16 float32: not measured, the time of -1 s is over" in capsys.readouterr().out


def quick(run_benchmark: Callable[..., Any]) -> Callable[..., Any]:
    """Return the benchmark with samples of a few milliseconds."""
    return lambda *arguments, seconds, **options: run_benchmark(*arguments, seconds=0.01, **options)
