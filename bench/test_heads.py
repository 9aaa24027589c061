"""Time whole passes of the head, ours and the peers', each checked against fp64 first."""

from __future__ import annotations

import pytest
import torch

from fused_arcface.app.benchmark.cases import PASSES, Case, Inputs
from fused_arcface.app.benchmark.providers import Provider, all_providers
from fused_arcface.app.benchmark.runner import tolerance
from fused_arcface.app.benchmark.truth import error_of, truth


@pytest.fixture(params=all_providers(), ids=str)
def provider(request: pytest.FixtureRequest, case: Case, device: torch.device) -> Provider:
    """Return each provider that can run the case."""
    reason = request.param.reason_against(case, device)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("pass_name", list(PASSES))
def test_head(time, provider: Provider, case: Case, inputs: Inputs, pass_name: str) -> None:
    """Time one pass."""
    backward = PASSES[pass_name]
    with provider.settings():
        run = provider.open(inputs)
        assert error_of(run(backward), truth(inputs, provider.formula)) <= tolerance(provider, case)
        time(lambda: run(backward))
