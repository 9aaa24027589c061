"""A training run that is killed or has a full disk, at any moment: resumed, it ends as if nothing had been, to the bit.

Each run is a process forked from a warm one. An audit hook sees what it does to its files and kills the process
or refuses the call, as a full disk does.
"""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing
import os
import re
import resource
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed_helpers import start_server
from support.image_files import write_folder
from support.training_runs import TINY, losses, weights

from fused_arcface.app.cli import run as run_command

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Trouble:
    """Counts the calls that change something under a folder; from number ``at`` on, what ``kind`` says: ``kill`` -9, a
    full ``disk``, or Ctrl-C (``interrupt``)."""

    def __init__(self, folder: Path, at: int, kind: str) -> None:
        self._folder, self._at, self._kind, self.calls = f"{folder}/", at, kind, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not (flags & _WRITING if mode is None else set(str(mode)) & set("wax+")):
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or not f"{os.fsdecode(path)}/".startswith(self._folder):
            return
        self.calls += 1
        if self.calls < self._at or not self._at:
            return
        if self._kind == "disk":
            if event in ("open", "os.mkdir"):  # what a full disk refuses
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        elif self._kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.calls < self._at + 2:  # once more while the first is being obeyed
            os.kill(os.getpid(), signal.SIGINT)


def _command(arguments: list[str], output: Path, at: int, kind: str, limit: int) -> None:
    """In the child: the command, its terminal in a file beside the run, its exit status and the calls in another."""
    torch.set_num_threads(1)
    trouble = Trouble(output, at, kind)
    sys.addaudithook(trouble)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = run_command(["train", *arguments])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    output.with_name(output.name + ".txt").write_text(f"{status} {trouble.calls}\n{text.getvalue()}")


def start(arguments: list[str], output: Path, at: int = 0, kind: str = "kill", limit: int = 0) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    start_server()
    process = context.Process(target=_command, args=(arguments, output, at, kind, limit))
    process.start()
    return process


def finish(process: BaseProcess, output: Path) -> tuple[int, int, str]:
    """Exit status, calls and words of a command that came to its end."""
    process.join(240)
    assert process.exitcode == 0, process.exitcode
    head, text = output.with_name(output.name + ".txt").read_text().split("\n", 1)
    status, calls = map(int, head.split())
    return status, calls, text


@dataclass
class Setting:
    """A training of six steps with a checkpoint after each, and what it ends in."""

    arguments: list[str]
    losses: list[float]
    weights: dict[str, torch.Tensor]

    def go_on(self, output: Path, at: int = 0, kind: str = "kill", limit: int = 0) -> BaseProcess:
        arguments = [*self.arguments, "--output", str(output), "--resume", "auto"]
        return start(arguments, output, at, kind, limit)

    def check_end(self, output: Path) -> None:
        """Resume once more, undisturbed; the end is that of an undisturbed run, and nothing is left over."""
        status, _, text = finish(self.go_on(output), output)
        assert status == 0, text
        assert losses(output) == self.losses
        got = weights(output)
        assert all(torch.equal(got[name], value) for name, value in self.weights.items())
        assert not list(output.glob(".*")) and not list((output / "checkpoints").glob(".*"))
        model = torch.load(output / "model.pt", weights_only=True)
        assert all(torch.equal(model[name], value) for name, value in self.weights.items())


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("durability")
    data = write_folder(root / "faces", 4, 4)
    config = TINY.replace({"data": str(data), "epochs": 3, "save_every": 1, "image_size": 16})
    config.save(root / "options.toml")
    arguments = ["--config", str(root / "options.toml")]
    whole = Setting(arguments, [], {})
    status, calls, text = finish(whole.go_on(root / "whole"), root / "whole")
    assert status == 0 and calls > 60, text  # the hook sees the run's files
    whole.losses, whole.weights = losses(root / "whole"), weights(root / "whole")
    assert len(whole.losses) == 6
    return whole


def kill_at(setting: Setting, output: Path, call: int) -> None:
    process = setting.go_on(output, at=call)
    process.join(240)
    assert process.exitcode in (-signal.SIGKILL, 0)


def kill_after(setting: Setting, output: Path, seconds: float) -> None:
    process = setting.go_on(output)
    time.sleep(seconds)
    process.kill()
    process.join(240)


def fill_disk(setting: Setting, output: Path, **trouble: int) -> None:
    status, _, text = finish(setting.go_on(output, kind="disk", **trouble), output)
    assert "Traceback" not in text
    if status != 0:
        assert "cannot be written: " in text, text


def interrupt_twice(setting: Setting, output: Path, call: int) -> None:
    status, _, text = finish(setting.go_on(output, at=call, kind="interrupt"), output)
    assert "Traceback" not in text
    assert status in (0, 130), text
    if status == 130 and (output / "config.toml").exists():  # without it there is nothing to go on with
        assert f"fused-arcface train --output {shlex.quote(str(output))} --resume" in text, text


@pytest.mark.slow
def test_a_run_goes_on_after_kills_full_disks_and_impatient_interrupts(setting: Setting, tmp_path: Path) -> None:
    """One after the other in the same run; the grid below has each moment alone."""
    output = tmp_path / "run"
    for call in (3, 17, 29):
        kill_at(setting, output, call)
        kill_after(setting, output, call / 60)
    fill_disk(setting, output, at=9)
    fill_disk(setting, output, limit=20000)
    interrupt_twice(setting, output, 8)
    setting.check_end(output)


@pytest.mark.full
@pytest.mark.parametrize("first", range(1, 9))
@pytest.mark.parametrize("trouble", [kill_at, fill_disk, interrupt_twice])
def test_every_call_that_changes_a_file(setting: Setting, tmp_path: Path, trouble: Any, first: int) -> None:
    for call in range(first, 75, 8):
        output = tmp_path / str(call)
        trouble(setting, output, **{"at" if trouble is fill_disk else "call": call})
        setting.check_end(output)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_kills_at_random_moments(setting: Setting, tmp_path: Path, seed: int) -> None:
    moments = torch.rand(20, generator=torch.Generator().manual_seed(seed))
    for place, moment in enumerate(moments.tolist()):
        output = tmp_path / str(place // 4)
        kill_after(setting, output, 1.2 * moment)
        if place % 4 == 3:
            setting.check_end(output)


@pytest.mark.full
@pytest.mark.parametrize("limit", [0, 50, 200, 300, 700, 1000, 1500, 5000, 100_000, 300_000, 600_000, 645_000, 660_000])
def test_files_that_may_not_grow(setting: Setting, tmp_path: Path, limit: int) -> None:
    fill_disk(setting, tmp_path / "run", limit=max(1, limit))
    setting.check_end(tmp_path / "run")


@pytest.mark.slow
def test_two_runs_in_one_folder(setting: Setting, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = [*setting.arguments, "--epochs", "1000000", "--save-every", "0"]
    first = start([*arguments, "--output", str(output)], output)
    try:
        while not (output / "log.jsonl").exists():
            assert first.is_alive()
            time.sleep(0.01)
        for resume in ([], ["--resume", "auto"]):
            status, _, text = finish(start([*arguments, "--output", str(output), *resume], output), output)
            assert status == 2, text
            owner = rf"process {first.pid} on \S+, since \S+ \S+ trains in it; wait for its end or stop it"
            assert re.search(re.escape(f"{output} is in use: ") + owner, text), text
    finally:
        first.kill()  # it would train for hours
        first.join()
    assert finish(start([*setting.arguments, "--output", str(output), "--resume"], output), output)[0] == 0
