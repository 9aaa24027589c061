"""The demands of the NVIDIA backends on the GPU of the tensors, which need not be the current one."""

from __future__ import annotations

import pytest
import torch

from fused_arcface import backends
from fused_arcface.backends import cuda, nvidia, triton

OLD, NEW = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Turing beside an H100, the former one current."""
    capabilities = {None: (7, 5), OLD: (7, 5), NEW: (9, 0)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")


def test_each_gpu_is_judged_by_its_own_capability() -> None:
    refusal = "a GPU of compute capability >= 8.0 is needed; GPU cuda:0 has 7.5"
    assert nvidia.unavailable(OLD) == refusal
    assert nvidia.unavailable(NEW) is None
    assert nvidia.unavailable() == refusal.replace("cuda:0", "None")


@pytest.mark.parametrize("module", [cuda, triton])
def test_the_choice_follows_the_tensors(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(module.__name__).rpartition(".")[2]  # type: ignore[attr-defined]
    monkeypatch.setattr(cuda, "_kernels", object())
    monkeypatch.setattr(cuda, "_cannot_start", lambda index: None)
    monkeypatch.setattr(cuda.native, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "_compiler_reason", None)
    monkeypatch.setattr(triton, "_driver_reason", lambda: None)
    monkeypatch.setattr(backends.registry, "_BY_PRIORITY", (backends.registry._ROWS[name],))
    assert backends.select("auto", NEW) == backends.select(name, NEW) == name
    with pytest.raises(RuntimeError, match=rf"^backend '{name}' is not available: a GPU of .* cuda:0 has 7.5$"):
        backends.select(name, OLD)
    with pytest.warns(UserWarning, match="cuda:0 has 7.5"):
        assert backends.select("auto", OLD) == "torch"
