"""The model of class centers beyond the device, beside sums by hand."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.benchmark_reports import CAPACITY_FIELDS

from fused_arcface.app.benchmark import stored_model
from fused_arcface.app.benchmark.stored_model import NVME, PCIE, computed_rows, most_identities, predict_stored
from fused_arcface.store.columns import Columns

ROW = 512 * 2 + 512 + 8 * 4  # bf16 center, int8 momentum, a unit for 64 columns


def test_a_row_has_the_bytes_of_a_heads_columns():
    tensors = {
        "weight": torch.empty(0, 512, dtype=torch.bfloat16),
        "momentum_buffer": torch.empty(0, 512, dtype=torch.int8),
        "momentum_scale": torch.empty(0, 8),
    }
    assert Columns.of(tensors).row_bytes == stored_model.row_bytes(512) == ROW == 1568


def test_bytes_and_time_of_a_step():
    host, file = (predict_stored(10**8, 0.01, link) for link in (PCIE, NVME))
    assert host.read_bytes == host.written_bytes == 10**6 * ROW
    assert host.seconds == pytest.approx(10**6 * ROW / 50e9) and host.limit == "transfer"  # both ways at once
    assert file.written_bytes == 2 * file.read_bytes  # the journal
    assert file.seconds == pytest.approx(10**6 * ROW * (1 / 4e9 + 2 / 2e9))
    assert predict_stored(10**8, 0.01, PCIE, batch=65536).limit == "compute"


def test_the_smaller_of_host_and_device_memory_limits_the_identities():
    assert most_identities(0.25e12, 141e9, 0.01) == int(0.9 * 0.25e12 / ROW)
    assert most_identities(2e12, 24e9, 0.01) == pytest.approx(0.9 * 24e9 / (3 * 0.01 * ROW), rel=1e-6)


def test_rows_of_the_budget_say_that_they_are_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1_576_000))
    host, file = computed_rows(torch.device("cpu"), 15_680, 64, 512, tmp_path)
    assert ",".join(host) == ",".join(file) == CAPACITY_FIELDS
    assert (host["max_C"], file["max_C"]) == (10, 1000) and host["how"] == file["how"] == "computed"
