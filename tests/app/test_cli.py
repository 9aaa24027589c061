"""The command line: what commands print and how they end. ``demo`` has its own file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_arcface as fa
from fused_arcface.app.cli import app, gradcheck, run
from fused_arcface.base.extras import MissingExtra, require

# The package's attribute of that name is the command.
gradcheck_module = sys.modules[gradcheck.__module__]


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

    monkeypatch.setattr(gradcheck_module, "errors_against_fp64", broken)
    assert run(["doctor"]) == 1
    assert "RuntimeError: no such luck" in capsys.readouterr().out


def test_gradcheck_lists_every_margin(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gradcheck", "--backend", "cpu", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    count = len(list(gradcheck_module.subjects()))
    assert f"{count} of {count} combinations pass" in shown
    for expected in ("NormSoftmax", "CosFace", "SphereFace", "ArcFace fold", "CombinedMargin clip ST", "a function"):
        assert expected in shown
    for expected in ("AdaFace", "MagFace easy", "ElasticFace cos", "CurricularFace", "MVSoftmax", "InterclassFilter"):
        assert expected in shown
    for expected in ("ArcFace hard K=3", "ArcFace hard ε=0.1"):
        assert expected in shown


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_check_of_one_combination(dtype: str) -> None:
    found = gradcheck_module.check("cpu", fa.ArcFace(0.5, "fold"), dtype)
    assert found.passed and found.numerical is (True if dtype == "float64" else None)


def test_gradcheck_fails_on_a_wrong_gradient(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gradcheck_module.errors_against_fp64

    def wrong(backend: str | None, *rest: object) -> dict[str, float]:
        return right(backend, *rest) | ({} if backend is None else {"d_weight": float("nan")})

    monkeypatch.setattr(gradcheck_module, "errors_against_fp64", wrong)
    monkeypatch.setattr(gradcheck_module, "subjects", lambda: iter([(fa.ArcFace(), {})]))
    assert run(["gradcheck", "--backend", "torch", "--dtype", "float32"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL" in shown and "0 of 1 combinations pass" in shown


def test_gradcheck_finds_a_derivative_that_is_none() -> None:
    class Wrong:
        """Says that its gradient is exact; it is the straight-through one."""

        def __call__(self, target_cosine: object) -> object:
            return fa.ArcFace(gradient="straight_through")(target_cosine)

    assert gradcheck_module.numerical_gradcheck("cpu", Wrong()) is False
    assert gradcheck_module.numerical_gradcheck("cpu", fa.ArcFace(gradient="straight_through")) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gradcheck", "--backend", "abacus"], "--backend must be all or one of"),
        (["gradcheck", "--backend", "cuda"], "--backend cuda is not available"),
        (["gradcheck", "--dtype", "int8"], "--dtype must be all or one of"),
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

    monkeypatch.setattr(gradcheck_module, "check", interrupted)
    assert run(["gradcheck"]) == 130
    assert "Interrupted." in capsys.readouterr().err


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("sklearn", "sklearn.metrics", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r'^scikit-learn is not installed.*pip install "fused_arcface\[demo\]"$'):
        require("sklearn.metrics")
    assert run(["demo"]) == 1
    assert 'pip install "fused_arcface[demo]"' in capsys.readouterr().err


def test_every_command_says_what_it_does() -> None:
    assert {"doctor", "gradcheck", "demo"} <= {command.callback.__name__ for command in app.registered_commands}
    assert all(command.callback.__doc__ for command in app.registered_commands)


def test_runs_from_any_directory_and_the_import_is_light(tmp_path: Path) -> None:
    heavy = "{'matplotlib', 'sklearn', 'typer'}"
    check = f"import sys, fused_arcface; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    start = (
        "import runpy; sys.argv = ['fused_arcface', '--help']; runpy.run_module('fused_arcface', run_name='__main__')"
    )
    code = f"{check}\n{start}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "gradcheck" in done.stdout, done.stderr
