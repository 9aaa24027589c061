"""Ranks that wait for each other in different calls: an error on each within seconds, and none for a slow rank."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support import distributed_helpers

import fused_arcface as fa
from fused_arcface.parallel import watch

pytestmark = pytest.mark.distributed


def message_of(call: Callable[..., object], *args: object) -> str:
    try:
        call(*args)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def forward(head: fa.PartialFC) -> torch.Tensor:
    return head(torch.ones(2, 4, requires_grad=True), torch.tensor([0, 7]))


def unlike_end(loss: torch.Tensor, head: fa.PartialFC) -> None:
    if dist.get_rank() == 0:
        loss.backward()
    forward(head)


def skipped_backward() -> list[str]:
    """Rank 1 leaves a backward pass out: one without a collective of its own, in which nobody waits, then one with."""
    watch._PATIENCE, watch._PAUSE = timedelta(seconds=0.3), timedelta(seconds=0.1)
    group, messages = dist.new_group(), []
    for requires_grad in (False, True):
        head = fa.PartialFC(4, 11, group=group)
        forward(head).backward()
        loss = head(torch.ones(2, 4, requires_grad=requires_grad), torch.tensor([0, 7]))
        messages.append(message_of(unlike_end, loss, head))
    # The last two collectives have no end but their group's timeout, which is long: the process ends without them.
    dist.destroy_process_group = lambda: os._exit(0)
    return messages


def test_a_backward_pass_that_one_rank_leaves_out():
    first, second = distributed_helpers.run_ranks(2, skipped_backward)
    assert first == second
    assert first[0] == "ValueError: PartialFC: backward passes must be the same on every rank; got rank 0: 2, rank 1: 1"
    assert first[1].startswith(
        "RuntimeError: the ranks wait for each other in different calls; got rank 0: backward() of head 2, "
        "rank 1: forward() of head 2. Every rank must make the same calls"
    )


def slow_rank() -> list[str]:
    """Rank 1 comes late to a forward pass and to a backward pass; nothing is wrong."""
    watch._PATIENCE, watch._PAUSE = timedelta(seconds=0.1), timedelta(seconds=0.05)
    head, late = fa.PartialFC(4, 11), 0.5 * dist.get_rank()
    losses = []

    def step() -> None:
        time.sleep(late)
        loss = forward(head)
        time.sleep(late)
        loss.backward()
        losses.append(loss.item())

    messages = [message_of(step), message_of(step)]
    return [*messages, losses[0] == losses[1]]


def test_a_slow_rank_is_waited_for():
    assert distributed_helpers.run_ranks(2, slow_rank) == [["no error", "no error", True]] * 2


def warned_rank() -> list[str]:
    """Rank 1 comes to a forward pass after rank 0 has waited for longer than ranks usually do."""
    watch._PATIENCE, watch._PAUSE, watch._LONG = (timedelta(seconds=each) for each in (0.1, 0.05, 0.2))
    head = fa.PartialFC(4, 11)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        time.sleep(0.8 * dist.get_rank())
        forward(head).backward()
    return [str(each.message) for each in caught if each.category is RuntimeWarning]


def test_a_rank_without_a_call_is_named_once():
    (message,), others = distributed_helpers.run_ranks(2, warned_rank)
    assert message == (
        "rank 0 has waited for 0.2 s in forward() of head 1 for ranks [1], which are in no call of a head. If they are "
        "slow, nothing is wrong. If they have run out of batches, they must call the head with 0 rows until all ranks "
        "have"
    )
    assert others == []


def numbers() -> list[int]:
    half = dist.new_group([0])
    first = fa.PartialFC(4, 11)
    if dist.get_rank() == 0:
        fa.PartialFC(4, 11, group=half)
    return [first.ranks.number, fa.PartialFC(4, 11).ranks.number]


def test_heads_are_numbered_by_group():
    assert distributed_helpers.run_ranks(2, numbers) == [[1, 2], [1, 2]]
