"""Builds of csrc/cuda for the CPU, over tests/cuda_emulation: the module that stands in for fused_arcface._native.cuda,
and the program that checks one precision by itself, for ThreadSanitizer and for mutants.

Objects are kept in build/cuda_emulation under a hash of all that they are made of.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "cuda_emulation"
CACHE = ROOT / "build" / "cuda_emulation"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
_FLAGS = ("-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function")


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if CXX is None:
        return "the emulation of CUDA needs a C++ compiler; none was found on the PATH"
    if os.name != "posix":
        return "the emulation of CUDA needs a POSIX system"
    return None


def _compile(source: Path, flags: tuple[str, ...], csrc: Path, cache: Path) -> Path:
    """The object of a source, ordinary C++ whatever its suffix."""
    headers = sorted([*csrc.rglob("*.h"), *EMULATION.rglob("*.h")])
    contents = b"".join(path.read_bytes() for path in (source, *headers))
    key = hashlib.sha256(contents + repr((str(source.name), CXX, flags)).encode()).hexdigest()[:24]
    target = cache / f"{source.stem}-{key}.o"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.o")
        includes = (f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{EMULATION}")
        command = [CXX, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr[-8000:]}"
        partial.rename(target)
    return target


def _link(objects: list[Path], target: Path, flags: tuple[str, ...]) -> Path:
    command = [CXX, *flags, *map(str, objects), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr[-8000:]}"
    return target


def module() -> ModuleType:
    """csrc/cuda on the CPU, with the functions of fused_arcface._native.cuda."""
    import pybind11

    cache, csrc = CACHE, ROOT / "csrc"
    includes = tuple(f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
    flags = (*_FLAGS, "-fPIC", "-fvisibility=hidden", *includes)
    cuda = csrc / "cuda"
    sources = [*cuda.glob("*.cu"), cuda / "bindings.cpp", EMULATION / "module.cpp", EMULATION / "emulation.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, flags, csrc, cache), sources))
    names = hashlib.sha256("".join(sorted(path.name for path in objects)).encode()).hexdigest()[:24]
    path = cache / names / "cuda_emulated.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = _link(objects, path.with_suffix(f".{os.getpid()}.so"), ("-shared", "-pthread"))
        partial.rename(path)
    spec = importlib.util.spec_from_file_location("cuda_emulated", path)
    assert spec is not None and spec.loader is not None
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    return emulated


def checker(csrc: Path = ROOT / "csrc", *, threads: bool = False, cache: Path = CACHE) -> Path:
    """The program tests/cuda_emulation/check.cpp over the sources in ``csrc``; with ``threads`` under
    ThreadSanitizer."""
    flags = (*_FLAGS, "-O1")  # compiled once a mutant, run for a second
    kernel_flags = (*flags, "-DEMULATION_THREADS", "-fsanitize=thread") if threads else flags
    with ThreadPoolExecutor(2) as pool:
        # Not the emulation itself: what it does between a warp's lanes must not look like an order (emulation.cpp).
        emulation = pool.submit(
            _compile, EMULATION / "emulation.cpp", (*flags, "-DEMULATION_THREADS") if threads else flags, csrc, cache
        )
        check = _compile(EMULATION / "check.cpp", kernel_flags, csrc, cache)
    objects = [check, emulation.result()]
    names = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:24]
    path = cache / f"check-{names}"
    if not path.exists():
        path = _link(objects, path, ("-pthread", *(("-fsanitize=thread",) if threads else ())))
    return path
