"""Mutates files and reads them in a forked child with limits. A test of a file format calls :func:`check`."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import random
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

SECONDS = 2.0  # of the processor
CRAFTED_SECONDS = 5.0  # for a file made to be slow; a reader without limits takes minutes
STUCK = 240  # seconds of the clock, on a machine with other work
MEMORY = 64 << 20  # bytes beyond the file's size and the process's base
TRIES = 3  # of a file that breaks a limit
FREE = 512 << 20  # bytes of the heap that are free when a child begins

_BEYOND = "MiB beyond the file's size"

_EDGES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_NUMBERS = (b"-1", b"0", b"1e400", b"nan", b"18446744073709551615", b"1000000000000", b"9" * 400)


@dataclass(frozen=True)
class Format:
    """A kind of file.

    ``sample`` writes a valid file and returns its path; other files may lie beside it. ``load`` reads one as the
    package does and raises one of ``errors`` for a bad one.
    """

    name: str
    sample: Callable[[Path], Path]
    load: Callable[[Path], object]
    errors: tuple[type[BaseException], ...]
    memory: int = MEMORY
    seconds: float = SECONDS


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Change ``content`` at one to four places: bits, bytes, edge values, numbers in text, cuts, copies, nesting."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(9):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1 if data:
                data[at % len(data)] = draw.randrange(256)
            case 2:
                width = draw.choice((1, 2, 4, 8))
                value = draw.choice(_EDGES) % 256**width
                data[at : at + width] = value.to_bytes(width, draw.choice(("little", "big")))
            case 3:
                del data[at : at + draw.choice((1, 4, 16, 300))]
            case 4:
                data[at:at] = draw.randbytes(draw.choice((1, 4, 16)))
            case 5:
                del data[at:]
            case 6:
                start = draw.randrange(len(data) + 1)
                data[at:at] = data[start : start + draw.choice((4, 64, 1000))]
            case 7:
                numbers = list(re.finditer(rb"[0-9]+", data))
                if numbers:
                    found = draw.choice(numbers)
                    data[found.start() : found.end()] = draw.choice(_NUMBERS)
            case 8:
                data[at:at] = draw.choice((b"[", b"{", b"(", b"]", b'{"a":', b"\n", b"\0")) * draw.choice((1, 50, 3000))
    return bytes(data)


def crafted(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield ``count`` mutations, the same for a seed."""
    for number in range(count):
        yield mutate(content, random.Random(f"{seed}.{number}"))


def failures(kind: Format, path: Path, contents: Iterable[bytes]) -> list[str]:
    """Read each of ``contents`` in place of ``path``; return what was wrong, with the place of a file that shows it.

    A child is forked from this warm process and reads one after another; where it dies, another goes on. A file that
    breaks a limit of time or memory is read again by other children, and is wrong only if each of them says so.
    """
    wrong: list[str] = []
    files = list(contents)
    start = 0
    while start < len(files) and len(wrong) <= 20:
        found, done = _read_by_a_child(kind, path, files[start:])
        for number, fault in found:
            content = files[start + number]
            if not fault.of_a_limit or all(_breaks_a_limit(kind, path, content) for _ in range(TRIES - 1)):
                wrong.append(f"{kind.name} {_kept(path, content)}: {fault.text}")
        start += done
    return wrong


def _breaks_a_limit(kind: Format, path: Path, content: bytes) -> bool:
    """Read the file twice in a child: pages of libraries that the first reading touches are not the second's."""
    found, done = _read_by_a_child(kind, path, [content, content])
    return bool(found) and found[-1][0] == done - 1


class _Fault(NamedTuple):
    text: str
    of_a_limit: bool  # of time or memory


def _read_by_a_child(kind: Format, path: Path, files: list[bytes]) -> tuple[list[tuple[int, _Fault]], int]:
    """Return the faults, each with the number of its file, and the number of files until the child ended."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _read_all(kind, path, files, write_end)
    os.close(write_end)
    with os.fdopen(read_end) as reports:
        lines = reports.read().splitlines()
    _, status = os.waitpid(child, 0)
    faults = [(number, _Fault(line, line.endswith(_BEYOND))) for number, line in enumerate(lines) if line]
    done = len(lines)
    if os.WIFSIGNALED(status) and done < len(files):
        name = signal.Signals(os.WTERMSIG(status)).name
        faults.append((done, _Fault(f"ended by {name}", name in ("SIGPROF", "SIGALRM"))))
        done += 1
    return faults, done


_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks are read from /proc")
counts = pytest.mark.parametrize(
    "count",
    [
        pytest.param(60, marks=_LINUX),
        pytest.param(10_000, marks=[_LINUX, pytest.mark.full, pytest.mark.timeout(3600)]),
    ],
)
"""The numbers of files for :func:`check`, in ``make test`` and in ``make test-all``."""


def check(kind: Format, root: Path, count: int) -> None:
    """Read a valid file and ``count`` mutations of it; fail with what was wrong."""
    path = kind.sample(root)
    content = path.read_bytes()
    kind.load(path)  # warm, and a valid file is read
    wrong = failures(kind, path, crafted(content, count, seed=1))
    assert not wrong, "\n".join(wrong)


def _free_memory(libc: ctypes.CDLL) -> None:
    """Leave a large free block in the heap, as other work of a process does.

    Memory that a decoder asks for cleared is then taken from it and written to. Without it, the system would map
    such memory, and pages that are never used would cost nothing.
    """
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size = 60 << 10  # so small that they are taken from the heap
    blocks = [libc.malloc(size) for _ in range(FREE // size)]
    for block in blocks[:-1]:  # the last one keeps the others from going back to the system
        libc.free(block)


def _kept(path: Path, content: bytes) -> Path:
    kept = path.with_name(f"failed-{random.Random(content).randrange(10**6)}{path.suffix}")
    kept.write_bytes(content)
    return kept


def _read_all(kind: Format, path: Path, files: list[bytes], report: int) -> None:
    """In the child: report a line for each file, empty or with the fault."""
    faulthandler.disable()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit = 4 << 30  # so that a mistake does not fill the machine; what counts is measured
    used = _kilobytes("VmSize") * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None)
    _free_memory(libc)
    for content in files:
        path.write_bytes(content)
        libc.malloc_trim(0)  # free memory that malloc keeps would hide what the next file takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        base = _kilobytes("VmRSS")
        signal.setitimer(signal.ITIMER_PROF, kind.seconds)
        signal.setitimer(signal.ITIMER_REAL, STUCK)
        text = ""
        try:
            kind.load(path)
        except kind.errors as error:
            if not str(error):
                text = f"{type(error).__name__} without a message"
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} at {place.filename}:{place.lineno}: {str(error)[:200]!r}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        taken = (_kilobytes("VmHWM") - base) * 1024 - len(content)
        if taken > kind.memory:
            text += f"{taken >> 20} {_BEYOND}"
        os.write(report, f"{' '.join(text.split())}\n".encode("utf-8", "backslashreplace"))
    os._exit(0)


def _kilobytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        with contextlib.suppress(ValueError):
            if line.startswith(name + ":"):
                return int(line.split()[1])
    raise AssertionError(f"/proc/self/status has no {name}")
