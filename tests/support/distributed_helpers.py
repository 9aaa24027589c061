"""Runs a function on several gloo ranks of this machine and hands back what each returned. One place for all tests."""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = timedelta(seconds=240)  # ranks of a busy machine start late

PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "fused_arcface.head",
    "fused_arcface.partial_fc",
    "fused_arcface.checkpoint",
    "fused_arcface.app.cli.train",
    "pytest",
    "support.frozen",
]
"""Modules that the server of forked processes imports once: the package and torch import them when they are used. The
last one keeps a rank's garbage collector off all that the server has imported."""


def start_server() -> None:
    """Start the server of forked processes, if it does not run yet: each process then starts with torch imported."""
    forkserver.set_forkserver_preload(PRELOADED)
    # The server of Python 3.11 and earlier gets no other path of imports.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


def _run_rank(rank: int, world_size: int, directory: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # The loopback interface: gloo would otherwise look the machine's name up, which a sandbox may not answer.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        result = function(*args)
    except Exception as error:  # handed to the test, with where it happened
        error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        result = error
    torch.save(result, f"{directory}/{rank}.pt")
    gc.collect()  # a model in a cycle holds the group, whose threads then outlive it and may abort the process
    dist.destroy_process_group()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` on each of ``world_size`` ranks with an initialized default group; their results, in rank
    order.

    ``function`` must be importable (a test module's top level). An exception on one rank is raised here.
    """
    with tempfile.TemporaryDirectory() as directory:
        start_server()
        mp.start_processes(
            _run_rank, (world_size, directory, function, args), nprocs=world_size, start_method="forkserver"
        )
        results = [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
