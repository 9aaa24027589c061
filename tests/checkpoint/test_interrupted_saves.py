"""Saves that a full disk refuses or a kill ends, at each call that changes files."""

import io
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
from support.small_checkpoints import copied, full_disk, make, refusal, same, state, step

from fused_arcface import checkpoint


class Tracer:
    """Counts the calls by which files change: opening for writing, each write, sync, rename, making and removing; acts
    before the one of number ``at``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act) -> None:
        self.calls, self._at, self._act = [], at, act
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))
        own = io.open

        def opened(path, mode="r", *arguments, **options):
            if not set(mode) & set("wxa+"):
                return own(path, mode, *arguments, **options)
            self.call("open")
            return Written(own(path, mode, *arguments, **options), self)

        monkeypatch.setattr(io, "open", opened)

    def call(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self._at:
            self._act()

    def _counted(self, name, call):
        def counted(*arguments, **options):
            self.call(name)
            return call(*arguments, **options)

        return counted


class Written:
    """A file that was opened for writing. Every write reaches it at once."""

    def __init__(self, file, tracer: Tracer) -> None:
        self._file, self._tracer = file, tracer

    def write(self, data):
        self._tracer.call("write")
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prepared(root: Path):
    """Two checkpoints that are kept; returns head and net behind the next step, and the exact states."""
    head, net = make()
    for _ in range(2):
        checkpoint.save(root, head, keep=2, net=net)
        before = copied(state(head, net))
        step(head, net)
    return head, net, before, copied(state(head, net))


@pytest.mark.parametrize("distance", [2, pytest.param(1, marks=pytest.mark.full)])
def test_a_full_disk_at_calls_that_write(tmp_path, monkeypatch, distance):
    outcomes, number, other = [], 0, make(seed=1)
    head, net, before, after = prepared(tmp_path / "0")
    while True:
        number += distance
        root = shutil.copytree(tmp_path / "0", tmp_path / str(number))
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*step_0000000000 is no longer needed, and cannot be removed")
            tracer = Tracer(patch, number, full_disk)
            message = refusal(checkpoint.save, root, head, keep=2, net=net)
        outcomes.append("refused" if message else "saved")
        assert not message or ("cannot be written" in message and "No space left on device" in message)
        # The rest of a refused one takes no room.
        assert not message or not list(root.glob(".partial-step*"))
        checkpoint.load(root, other[0], net=other[1])
        # A refused save has left the one before it; or it was complete, and the sync of its folder failed.
        assert same(state(*other), after) or (outcomes[-1] == "refused" and same(state(*other), before)), number
        checkpoint.save(root, head, keep=2, net=net)  # there is room again
        checkpoint.load(root, other[0], net=other[1])
        assert same(state(*other), after)
        assert len([path for path in root.iterdir() if path.name.startswith("step_")]) in (2, 3)
        if len(tracer.calls) < number:
            break
    # The root is there, so that making it may fail. Then come the directory; data and table, each opened, written and
    # synced; the manifest; the rename.
    assert (
        outcomes[1 : 16 // distance] == ["refused"] * (16 // distance - 1) and outcomes[-1] == "saved" and number > 30
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is POSIX")
@pytest.mark.parametrize("distance", [2, pytest.param(1, marks=pytest.mark.full)])
def test_kill_9_at_calls_that_change_files(tmp_path, distance):
    """In a child that is forked for each: the run goes on from the state before or after, to the bit."""
    found, number, other = [], 0, make(seed=1)
    head, net, before, after = prepared(tmp_path / "0")
    while not found or found[-1] != "ended":
        number += distance
        root = shutil.copytree(tmp_path / "0", tmp_path / str(number))
        child = os.fork()
        if child == 0:
            Tracer(pytest.MonkeyPatch(), number, killed)
            checkpoint.save(root, head, keep=2, net=net)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        checkpoint.load(root, other[0], net=other[1])
        loaded = state(*other)
        assert same(loaded, before) or same(loaded, after), number
        found.append("ended" if status == 0 else "after" if same(loaded, after) else "before")
        newest = checkpoint.save(root, head, keep=2, net=net)
        assert checkpoint.latest(root) == newest
        assert not [path.name for path in root.iterdir() if path.name.startswith(".partial-step")]
    # The new checkpoint is there from one call on, and stays.
    assert found == sorted(found, key=["before", "after", "ended"].index) and number > 30
    assert found[-2] == "after" and same(loaded, after)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is POSIX")
def test_100_kills_at_random_times(tmp_path):
    """While a child saves again and again: the newest is never an older one than before, and exact."""
    head, net, before, _ = prepared(tmp_path)
    states, newest, other = {1: before}, 1, make(seed=1)
    draw, moved = random.Random(11), 0
    for _ in range(100):
        states[head.step] = copied(state(head, net))
        child = os.fork()
        if child == 0:
            while True:
                checkpoint.save(tmp_path, head, keep=2, net=net)
        time.sleep(draw.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        checkpoint.load(tmp_path, other[0], net=other[1])
        assert other[0].step >= newest and same(state(*other), states[other[0].step])
        moved, newest = moved + (other[0].step > newest), other[0].step
        step(head, net)
    assert moved > 20
