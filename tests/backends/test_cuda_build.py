"""CMake's choice for the CUDA compiler that it finds. It configures, with the version that the test names, and builds
nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
from support.cuda_emulated import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the PATH"),
    pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not on the PATH"),
]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")

PORTABLE = {"compute_80 sm_80", "compute_90 sm_90", "compute_90 compute_90"}


def _code(folder: Path, mode: str, version: str | None) -> tuple[str, set[str]]:
    """CMake's message about its choice, and the code that it asks for. Without a version it finds no nvcc."""
    override = folder / "version.cmake"
    override.write_text("" if version is None else f"set(CMAKE_CUDA_COMPILER_VERSION {version})\n")
    command = [
        *("cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja", f"-DFUSED_ARCFACE_CUDA={mode}"),
        f"-DCMAKE_USER_MAKE_RULES_OVERRIDE_CUDA={override}",
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA", "FUSED_ARCFACE"))}
    if version is None:
        tools = {Path(str(shutil.which(name))).parent for name in ("cmake", "ninja", "c++")}
        nvcc = shutil.which("nvcc")
        without = [str(each) for each in tools if nvcc is None or Path(nvcc).parent != each]
        environment["PATH"] = os.pathsep.join([*without, "/usr/bin", "/bin"])
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    said = re.search(r"fused_arcface: (.*)", result.stdout)
    assert said is not None
    asked = re.findall(r"arch=(compute_\w+),code=\[(\w+)\]", (folder / "build" / "build.ninja").read_text())
    return said.group(1), {" ".join(each) for each in asked}


@needs_nvcc
def test_nvcc_12_8_builds_the_kernels_for_hopper(tmp_path: Path) -> None:
    said, code = _code(tmp_path, "AUTO", "12.8.61")
    assert said.endswith("CUDA 12.8.61 for 80-real;90-real;90-virtual 90a-real")
    assert code == PORTABLE | {"compute_90a sm_90a"}


@needs_nvcc
@pytest.mark.full
@pytest.mark.parametrize("version", ["11.8.89", "12.6.85"])
def test_an_older_nvcc_builds_the_others(version: str, tmp_path: Path) -> None:
    said, code = _code(tmp_path, "AUTO", version)
    assert said.endswith(f"CUDA {version} for 80-real;90-real;90-virtual") and code == PORTABLE


@needs_nvcc
@pytest.mark.full
def test_an_nvcc_that_does_not_know_hopper_builds_for_ampere(tmp_path: Path) -> None:
    said, code = _code(tmp_path, "AUTO", "11.5.119")
    assert said.endswith("CUDA 11.5.119 for 80-real;80-virtual") and code == {
        "compute_80 sm_80",
        "compute_80 compute_80",
    }


@pytest.mark.full
@pytest.mark.parametrize(("mode", "said"), [("OFF", "CUDA off"), ("AUTO", "CUDA off (no compiler found)")])
def test_without_a_compiler(mode: str, said: str, tmp_path: Path) -> None:
    if mode == "AUTO" and shutil.which("nvcc", path="/usr/bin:/bin") is not None:
        pytest.skip("nvcc lies where cmake looks in any case")
    found, code = _code(tmp_path, mode, None)
    assert found.endswith(said) and not code


@pytest.mark.full
def test_a_compiler_that_compiles_nothing_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that refuses the host's compiler: an install without CUDA would pass, so this one does."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(nvcc.parent), os.environ["PATH"]]))
    said, code = _code(tmp_path, "AUTO", "13.0.0")
    assert said.endswith("CUDA off (no compiler found)") and not code
