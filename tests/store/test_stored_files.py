"""A store in a file: killed at any moment, on a full disk, opened twice, brought back, converted."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from support.stored_training import CLASSES, D, assert_equal, batch, make, state, train

import fused_arcface as fa
from fused_arcface import checkpoint
from fused_arcface.checkpoint import convert, stored
from fused_arcface.store import StoreError, journal, lock, records
from fused_arcface.store.columns import Columns
from fused_arcface.store.folder import layout_of, states

EVERY = 3  # steps between the checkpoints of a run that is killed


def resume(folder: Path) -> fa.PartialFC:
    head = make(folder / "store", "bf16+int8")
    if checkpoint.latest(folder / "run"):
        checkpoint.load(folder / "run", head)
    return head


def live(folder: Path) -> None:
    """Train and save until the end of time."""
    head = resume(folder)
    while True:
        train(head, EVERY)
        checkpoint.save(folder / "run", head)


def kill_at_random(folder: Path, times: int, longest: float) -> int:
    """Kill a run that many times; after each, compare with the run that is not killed. Return its last step."""
    chance, steps = random.Random(3), 0
    right = make("device", "bf16+int8")
    for _ in range(times):
        child = os.fork()
        if child == 0:
            try:
                live(folder)
            finally:
                os._exit(1)
        while not steps and not checkpoint.latest(folder / "run"):  # the first checkpoint, however long it takes
            time.sleep(0.01)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        head = resume(folder)
        assert head.step >= steps and head.step % EVERY == 0
        train(right, head.step - right.step)
        assert_equal(state(head), state(right))
        steps = head.step
        head.center_store.close()
    return steps


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_bit(tmp_path):
    assert kill_at_random(tmp_path, 8, 0.2) > 0


@pytest.mark.full
def test_fifty_kills(tmp_path):
    assert kill_at_random(tmp_path, 50, 0.6) > 50


def test_half_a_batch_at_the_end_of_a_journal_is_ignored(tmp_path):
    """A kill within the write of the journal: the rows of that batch have not changed yet."""
    right, head = make("device", "bf16+int8"), resume(tmp_path)
    for each in (right, head):
        train(each, 4)
    checkpoint.save(tmp_path / "run", head)
    train(head, 3)
    head.center_store.close()
    newest = sorted((tmp_path / "store").glob("journal_*"))[-1]
    with newest.open("ab") as file:
        file.write(newest.read_bytes()[:200])
    head = resume(tmp_path)
    assert_equal(state(head), state(right))
    for each in (right, head):
        train(each, 3)
    assert_equal(state(head), state(right))


def test_a_damaged_batch_ends_its_journal(tmp_path):
    columns = Columns.of({"weight": torch.empty(0, 3)})
    written = journal.Journal(tmp_path, 1, 0, 10, columns)
    for row in (1, 2):
        written.add(
            torch.tensor([row]), torch.tensor([0]), {"weight": torch.full((1, 3), float(row))}, torch.tensor([5])
        )
    written.close()
    (path,) = tmp_path.iterdir()
    whole = list(journal.batches(path, columns))
    assert [each.rows.tolist() for each in whole] == [[1], [2]] and whole[1].untouched.tolist() == [5]
    assert whole[1].former()[1]["weight"].tolist() == [[2, 2, 2]]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [each.rows.tolist() for each in journal.batches(path, columns)] == [[1]]


def test_each_kept_checkpoint_can_be_gone_back_to(tmp_path):
    right, head = make("device"), make(tmp_path / "store")
    states = []
    for _ in range(3):
        train(right, 2), train(head, 2)
        states.append(state(right))
        checkpoint.save(tmp_path / "run", head, keep=2)
    names = sorted(path.name for path in (tmp_path / "run").glob("step_*"))
    train(head, 1)
    for name, expected in reversed(list(zip(names, states[1:], strict=True))):
        checkpoint.load(tmp_path / "run" / name, head)
        assert_equal(state(head), expected)
    train(head, 2)
    assert_equal(state(head), states[2])
    with pytest.raises(checkpoint.CheckpointError, match=r"has no state \d+ to go back to"):
        checkpoint.load(tmp_path / "run" / names[-1], head)


def test_a_checkpoint_costs_the_rows_that_have_changed(tmp_path):
    recipe = fa.CenterSGD(0.1)
    head = fa.PartialFC(
        64, 10_000_000, sample_rate=1e-6, center_optimizer=recipe, center_storage=tmp_path / "store"
    )  # 5 GB of rows
    for _ in range(3):
        head(torch.randn(4, 64), torch.arange(4)).backward()
    saved = checkpoint.save(tmp_path / "run", head)
    used = sum(path.stat().st_blocks * 512 for folder in (saved, tmp_path / "store") for path in folder.iterdir())
    assert used < 20_000_000 and (tmp_path / "store" / "rows.bin").stat().st_size > 5e9


def test_two_processes_and_two_heads_cannot_have_one_store(tmp_path):
    head = make(tmp_path / "store")
    with pytest.raises(StoreError, match="is open in this process: call close"):
        make(tmp_path / "store")
    child = os.fork()
    if child == 0:
        lock._open_here.clear()  # as in a process of its own
        try:
            make(tmp_path / "store")
        except StoreError as error:
            os._exit(7 if "in use by another process" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    train(head, 1)
    head.center_store.close()
    make(tmp_path / "store").center_store.close()


def test_another_head_and_a_run_that_is_not_loaded_are_refused(tmp_path):
    head = make(tmp_path / "store")
    train(head, 1)
    checkpoint.save(tmp_path / "run", head)
    head.center_store.close()
    with pytest.raises(StoreError, match=r"holds 500 rows of weight float32 70.*seed 5; this head has .*seed 6"):
        make(tmp_path / "store", seed=6)
    other = make(tmp_path / "store")
    for call in (lambda: train(other, 1), lambda: other.topk(batch(0)[0], 1), lambda: other.full_weight()):
        with pytest.raises(StoreError, match="holds the class centers of a run that has saved checkpoints: load one"):
            call()
    assert other.step == 0
    checkpoint.load(tmp_path / "run", other)
    train(other, 1)


@pytest.mark.parametrize("where", ["journal", "rows"])
def test_a_full_disk_is_an_error_before_anything_changes(where, tmp_path, monkeypatch):
    """In the journal, and where rows that were never touched get their room; with room again the run goes on."""
    right, head = make("device", "bf16+int8"), make(tmp_path / "store", "bf16+int8")
    train(right, 5), train(head, 3)
    head.center_store.drain()
    before = state(head)
    with monkeypatch.context() as patch:
        if where == "journal":

            def full(file: int, data: bytes, position: int) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(journal.os, "pwrite", full)
        else:

            class Full:
                @staticmethod
                def transfer_records(write: bool, *arguments: object) -> int:
                    return errno.ENOSPC if write else own.transfer_records(write, *arguments)

            own = records._native
            patch.setattr(records, "_native", Full)
        for _ in range(2):
            with pytest.raises(StoreError, match="No space left on device"):
                train(head, 1)
            assert head.step in (3, 4)
            head.step = 3
        assert_equal(state(head), before)
    train(head, 2)
    assert_equal(state(head), state(right))


def test_rows_that_cannot_be_written_end_the_run(tmp_path, monkeypatch):
    head = make(tmp_path / "store")
    train(head, 2)
    checkpoint.save(tmp_path / "run", head)
    with monkeypatch.context() as patch:
        patch.setattr(head.center_store.rows, "write", lambda *_: (_ for _ in ()).throw(StoreError("broken")))
        with pytest.raises(StoreError, match="broken"):
            train(head, 3)
    with pytest.raises(StoreError, match=r"an earlier step could not be written: broken\. Load the last checkpoint"):
        train(head, 1)


@pytest.mark.parametrize("source", ["device", "file"])
def test_checkpoints_are_loaded_and_converted_between_storages(source, tmp_path):
    """The same rows whether they are loaded by a head of the other kind or converted; and into a .safetensors file."""
    head = make("device" if source == "device" else tmp_path / "store", "bf16+int8")
    train(head, 4)
    checkpoint.save(tmp_path / "run", head)
    right = state(head)
    if source == "file":
        train(head, 1)  # not saved
        head.center_store.close()
    others = {"device": "device", "host": "host", "file": tmp_path / "other"}
    for name, storage in others.items():
        other = make(storage, "bf16+int8")
        checkpoint.load(tmp_path / "run", other)
        assert other.step == 4
        assert_equal(state(other), right)
        if name == "file":
            train(other, 1)
            other.center_store.close()
    convert.convert([tmp_path / "run"], tmp_path / "centers.safetensors")
    assert_equal(
        {name: next(rows.pieces()) for name, rows in convert.read(tmp_path / "centers.safetensors").tensors.items()},
        right,
    )
    convert.convert([tmp_path / "run"], tmp_path / "plain")
    convert.convert([tmp_path / "run"], tmp_path / "stored", center_storage=tmp_path / "new")
    for root, storage in ((tmp_path / "plain", "device"), (tmp_path / "stored", tmp_path / "new")):
        other = make(storage, "bf16+int8")
        checkpoint.load(root, other)
        assert_equal(state(other), right)
    torch.save({"W": torch.randn(D, CLASSES)}, tmp_path / "loss.pt")
    with pytest.raises(convert.ConvertError, match="center_storage needs a source with the state of a CenterSGD"):
        convert.convert([tmp_path / "loss.pt"], tmp_path / "again", center_storage=tmp_path / "newer")
    with pytest.raises(checkpoint.CheckpointError, match="must be a new or an empty folder"):
        convert.convert([tmp_path / "run"], tmp_path / "again", center_storage=tmp_path / "new")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("where", ["layout", "journal", "rows", "checkpoint"])
def test_a_full_disk_leaves_no_new_store(where, exists, tmp_path, monkeypatch):
    """In whichever file there is no room, the folder is as it was, and with room the same command works."""
    head = make("device", "bf16+int8")
    train(head, 2)
    checkpoint.save(tmp_path / "run", head)
    folder = tmp_path / "new"
    if exists:
        folder.mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        @staticmethod
        def transfer_records(write: bool, *arguments: object) -> int:
            return errno.ENOSPC if write else own.transfer_records(write, *arguments)

    own = records._native
    name, value = {
        "layout": ("fused_arcface.store.folder.files.write_text", full),
        "journal": ("fused_arcface.store.journal.os.pwrite", full),
        "rows": ("fused_arcface.store.records._native", Full),
        "checkpoint": ("fused_arcface.checkpoint.storage.Writer.write_data", full),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(name, value)
        with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
            convert.convert([tmp_path / "run"], tmp_path / "stored", center_storage=folder)
    assert list(folder.iterdir()) == [] if exists else not folder.exists()
    convert.convert([tmp_path / "run"], tmp_path / "stored", center_storage=folder)
    other = make(folder, "bf16+int8")
    checkpoint.load(tmp_path / "stored", other)
    assert_equal(state(other), state(head))


def test_a_store_that_a_checkpoint_names_stays(tmp_path, monkeypatch):
    """The checkpoint has its name already when the sync of its folder fails."""
    head = make("device", "bf16+int8")
    train(head, 2)
    checkpoint.save(tmp_path / "run", head)
    with monkeypatch.context() as patch:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr("fused_arcface.checkpoint.directory.settle", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
            convert.convert([tmp_path / "run"], tmp_path / "stored", center_storage=tmp_path / "new")
    other = make(tmp_path / "new", "bf16+int8")
    checkpoint.load(tmp_path / "stored", other)
    assert_equal(state(other), state(head))


def test_a_head_without_room_leaves_the_files_of_others(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes").write_text("not of a store")
    with monkeypatch.context() as patch:
        patch.setattr("fused_arcface.store.folder.files.write_text", lambda *_: (_ for _ in ()).throw(OSError("full")))
        for name in ("store", "new"):
            with pytest.raises(StoreError, match="the store of class centers cannot be made: full"):
                make(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["notes"]
    make(tmp_path / "store").center_store.close()


def test_a_store_that_another_process_makes_stays(tmp_path):
    """A convert that comes into the same folder is refused, and leaves it alone."""
    head = make("device", "bf16+int8")
    train(head, 2)
    checkpoint.save(tmp_path / "run", head)
    folder = tmp_path / "new"
    source = convert.read(tmp_path / "run")
    messages = []

    def pieces():
        child = os.fork()
        if child == 0:
            lock._open_here.clear()  # as in a process of its own
            try:
                with stored.new_store(folder, {}, 0, tmp_path / "other"):
                    pass
            except checkpoint.CheckpointError as error:
                os._exit(7 if "must be a new or an empty folder" in str(error) else 1)
            finally:
                os._exit(2)
        messages.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        with pytest.raises(StoreError, match="is open in this process"):
            make(folder, "bf16+int8")
        yield from own()

    own = source.tensors["weight"].pieces
    source.tensors["weight"].pieces = pieces
    convert.write(source, tmp_path / "stored", folder)
    assert messages == [7]
    other = make(folder, "bf16+int8")
    checkpoint.load(tmp_path / "stored", other)
    assert_equal(state(other), state(head))


def test_a_store_is_found_where_it_was_moved_with_its_run(tmp_path):
    folder = tmp_path / "a"
    head = make(folder / "store")
    train(head, 2)
    checkpoint.save(folder / "run", head)
    right = state(head)
    head.center_store.close()
    folder.rename(tmp_path / "b")
    other = make("device")
    checkpoint.load(tmp_path / "b" / "run", other)
    assert_equal(state(other), right)
    (tmp_path / "b" / "store").rename(tmp_path / "c")
    with pytest.raises(checkpoint.CheckpointError, match="its class centers are in a store that is no longer in"):
        checkpoint.load(tmp_path / "b" / "run", other)
    moved = make(tmp_path / "c")
    checkpoint.load(tmp_path / "b" / "run", moved)
    assert_equal(state(moved), right)


def test_an_untouched_row_takes_no_space_and_is_a_new_heads(tmp_path):
    head = make(tmp_path / "store")
    assert (tmp_path / "store" / "rows.bin").stat().st_blocks == 0
    assert_equal(head.full_weight(), make("device").weight.detach())
    assert (tmp_path / "store" / "rows.bin").stat().st_blocks == 0
    assert head.weight.is_meta and head.weight.shape == (CLASSES, D)


@pytest.mark.parametrize("name", ["store.json", "states.json"])
def test_only_regular_files_of_some_size_are_read(tmp_path, name):
    """A named pipe would make the reader wait without an end."""
    folder = tmp_path / "store"
    head = fa.PartialFC(4, 20, sample_rate=0.5, center_optimizer=fa.CenterSGD(lr=0.1), center_storage=str(folder))
    checkpoint.save(tmp_path / "run", head)
    head.center_store.close()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    read = layout_of if name == "store.json" else states
    with pytest.raises(StoreError, match=rf"{name} must be a regular file; it is a named pipe"):
        read(folder)
    (folder / name).unlink()
    for content, why in ((b"[" * 100_000, "cannot be read"), (b" " * ((1 << 20) + 1), "must have <= 1048576 bytes")):
        (folder / name).write_bytes(content)
        with pytest.raises(StoreError, match=why):
            read(folder)
