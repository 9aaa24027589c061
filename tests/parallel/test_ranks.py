"""Work of the first rank: all ranks get its result or its error."""

from __future__ import annotations

import pytest
from support import distributed_helpers

from fused_arcface.parallel.ranks import Ranks
from fused_arcface.store import StoreError

pytestmark = pytest.mark.distributed


def work_of_the_first() -> tuple[int, list[int], str]:
    ranks, calls = Ranks(), []

    def work(number: int) -> int:
        calls.append(number)
        if number == 1:
            raise StoreError("no room")
        return 10 * ranks.rank + number

    result = ranks.on_first(lambda: work(0))
    with pytest.raises(StoreError) as error:
        ranks.on_first(lambda: work(1))
    return result, calls, str(error.value)


def test_what_the_first_rank_returns_or_raises_is_everyones() -> None:
    assert distributed_helpers.run_ranks(2, work_of_the_first) == [(0, [0, 1], "no room"), (0, [], "no room")]
