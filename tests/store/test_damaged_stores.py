"""Journals with a flipped bit, cut, or made by a stranger; and uses of a head that would miss its store."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch

import fused_arcface as fa
from fused_arcface import checkpoint
from fused_arcface.checkpoint import CheckpointError, convert
from fused_arcface.store import StoreError, file, journal
from fused_arcface.store.columns import Columns
from fused_arcface.store.folder import layout_of
from fused_arcface.store.records import Records

D, CLASSES = 2, 6


def make(storage: Path) -> fa.PartialFC:
    return fa.PartialFC(D, CLASSES, sample_rate=0.3, center_storage=storage, center_optimizer=fa.CenterSGD(0.1))


def train(head: fa.PartialFC, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(head.step)
        x = torch.randn(2, D, generator=generator)
        head(x, torch.randint(0, CLASSES, (2,), generator=generator)).backward()


@pytest.fixture
def run(tmp_path):
    """A run with changes after its checkpoint, and what resuming must bring back: the centers, or an error."""
    folder = tmp_path / "run"
    head = make(folder / "store")
    train(head, 3)
    checkpoint.save(folder / "saved", head)
    right = head.full_weight().clone()
    train(head, 3)
    head.center_store.close()

    def resumed(change) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        (path,) = (copy / "store").glob("journal_*")
        change(path)
        try:
            other = make(copy / "store")
            checkpoint.load(copy / "saved", other)
        except (StoreError, CheckpointError) as error:
            return str(error)
        found = other.full_weight()
        other.center_store.close()
        return "right" if torch.equal(found, right) else "wrong"

    return resumed


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.slow
def test_damage_of_a_journal_is_an_error_or_does_not_matter(run, small, monkeypatch):
    if not small:
        monkeypatch.setattr(file, "_SMALL", 0)

    def flipped(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 16
        path.write_bytes(data)

    sizes = []
    assert run(lambda path: sizes.append(path.stat().st_size)) == "right"
    found = [run(lambda path, at=at: flipped(path, at)) for at in range(0, sizes[0], 7)]
    found += [run(lambda path, at=at: os.truncate(path, at)) for at in range(33, sizes[0], 9)]
    assert "wrong" not in found
    errors = [each for each in found if each != "right"]
    assert len(errors) > len(found) / 2 and all("is damaged: journal_" in each for each in errors)
    assert "has no state" in run(lambda path: path.unlink())
    assert "must be a regular file; it is a named pipe" in run(lambda path: (path.unlink(), os.mkfifo(path)))
    assert "must be a regular file; it is a folder" in run(lambda path: (path.unlink(), path.mkdir()))


def test_a_damaged_journal_is_not_converted(tmp_path):
    head = make(tmp_path / "store")
    train(head, 3)
    checkpoint.save(tmp_path / "saved", head)
    train(head, 3)
    head.center_store.close()
    path = max((tmp_path / "store").glob("journal_*"))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="is damaged: journal_000000000003 lacks rows"):
        convert.convert([tmp_path / "saved"], tmp_path / "centers.safetensors")
    assert not (tmp_path / "centers.safetensors").exists()


def test_rows_of_another_length_are_named_each_time(tmp_path):
    """An error while a store is opened leaves no lock behind."""
    head = make(tmp_path / "store")
    checkpoint.save(tmp_path / "saved", head)
    head.center_store.close()
    os.truncate(tmp_path / "store" / "rows.bin", 5)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"rows\.bin must have 6 records of 24 bytes; it is 5 bytes long"):
            convert.convert([tmp_path / "saved"], tmp_path / "centers.safetensors")


@pytest.mark.parametrize("ids", [[7], [-1], [3, 2], [2, 2]])
def test_a_journal_names_rows_of_its_own(tmp_path, ids):
    """With a valid checksum: else a stranger's journal would write beyond the file."""
    columns = Columns.of({"weight": torch.empty(0, 1)})
    body = struct.pack(f"<{len(ids)}q", *ids) + bytes(12 * len(ids))
    header = struct.pack("<8sqqI4x", b"faROWS01", len(ids), 0, zlib.crc32(body))
    path = tmp_path / "journal_000000000001.0-5"
    path.write_bytes(header + body)
    assert list(journal.batches(path, columns)) == [] and not journal.all_whole({1: [path]}, columns)


def test_the_newest_marker_is_found_between_holes(tmp_path):
    columns = Columns.of({"weight": torch.empty(0, 1000)})
    records = Records(tmp_path / "rows", columns, 1000, 0, create=True)
    assert records.newest_marker(0, 1000) == 0
    for row, marker in ((3, 5), (500, 9), (999, 7)):
        records.write(torch.tensor([row]), {"weight": torch.zeros(1, 1000)}, marker)
    ranges = [(0, 1000), (0, 500), (501, 1000), (500, 501), (0, 3), (4, 4)]
    assert [records.newest_marker(*each) for each in ranges] == [9, 5, 7, 9, 0, 0]
    records.close()


def test_uses_that_would_miss_the_store_are_refused(tmp_path):
    head = make(tmp_path / "store")
    with pytest.raises(RuntimeError, match="weight has no class centers to replace, as center_storage keeps them"):
        head.weight = torch.nn.Parameter(torch.zeros(CLASSES, D))
    head.reset_parameters()  # a new head's are the initial ones
    train(head, 1)
    with pytest.raises(RuntimeError, match="in a file cannot be drawn anew: name a new folder"):
        head.reset_parameters()
    head.sample_rate = 1.0
    with pytest.raises(ValueError, match="center_storage must be 'device' with sample_rate=1"):
        train(head, 1)
    for name in ("a\0b", "a" * 300):
        with pytest.raises(StoreError, match="the store of class centers cannot be made: "):
            make(tmp_path / name)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_kill_right_after_the_first_checkpoint(tmp_path, monkeypatch, loaded):
    """The checkpoint is there, and the store does not know of it yet. Without loading it a run begins anew."""
    head = make(tmp_path / "store")
    initial = head.full_weight().clone()
    train(head, 3)
    with monkeypatch.context() as patch:
        patch.setattr(file.FileRows, "saved", lambda *_: None)  # killed before it
        checkpoint.save(tmp_path / "saved", head)
    right = head.full_weight().clone()
    train(head, 2)
    head.center_store.close()
    other = make(tmp_path / "store")
    if loaded:
        checkpoint.load(tmp_path / "saved", other)
        assert torch.equal(other.full_weight(), right)
    else:
        assert torch.equal(other.full_weight(), initial)
        train(other, 3)
        assert torch.equal(other.full_weight(), right)  # the same steps from the same initial centers
        assert not torch.equal(right, initial)
    other.center_store.close()
    again = make(tmp_path / "store")
    if loaded:
        with pytest.raises(StoreError, match="load one of them with"):
            again.full_weight()
    else:
        assert torch.equal(again.full_weight(), initial)


@pytest.mark.parametrize(("name", "is_folder"), [("rows.bin", True), ("rows.bin", False), ("lock", True)])
def test_a_missing_file_and_a_folder_in_its_place_are_errors_of_the_store(name, is_folder, tmp_path):
    head = make(tmp_path / "store")
    train(head, 2)
    checkpoint.save(tmp_path / "saved", head)
    head.center_store.close()
    (tmp_path / "store" / name).unlink()
    if is_folder:
        (tmp_path / "store" / name).mkdir()
    with pytest.raises(StoreError, match=f"{name} cannot be opened"):
        make(tmp_path / "store")
    with pytest.raises(CheckpointError, match=f"{name} cannot be opened"):
        checkpoint.load(tmp_path / "saved", fa.PartialFC(D, CLASSES, center_optimizer=fa.CenterSGD(0.1)))


@pytest.mark.parametrize(
    "value", [None, True, "3", 1.5, float("inf"), float("nan"), [], {}, "A" * 100_000], ids=lambda x: repr(x)[:9]
)
def test_a_layout_with_values_of_other_types_is_a_short_error(value, tmp_path):
    make(tmp_path / "store").center_store.close()
    path = tmp_path / "store" / "store.json"
    right = json.loads(path.read_text())
    wrong = [{**right, name: value} for name in ("num_rows", "seed", "version", "columns")]
    wrong.append({**right, "columns": [["weight", "float32", value]]})
    for content in wrong:
        path.write_text(json.dumps(content))
        with pytest.raises(StoreError, match=r"store\.json is not the layout of a store of class centers: ") as raised:
            layout_of(tmp_path / "store")
        assert len(str(raised.value)) < 1000
