"""``train --center-storage``: the same training wherever the class centers are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fused_arcface import checkpoint
from fused_arcface.app.training.config import OptionError, TrainConfig
from fused_arcface.app.training.events import Noted
from fused_arcface.app.training.trainer import train, try_out


def options(storage: str, **more: object) -> TrainConfig:
    return TrainConfig(
        data="identities:12x4",
        image_size=16,
        channels=1,
        epochs=1,
        batch_size=24,
        sample_rate=0.3,
        workers=0,
        device="cpu",
        center_storage=storage,
        **more,  # type: ignore[arg-type]
    )


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_run_is_the_same_and_goes_on_wherever_the_centers_are(tmp_path):
    notes: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Noted):
            notes.append(event.text)

    storages = {"device": "device", "file": str(tmp_path / "centers")}
    for name, storage in storages.items():
        train(options(storage), tmp_path / name, listener=listen)
        train(options(storage, seed=0).replace({"epochs": 2}), tmp_path / name, resume=True, listener=listen)
        assert len(losses(tmp_path / name)) > 0
        assert losses(tmp_path / name) == losses(tmp_path / "device")
    try_out(options("host"), tmp_path / "host", listener=listen)
    assert any("class centers in host memory" in note for note in notes)
    assert any(f"class centers in {tmp_path / 'centers'}: up to" in note for note in notes)
    assert (tmp_path / "device" / "best").is_dir() and (tmp_path / "device" / "best.pt").is_file()
    # The file drops the states of older checkpoints: a copy of one could not be loaded.
    assert not (tmp_path / "file" / "best").exists() and (tmp_path / "file" / "best.pt").is_file()
    nets = [checkpoint.load_state(tmp_path / name / "checkpoints", "backbone") for name in storages]
    for name, tensor in nets[0].items():
        assert all(torch.equal(tensor, net[name]) for net in nets[1:])


def test_a_dry_run_leaves_no_store_behind(tmp_path):
    try_out(options(str(tmp_path / "centers")), tmp_path / "run", listener=lambda event: None)
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(OptionError, match="center_storage must be 'device' with sample_rate=1"):
        train(options("host").replace({"sample_rate": 1.0}), tmp_path / "run", listener=lambda event: None)
    config = options(str(tmp_path / "c")).replace({"center_optimizer": "joint"})
    with pytest.raises(OptionError, match="center_storage must be 'device' without a CenterSGD"):
        train(config, tmp_path / "other", listener=lambda event: None)
    assert not (tmp_path / "c").exists()
