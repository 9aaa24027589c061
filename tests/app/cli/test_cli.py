"""The command line: what commands print and how they end. ``demo`` has its own file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.app import agreement
from fused_arcface.app.cli import COMMANDS, app, load_command, run
from fused_arcface.base.extras import MissingExtra, require
from fused_arcface.base.options import HeadOptions


def test_doctor_shows_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    for expected in (fa.__version__, "torch", "numpy", "CPU kernels", '"auto" takes on the CPU'):
        assert expected in shown
    for name, reason in fa.backends.available().items():
        assert name in shown and (reason is None or reason.split()[0] in shown)


def test_doctor_shows_why_a_backend_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_ARCFACE_ISA", "abacus")
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "missing" in shown and "FUSED_ARCFACE_ISA=abacus" in shown and "on the CPU: torch" in shown


@pytest.mark.parametrize(
    ("built_for", "help"),
    [
        (None, "install a CUDA build of torch"),
        ("13.0", "an NVIDIA GPU of compute capability >= 8.0 and a driver for CUDA 13.0"),
    ],
)
def test_doctor_says_how_to_get_the_backends_for_gpus(
    built_for: str | None, help: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a torch for the CPU, and with one for GPUs where there is none."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(fa.backends.load("cuda"), "_kernels", object())
    assert run(["doctor"]) == 0
    rows = {
        name: line
        for line in capsys.readouterr().out.splitlines()
        for name in ("triton", "cuda")
        if f" {name} " in line
    }
    assert "missing" in rows["triton"] and help in rows["triton"]
    assert "missing" in rows["cuda"] and help in rows["cuda"]
    monkeypatch.setattr(fa.backends.load("cuda"), "_kernels", None)
    assert run(["doctor"]) == 0
    assert "FUSED_ARCFACE_CUDA=ON pip install ." in capsys.readouterr().out


def test_doctor_fails_when_even_the_reference_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(agreement, "errors_against_fp64", broken)
    assert run(["doctor"]) == 1
    assert "RuntimeError: no such luck" in capsys.readouterr().out


def test_doctor_sees_a_nan_in_the_last_gradient(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"loss": 1e-7, "d_embeddings": 1e-7, "d_weight": float("nan")}
    monkeypatch.setattr(agreement, "errors_against_fp64", lambda *_: errors)
    assert run(["doctor"]) == 1
    assert "relative error nan in" in capsys.readouterr().out


def test_gradcheck_lists_every_margin(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gradcheck", "--backend", "cpu", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    needs = [HeadOptions(margin, **options).needs() for margin, options in agreement.subjects()]
    count = sum(all(backends.has("cpu", feature) for feature in each) for each in needs)
    assert f"{count} of {count} combinations pass" in shown
    for expected in ("NormSoftmax", "CosFace", "SphereFace", "ArcFace fold", "CombinedMargin clip ST", "a function"):
        assert expected in shown
    for expected in ("AdaFace", "MagFace easy", "ElasticFace cos", "CurricularFace", "MVSoftmax", "InterclassFilter"):
        assert expected in shown
    for expected in ("ArcFace hard K=3", "ArcFace hard ε=0.1"):
        assert expected in shown


def test_gradcheck_fails_on_a_wrong_gradient(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = agreement.errors_against_fp64

    def wrong(backend: str | None, *rest: object) -> dict[str, float]:
        return right(backend, *rest) | ({} if backend is None else {"d_weight": float("nan")})

    monkeypatch.setattr(agreement, "errors_against_fp64", wrong)
    monkeypatch.setattr(agreement, "subjects", lambda: [(fa.ArcFace(), {})])
    assert run(["gradcheck", "--backend", "reference", "--dtype", "float32"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL" in shown and "0 of 1 combinations pass" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gradcheck", "--backend", "abacus"], "--backend must be all or one of"),
        (["gradcheck", "--backend", "cuda"], "--backend cuda is not available"),
        (["gradcheck", "--dtype", "int8"], "--dtype must be float64, float32, bfloat16, float16 or all; got int8"),
        (["nothing"], "No such command"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr().err.replace("│", " ")
    assert message in " ".join(shown.split())


def test_ctrl_c_ends_with_the_usual_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(agreement, "check", interrupted)
    assert run(["gradcheck"]) == 130
    assert "Interrupted." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gradcheck", "demo", "bench"])
def test_a_fault_in_a_command_that_checks_its_arguments_has_a_traceback(name: str) -> None:
    def fault(**_: object) -> None:
        raise ValueError("operands could not be broadcast together")

    command = load_command(name)
    command.callback = fault
    with pytest.raises(ValueError, match="operands could not be"):
        command.main([], prog_name=name, standalone_mode=False)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("sklearn", "sklearn.metrics", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r'^scikit-learn is not installed.*pip install "fused_arcface\[demo\]"$'):
        require("sklearn.metrics")
    assert run(["demo"]) == 1
    assert 'pip install "fused_arcface[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_summary_that_the_list_shows(name: str) -> None:
    summary = get_command(app).commands[name].help
    assert summary and (load_command(name).help or "").startswith(summary)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fused-arcface {fa.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["gradcheck", "-h"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "gradcheck" in shown and "Usage" in shown


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["verfy"], "No such command 'verfy'. Did you mean 'verify'?", "See fused-arcface --help"),
        (["doctor", "--all"], "No such option: --all", "See fused-arcface doctor --help"),
    ],
)
def test_a_usage_error_is_two_lines(
    arguments: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert capsys.readouterr() == ("", f"{error}\n{hint}\n")


def test_runs_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fused_arcface", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "gradcheck" in done.stdout, done.stderr
