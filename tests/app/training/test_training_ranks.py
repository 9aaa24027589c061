"""A training on two ranks that do not see the same, or one of which fails: the same named error on both."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed_helpers import run_ranks
from support.image_files import write_folder
from support.training_runs import TINY, losses

from fused_arcface.app.data import formats
from fused_arcface.app.training import events, trainer
from fused_arcface.app.training.config import TrainConfig
from fused_arcface.app.training.world import World

pytestmark = pytest.mark.distributed

KINDS = (("L", 20, 20, "png"),)
CONFIG = TINY.replace({"batch_size": 8, "image_size": 16, "channels": 1, "epochs": 2, "lr": 0.1, "scale": 16.0})


@contextlib.contextmanager
def join(_: str) -> Iterator[World]:
    """The ranks that the test has started, as torchrun's."""
    yield World(torch.device("cpu"), dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))


def words_of(
    config: TrainConfig,
    output: Path,
    during: Callable[[], Any] = contextlib.nullcontext,
    resume: Any = False,
    try_out: bool = False,
) -> str:
    trainer.join_world = join
    call = trainer.try_out if try_out else trainer.train
    try:
        with during():
            outcome = call(config, output, resume=resume, listener=lambda event: None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "tried out" if isinstance(outcome, trainer.DryRun) else f"{outcome.step} steps"


@contextlib.contextmanager
def full_log() -> Iterator[None]:
    """From the second step on the first rank's log cannot be written."""
    write = events.LogFile._write

    def fail(log: events.LogFile, values: dict[str, Any]) -> None:
        if values["step"] >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), log._file.name)
        write(log, values)

    events.LogFile._write = fail
    try:
        yield
    finally:
        events.LogFile._write = write


def scenarios(root: Path) -> dict[str, str]:
    """What this rank is told in each."""
    mine = root / str(dist.get_rank())
    found = {
        name: words_of(CONFIG.replace({"data": str(mine / name)}), root / "runs" / name)
        for name in ("same", "names", "labels", "images", "bytes", "missing")
    }
    same = CONFIG.replace({"data": str(mine / "same")})
    found["options"] = words_of(same.replace({"lr": 0.1 + dist.get_rank()}), root / "runs" / "options")
    found["again"] = words_of(same, root / "runs" / "same")
    bad = CONFIG.replace({"data": str(mine / "bad"), "bad_data": "stop"})
    found["bad"] = words_of(bad, root / "runs" / "bad")
    found["log"] = words_of(same, root / "runs" / "log", full_log)
    other = dist.get_rank() == 1
    runs, longer = root / "runs", same.replace({"epochs": 3})
    found["outputs"] = words_of(same, runs / str(dist.get_rank()))
    found["outputs, resumed"] = words_of(longer, runs / ("none" if other else "same"), resume="auto")
    found["resumes"] = words_of(longer, runs / "same", resume="auto" if other else True)
    for name in ("init", "centers"):
        source = {name: str(runs / "same" / ("model.pt" if name == "init" else "."))} if other else {}
        found[name] = words_of(same.replace(source), runs / name)
    found["trials"] = words_of(same, runs / "trials", try_out=other)
    found["all tried out"] = words_of(same, runs / "trials", try_out=True)
    return found


def test_ranks_that_differ_or_fail_say_so_together(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "0", tmp_path / "1"
    write_folder(ours / "same", 4, 4, KINDS)
    for name in ("names", "labels", "images", "bytes", "missing", "bad"):
        shutil.copytree(ours / "same", ours / name)
    (ours / "bad" / "person_002" / "01.png").write_bytes(b"no image")
    shutil.copytree(ours, theirs)
    (theirs / "names" / "person_001").rename(theirs / "names" / "person_009")
    (theirs / "labels" / "person_001" / "03.png").rename(theirs / "labels" / "person_002" / "04.png")
    (theirs / "images" / "person_003" / "03.png").unlink()
    shutil.copy(theirs / "bytes" / "person_000" / "00.png", theirs / "bytes" / "person_000" / "01.png")
    shutil.rmtree(theirs / "missing")

    first, second = run_ranks(2, scenarios, tmp_path)
    assert first == second
    assert first["same"] == "4 steps" and len(losses(tmp_path / "runs" / "same")) == 4
    for name in ("names", "labels", "images", "bytes"):
        assert first[name].startswith(f"DataError: data: {name} must be the same on every rank; got rank 0: ")
        assert not (tmp_path / "runs" / name).exists()
    assert first["images"].endswith("rank 0: 16, rank 1: 15")
    assert first["missing"].startswith("NoSuchData: ")
    assert first["missing"].endswith(f"missing does not exist; data must be {formats.listed()}")
    assert first["options"] == "OptionError: options: lr must be the same on every rank; got rank 0: 0.1, rank 1: 1.1"
    assert first["again"].startswith("RunError: ") and "holds a run already" in first["again"]
    assert first["bad"].startswith("DataError: ") and first["bad"].endswith("bad_data is stop, so this is an error")
    runs = tmp_path / "runs"
    for name, (option, values) in {
        "outputs": ("output", (str(runs / "0"), str(runs / "1"))),
        "outputs, resumed": ("output", (str(runs / "same"), str(runs / "none"))),
        "resumes": ("resume", (True, "auto")),
        "init": ("use of init", (False, True)),
        "centers": ("use of centers", (False, True)),
        "trials": ("dry_run", (False, True)),
    }.items():
        got = f"rank 0: {values[0]!r}, rank 1: {values[1]!r}"
        assert first[name] == f"OptionError: options: {option} must be the same on every rank; got {got}"
    assert first["all tried out"] == "tried out" and not (runs / "trials").exists()
    log = tmp_path / "runs" / "log" / "log.jsonl"
    assert first["log"].startswith(f"TrainingError: {log} cannot be written: No space left on device; make room")
