"""A GPU in the place of NVIDIA's: nvcc's own host code and bindings of csrc/cuda over runtime.cpp, whose launches run
nvcc's PTX in the interpreter, on the CPU's tensors.

Objects are kept in build/cuda_ptx under a hash of all that they are made of.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PoisoningTorch

from fused_arcface.backends import cuda

from .. import cuda_emulated
from ..cuda_emulated import CXX, ROOT
from .machine import Machine
from .memory import Memory, Order, Space
from .program import Kernel, parse

NVCC = shutil.which("nvcc")
MOST_SHARED = 163 << 10
"""Bytes of shared memory that a block may have on sm_80 (CUDA C++ programming guide, technical specifications)."""
CACHE = ROOT / "build" / "cuda_ptx"
_RUNTIME = Path(__file__).with_name("runtime.cpp")


def missing() -> str | None:
    """Why nvcc's PTX cannot be had here, or None."""
    if NVCC is None:
        return "the PTX interpreter needs nvcc; none was found on the PATH"
    return cuda_emulated.missing()


def _made(command: list[str], inputs: list[Path], version: bytes = b"") -> Path:
    """A folder with the objects, PTX and libraries that a command of this version makes in it of these files."""
    contents = [repr(command).encode(), version, *(path.read_bytes() for path in inputs)]
    target = CACHE / hashlib.sha256(b"".join(contents)).hexdigest()[:24]
    if not target.exists():
        work = Path(tempfile.mkdtemp(dir=CACHE))
        result = subprocess.run(command, capture_output=True, text=True, cwd=work)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-8000:]}"
        for each in work.iterdir():
            if each.suffix not in (".o", ".ptx", ".so"):
                each.unlink()
        work.rename(target)
    return target


@functools.cache
def _built() -> tuple[Path, list[Path]]:
    """Return the module over runtime.cpp, and the PTX of csrc/cuda's files."""
    import fcntl

    import pybind11

    assert NVCC is not None and CXX is not None
    csrc = ROOT / "csrc"
    headers = [*sorted(csrc.rglob("*.h")), csrc / "cuda" / "bindings.cpp"]
    version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
    python = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    gcc = [CXX, "-std=c++17", "-fPIC", "-fvisibility=hidden", f"-I{csrc}", *python]
    nvcc = [
        *(NVCC, "-std=c++17", "-ccbin", CXX, "--generate-code", "arch=compute_80,code=compute_80", f"-I{csrc}"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden", "--keep", "--keep-dir", "."),
    ]

    def compiled(source: Path) -> Path:
        command = nvcc if source.suffix == ".cu" else gcc
        return _made([*command, "-c", str(source), "-o", f"{source.stem}.o"], [source, *headers], version)

    cuda_sources = sorted((csrc / "cuda").glob("*.cu"))
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for what the first one makes
        made = list(pool.map(compiled, [_RUNTIME, *cuda_sources]))
        objects = [next(folder.glob("*.o")) for folder in made]
        # -Bsymbolic: a CUDA build of torch has brought functions of the same names.
        link = [CXX, "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", "cuda_in_ptx.so"]
        return _made(link, objects) / "cuda_in_ptx.so", [path for folder in made for path in folder.glob("*.ptx")]


class Programs:
    """Kernels by name, and the machines that run them, which are made when they are first needed."""

    def __init__(self, kernels: dict[str, Kernel], machines: dict[tuple[str, int], Machine] | None = None) -> None:
        self.kernels, self._machines = kernels, machines or {}

    def machine(self, name: str, threads: int) -> Machine:
        if (name, threads) not in self._machines:
            self._machines[name, threads] = Machine(self.kernels[name], threads)
        return self._machines[name, threads]

    def changed(self, kernels: dict[str, Kernel]) -> Programs:
        """The same with other kernels in the place of those with their names."""
        machines = {key: machine for key, machine in self._machines.items() if key[0] not in kernels}
        return Programs(self.kernels | kernels, machines)


def texts() -> dict[str, str]:
    """nvcc's PTX by the name of the source."""
    return {path.stem: path.read_text() for path in _built()[1]}


@functools.cache
def programs() -> Programs:
    kernels: dict[str, Kernel] = {}
    for name, text in texts().items():
        own = parse(name, text)
        # Each file has its own copy of these.
        assert all("row_terms" in each or "finish" in each for each in own.keys() & kernels.keys())
        kernels |= own
    return Programs(kernels)


@functools.cache
def module() -> ModuleType:
    """csrc/cuda with the functions of fused_arcface._native.cuda."""
    spec = importlib.util.spec_from_file_location("cuda_in_ptx", _built()[0])
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def current_device() -> ctypes.c_int:
    """Return the number of the runtime's current device, to read or to change."""
    library = ctypes.CDLL(str(_built()[0]))
    library.current_device.restype = ctypes.POINTER(ctypes.c_int)
    return library.current_device().contents  # type: ignore[no-any-return]


_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p,
    ctypes.c_size_t,
)  # fmt: skip


class Gpu:
    """The memory that kernels may reach, and their launches."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.memory = Space(np.uint8, Order())
        self.launches: list[tuple[str, tuple[int, ...]]] = []
        """Names of kernels, and grid, block and bytes of shared memory."""
        self._storages: dict[int, Memory] = {}
        self._launcher = _LAUNCHER(self._launch)

    def know(self, tensor: torch.Tensor, written: bool) -> None:
        """Let kernels reach a tensor. It and what else lies in its storage stay where they are as long as this does."""
        if tensor.numel() == 0:
            return
        storage, size = tensor.untyped_storage(), tensor.element_size()
        if (start := storage.data_ptr()) not in self._storages:
            array = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self._storages[start] = Memory(array, valid=False)
            self.memory.add(start, self._storages[start])
        first = tensor.storage_offset()
        last = first + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self._storages[start].allow(first * size, last * size, written)

    def _launch(self, name: bytes, geometry: Any, arguments: Any, why: int, most: int) -> int:
        try:
            grid, threads, shared = tuple(geometry[0:3]), geometry[3], geometry[6]
            self.launches.append((name.decode(), tuple(geometry[0:7])))
            machine = self.programs.machine(name.decode(), threads)
            assert geometry[4] == geometry[5] == 1 and threads == machine.kernel.most_threads, geometry[0:7]
            assert shared <= MOST_SHARED
            sizes = machine.kernel.parameters.values()
            parameters = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)]
            machine.launch(self.memory, grid, shared, parameters)
        except Exception as error:  # goes through C++
            text = f"{type(error).__name__}: {error}".encode()[: most - 1] + b"\0"
            ctypes.memmove(why, text, len(text))
            return 1
        return 0

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """csrc/cuda's launches come here."""
        library = ctypes.CDLL(str(_built()[0]))
        library.set_launcher(self._launcher)
        yield
        library.set_launcher(_LAUNCHER(0))


class _Torch(PoisoningTorch):
    """``torch`` as the backend sees it. Nothing has written its fresh memory, so no kernel may read it."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        fresh = super().empty_like(tensor)
        self._gpu.know(fresh, written=False)
        return fresh


@contextlib.contextmanager
def in_place(monkeypatch: pytest.MonkeyPatch, kernels: Programs | None = None) -> Iterator[Gpu]:
    """Let backends/cuda.py take the CPU's tensors, and run nvcc's kernels, or others."""
    gpu = Gpu(kernels or programs())
    address = torch.Tensor.data_ptr

    def data_ptr(tensor: torch.Tensor) -> int:
        gpu.know(tensor, written=True)
        return address(tensor)

    monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr, raising=False)
    monkeypatch.setattr(cuda, "torch", _Torch(gpu))
    monkeypatch.setattr(cuda, "_kernels", module())
    monkeypatch.setattr(cuda, "_device", lambda tensor: ((0, 0), 4))
    monkeypatch.setenv("FUSED_ARCFACE_HOPPER", "0")
    with gpu.launching():
        yield gpu
