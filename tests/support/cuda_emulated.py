"""Builds of csrc/cuda for the CPU, over tests/cuda_emulation: the module that stands in for fused_arcface._native.cuda,
and the programs that check the kernels by themselves, for ThreadSanitizer and for mutants.

Objects are kept in build/cuda_emulation under a hash of all that they are made of.
"""

from __future__ import annotations

import functools
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
# Distributions' compilers set _FORTIFY_SOURCE by themselves, so it is set everywhere: fibres.cpp must do without it.
_FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    *("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-DFA_HOPPER=1"),
)
_FIBRES = tuple(EMULATION / name for name in ("collectives.cpp", "fibres.cpp", "hopper.cpp"))
_THREADS = tuple(EMULATION / name for name in ("collectives.cpp", "threads.cpp"))


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


@functools.cache
def module() -> ModuleType:
    """csrc/cuda on the CPU, with the functions of fused_arcface._native.cuda."""
    import pybind11

    cache, csrc = CACHE, ROOT / "csrc"
    includes = tuple(f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
    flags = (*_FLAGS, "-fPIC", "-fvisibility=hidden", *includes)
    cuda = csrc / "cuda"
    sources = [*cuda.rglob("*.cu"), cuda / "bindings.cpp", EMULATION / "module.cpp", *_FIBRES]
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


def _program(
    name: str, fixed: tuple[Path, ...], changed: tuple[Path, ...], csrc: Path, cache: Path, more: tuple[str, ...] = ()
) -> Path:
    """A program of ``fixed`` sources, which need nothing that a mutant changes, and of others over ``csrc``, which are
    compiled with ``more`` flags."""
    flags = (*_FLAGS, "-O1")  # compiled once a mutant, run for seconds
    lenient = () if csrc == ROOT / "csrc" else ("-Wno-error",)  # a mutant may leave a variable unused
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [
            *pool.map(lambda source: _compile(source, flags, ROOT / "csrc", CACHE), fixed),
            *pool.map(lambda source: _compile(source, (*flags, *more, *lenient), csrc, cache), changed),
        ]
    names = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:24]
    path = cache / f"{name}-{names}"
    if not path.exists():
        partial = _link(objects, path.with_suffix(f".{os.getpid()}"), ("-pthread", *more))
        partial.rename(path)
    return path


def checker(csrc: Path = ROOT / "csrc", *, threads: bool = False, cache: Path = CACHE) -> Path:
    """The program tests/cuda_emulation/check.cpp over the sources in ``csrc``; with ``threads`` under
    ThreadSanitizer."""
    # The emulation is compiled without it: what it does between a warp's lanes must not look like an order.
    fixed, more = (_THREADS, ("-fsanitize=thread",)) if threads else (_FIBRES, ())
    return _program("check", fixed, (EMULATION / "check.cpp",), csrc, cache, more)


def waves() -> Path:
    """The program tests/cuda_emulation/waves.cpp."""
    return _program("waves", _FIBRES, (EMULATION / "waves.cpp",), ROOT / "csrc", CACHE)


def mutated(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of ``csrc`` in a folder, with a change of one file of ``csrc/cuda``."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / "cuda" / file
    source = path.read_text()
    assert old in source, f"{file} no longer has {old!r}"
    path.write_text(source.replace(old, new))
    return csrc


def layout_checker() -> Path:
    """The program tests/cuda_emulation/check_layouts.cpp."""
    return _program("check_layouts", (*_FIBRES, EMULATION / "check_layouts.cpp"), (), ROOT / "csrc", CACHE)


def hopper_checker(csrc: Path = ROOT / "csrc", *, cache: Path = CACHE) -> Path:
    """The program tests/cuda_emulation/check_hopper.cpp over the sources in ``csrc/cuda/hopper``."""
    fixed = (*_FIBRES, EMULATION / "check_hopper.cpp")
    return _program("check_hopper", fixed, (csrc / "cuda" / "hopper" / "passes.cu",), csrc, cache)
