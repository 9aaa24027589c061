"""The setting of fp32 products is read and put back through whichever of torch's two interfaces was used before."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fused_arcface.base.precision import allows_tf32, fp32_products


@pytest.mark.parametrize("tf32", [True, False])
def test_the_setting_holds_within_the_block_alone(tf32: bool) -> None:
    before = torch.get_float32_matmul_precision()
    with fp32_products(tf32):
        assert allows_tf32() is tf32
    assert torch.get_float32_matmul_precision() == before and not allows_tf32()
    with pytest.raises(KeyboardInterrupt), fp32_products(tf32):
        raise KeyboardInterrupt
    assert torch.get_float32_matmul_precision() == before and not allows_tf32()


USES = {
    "settings": "next(p for p in providers.all_providers() if p.name == 'eager').settings().__enter__()",
    "ceiling": "machine._CPU_SIZE = machine._COPY_BYTES = 64; machine.measure_ceiling(torch.device('cpu'), 'tf32', 0)",
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.slow
def test_nothing_raises_once_the_newer_interface_was_written(use: str) -> None:
    """In a process of its own: torch refuses to read the older setting once the newer was written."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip(f"torch {torch.__version__} has no fp32_precision")
    code = (
        "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from fused_arcface.app.benchmark import providers\nfrom fused_arcface.app.measure import machine\n"
    )
    result = subprocess.run([sys.executable, "-c", code + USES[use]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
