"""The processes that train together: a single one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
import pickle
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fused_arcface.base.extras import MissingExtra
from fused_arcface.margins.text import imported_module
from fused_arcface.parallel.ranks import ALONE, Ranks

from .config import OptionError
from .outcomes import TrainingError
from .runs import RunError, RunFolder


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: Any = None
    """A gloo group beside the default one: for numbers on the CPU, and for waiting."""

    @property
    def _ranks(self) -> Ranks:
        return ALONE if self.world_size == 1 else Ranks(self.control)

    def sum(self, numbers: list[float]) -> list[float]:
        """Return the sums of numbers over the ranks. A collective."""
        if self.world_size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def share(self, failure: Exception | None) -> None:
        """Raise the error of the first rank that failed, if one has, on every rank. A collective."""
        for rank, other in enumerate(self._ranks.gather_objects(_portable(failure))):
            if other is not None:
                raise failure if rank == self.rank and failure is not None else other

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block without collectives on each rank; if it fails on one, its error is raised on all."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self.share(failure)

    def check_agreement(self, what: str, values: dict[str, Any], failure: type[ValueError]) -> None:
        """Raise ``failure`` on every rank if a value differs between ranks, with its name and each rank's value."""
        try:
            self._ranks.check_agreement(what, {name: repr(value) for name, value in values.items()})
        except ValueError as error:
            raise failure(str(error)) from None


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them in the end.

    Args:
        device: ``"auto"`` (CUDA where there is one), or a device's name; under torchrun each rank takes the GPU of its
            local number.

    Raises:
        OptionError: if there is no such device.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)) if world_size > 1 else None)
    if world_size == 1:
        yield World(chosen)
        return
    # Imported here: a torch without torch.distributed has neither.
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://"))
    # torchrun keeps one store through its restarts. It still holds the addresses of processes that have ended.
    store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield World(chosen, dist.get_rank(), world_size, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise OptionError(f"device {name} is not available: this PyTorch sees no GPU")
        device = torch.device("cuda", local_rank if local_rank is not None else device.index or 0)
        torch.cuda.set_device(device)
    return device


def _portable(failure: Exception | None) -> Exception | None:
    """Return an error that can be sent to other ranks: the same one, or one with its text."""
    try:
        pickle.loads(pickle.dumps(failure))
        return failure
    except Exception:
        return TrainingError(f"{type(failure).__name__}: {failure}")


def is_first_rank() -> bool:
    """Return whether this is the only process, or the first that torchrun started: it alone prints."""
    return int(os.environ.get("RANK", 0)) == 0


def resume_command(output: Path) -> str:
    """Return the command that resumes a run in the way it was started, under torchrun or not."""
    command = f"fused-arcface train --output {shlex.quote(str(output))} --resume{_own_margin(output)}"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return command
    nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    several = f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT" if nodes > 1 else ""
    processes = f"--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    return f"torchrun{several} {processes} -m fused_arcface {command.removeprefix('fused-arcface ')}"


def _own_margin(output: Path) -> str:
    """Return the option that names a user's margin again, which a resumed run does not import unasked."""
    try:
        margin = RunFolder(output).read_config().margin
    except (OptionError, RunError, MissingExtra):
        return ""
    return f" --margin {shlex.quote(margin)}" if imported_module(margin) else ""
