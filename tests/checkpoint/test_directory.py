"""Checkpoints on disks that flip bits and fill up, in processes that are killed, beside files of other people."""

import errno
import json
import os
import random
import re
import shutil
import time
import zlib

import pytest
import torch
from support import distributed_helpers
from support.small_checkpoints import D, copied, full_disk, make, refusal, same, state, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_arcface as fa
from fused_arcface import checkpoint
from fused_arcface.checkpoint import storage
from fused_arcface.checkpoint.roots import keep_alone, remove_unfinished


def test_a_flipped_bit_in_any_file_is_a_named_error_with_the_way_back(tmp_path, monkeypatch):
    """Small blocks, so that the files have several; 40 flips in each file, 10 of them in its first bytes."""
    monkeypatch.setattr(storage, "BLOCK", 256)
    monkeypatch.setattr(checkpoint.manifest, "BLOCK", 256)
    head, net = make()
    first = checkpoint.save(tmp_path, head, net=net, note=(1, 2))
    step(head, net)
    newest = checkpoint.save(tmp_path, head, net=net, note=(1, 2))
    exact = copied(state(head, net))
    other, untouched = make(seed=1), None
    untouched = copied(state(*other))
    draw = random.Random(5)
    tried = 0
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for place in [*range(10), *(draw.randrange(len(whole)) for _ in range(30))]:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            message = refusal(checkpoint.load, tmp_path, other[0], net=other[1])
            if message:
                advice = f"{re.escape(str(first))}, saved before it, is whole: .* remove {re.escape(str(newest))}"
                assert re.search(advice, message), message
                assert same(state(*other), untouched)
            else:  # white space in JSON
                assert same(state(*other), exact)
                other = make(seed=1)
            tried += 1
        path.write_bytes(whole)
    assert tried == 40 * len(list(newest.iterdir())) == 120
    checkpoint.load(tmp_path, other[0], net=other[1])
    assert same(state(*other), exact)


def test_the_way_back_is_checked_and_works(tmp_path):
    head, net = make()
    saved = []
    for _ in range(3):
        saved.append(checkpoint.save(tmp_path, head, keep=3, net=net))
        step(head, net)
    for path in saved[1:]:
        data = path / "__0_0.distcp"
        data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    with pytest.raises(checkpoint.CheckpointError, match=re.escape(f"{saved[0]}, saved before it, is whole")):
        checkpoint.load(tmp_path, head, net=net)
    for path in saved[1:]:  # what the message says
        shutil.rmtree(path)
    checkpoint.load(tmp_path, head, net=net)
    assert head.step == 0
    data = saved[0] / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError, match=r"is truncated: .*No whole checkpoint before it is left"):
        checkpoint.load(tmp_path, head, net=net)


def damaged_on_two_ranks(root: str) -> tuple[str, bool]:
    head, net = make(seed=1)
    before = copied(state(head, net))
    try:
        checkpoint.load(root, head, net=net)
    except checkpoint.CheckpointError as error:
        return str(error), same(state(head, net), before)
    return "", False


@pytest.mark.distributed
def test_damage_that_one_rank_reads_is_an_error_on_all(tmp_path):
    head, net = make()
    checkpoint.save(tmp_path, head, net=net)
    step(head, net)
    data = checkpoint.save(tmp_path, head, net=net) / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    for message, unchanged in distributed_helpers.run_ranks(2, damaged_on_two_ranks, str(tmp_path)):
        assert "step_0000000000, saved before it, is whole" in message and unchanged


def test_each_byte_is_read_once(tmp_path, monkeypatch):
    """A tensor over several blocks, read by three ranks' worth of rows: no block is read twice, and only those that
    hold rows which are wanted."""
    monkeypatch.setattr(storage, "BLOCK", 4096)
    monkeypatch.setattr(checkpoint.manifest, "BLOCK", 4096)
    head = fa.PartialFC(64, 300)  # 76,800 bytes
    checkpoint.save(tmp_path, head)
    read = []
    own = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data, *start: read.append(len(data)) or own(data, *start))
    saved = checkpoint.find(tmp_path)
    read.clear()
    rows = torch.empty(100, 64)
    saved.read({"head.weight": checkpoint.RowShard(rows, 100, 300)})
    assert torch.equal(rows, head.weight[100:200])
    assert sum(read) <= 100 * 64 * 4 + 2 * 4096
    saved = checkpoint.find(tmp_path)
    read.clear()
    pieces = checkpoint.RowShard(torch.empty(20, 64), 0, 300)
    pieces.pieces = [(start, torch.empty(20, 64)) for start in range(0, 300, 20)]
    saved.read({"head.weight": pieces})
    assert torch.equal(torch.cat([rows for _, rows in pieces.pieces]), head.weight)
    assert sum(read) == 300 * 64 * 4


def test_blocks_of_another_size_are_read(tmp_path, monkeypatch):
    """The size is in the manifest: that of a later version may be another."""
    head, net = make()
    with monkeypatch.context() as patch:
        for module in (storage, checkpoint.manifest):
            patch.setattr(module, "BLOCK", 128)
        checkpoint.save(tmp_path, head, net=net)
    other = make(seed=1)
    checkpoint.load(tmp_path, other[0], net=other[1])
    assert same(state(*other), state(head, net))


def test_names_that_are_not_ours_are_left_alone(tmp_path):
    head, net = make()
    for number in range(3):
        (tmp_path / f"step_{number:010d}_good").mkdir()
    checkpoint.save(tmp_path, head)
    shutil.copytree(tmp_path / "step_0000000000", tmp_path / "step_0000000000_mine")
    (tmp_path / "step_notes.txt").write_text("lr 0.1")
    (tmp_path / "step_0000000099").mkdir()  # somebody's, without a manifest
    (tmp_path / "step_0000000098").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    kept = {path.name for path in tmp_path.iterdir()} - {"step_0000000000"}
    for _ in range(3):
        step(head, net)
        newest = checkpoint.save(tmp_path, head, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == kept | {newest.name} == kept | {"step_0000000003"}
    assert checkpoint.latest(tmp_path) == newest


def test_a_link_to_another_disk_is_read_and_not_removed(tmp_path):
    head, net = make()
    root, disk = tmp_path / "root", tmp_path / "disk"
    checkpoint.save(root, head).rename(disk)
    (root / "step_0000000000").symlink_to(disk)
    checkpoint.load(root, head)
    step(head, net)
    checkpoint.save(root, head, keep=1)
    assert (disk / "manifest.json").exists() and (root / "step_0000000000").is_symlink()


def test_the_newest_is_that_of_the_highest_step(tmp_path):
    """Whatever the dates say, and without the file that names it."""
    head, net = make()
    saved = []
    for _ in range(12):
        saved.append(checkpoint.save(tmp_path, head, keep=20))
    step(head, net)
    saved.append(checkpoint.save(tmp_path, head, keep=20))
    assert [path.name for path in saved[9:]] == [
        "step_0000000000.9", "step_0000000000.10", "step_0000000000.11", "step_0000000001"
    ]  # fmt: skip
    now = time.time()
    for age, path in enumerate(saved):
        os.utime(path, (now - age, now - age))
    (tmp_path / "latest").unlink()
    assert checkpoint.latest(tmp_path) == saved[-1]
    shutil.rmtree(saved[-1])
    assert checkpoint.latest(tmp_path) == saved[-2]
    (tmp_path / "latest").mkdir()  # somebody's
    step(head, net)
    newest = checkpoint.save(tmp_path, head, keep=2)
    assert sorted(tmp_path.glob("step_*")) == [tmp_path / "step_0000000000.11", newest]
    checkpoint.load(tmp_path, head)


class Buffers(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(D) for _ in range(5))
        for layer in self.layers:
            layer.running_mean.fill_(rank)


def save_own_buffers(root: str) -> None:
    head, _ = make()
    rank = head.ranks.rank
    checkpoint.save(root, head, net=Buffers(rank), note={"rank": rank}, tensor=torch.tensor(rank))


@pytest.mark.distributed
def test_what_differs_between_ranks_is_rank_0s(tmp_path):
    distributed_helpers.run_ranks(3, save_own_buffers, str(tmp_path))
    net = checkpoint.load_state(tmp_path, "net")
    assert [net[f"layers.{place}.running_mean"][0].item() for place in range(5)] == [0] * 5
    assert checkpoint.load_state(tmp_path, "note") == {"rank": 0}
    assert checkpoint.load_state(tmp_path, "tensor") == 0


def sharded(root: str, save: bool) -> bool:
    """A net in DTensors, saved in shards and loaded on another number of ranks."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(6 if save else 7)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for module in net:
        fully_shard(module, mesh=mesh)
    head = make()[0]
    if save:
        checkpoint.save(root, head, net=net)
    else:
        checkpoint.load(root, head, net=net)
    torch.manual_seed(6)
    expected = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    found = {name: tensor.full_tensor() for name, tensor in net.state_dict().items()}
    return all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.distributed
def test_sharded_nets_on_another_number_of_ranks(tmp_path):
    assert all(distributed_helpers.run_ranks(3, sharded, str(tmp_path), True))
    assert len(list(tmp_path.glob("step_*/*.distcp"))) == 3
    assert all(distributed_helpers.run_ranks(2, sharded, str(tmp_path), False))
    assert checkpoint.load_state(tmp_path, "net")["0.weight"].shape == (7, 5)


def refused_on_two_ranks(root: str) -> list[str]:
    """One rank's disk is full while it writes; then the first's while it puts the manifest in its place."""
    head, net = make()
    checkpoint.save(root, head, net=net)
    head.step, messages = 1, []
    with pytest.MonkeyPatch.context() as patch:
        if head.ranks.rank == 1:
            patch.setattr(storage.Writer, "write_data", lambda *_: full_disk())
        messages.append(refusal(checkpoint.save, root, head, net=net))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.roots.files, "write_text", lambda *_: full_disk())
        messages.append(refusal(checkpoint.save, root, head, net=net))
    checkpoint.load(root, head, net=net)
    return [*messages, str(head.step)]


@pytest.mark.distributed
def test_a_disk_that_is_full_for_one_rank_is_an_error_on_all(tmp_path):
    found = distributed_helpers.run_ranks(2, refused_on_two_ranks, str(tmp_path))
    for first, second, at in found:
        assert re.search(r"step 1 cannot be written: .*No space left on device \(on rank 1\)", first)
        assert re.search(r"step 1 cannot be written: .*No space left on device$", second)
        assert at == "0"


@pytest.mark.parametrize("distance", [17, pytest.param(1, marks=pytest.mark.full)])
def test_a_damaged_manifest_never_loads_other_numbers(tmp_path, distance):
    """Bit after bit of it."""
    directory = checkpoint.save(tmp_path, make()[0])
    path = directory / "manifest.json"
    whole = path.read_bytes()
    meant = json.loads(whole)
    for bit in range(0, 8 * len(whole), distance):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = checkpoint.manifest.read_content(directory)
        except checkpoint.CheckpointError:
            continue
        assert {**found, "crc32": meant["crc32"]} == meant


def test_a_checkpoint_is_kept_alone_under_another_root(tmp_path, monkeypatch):
    """By links, or by copies where there are none; what is not a checkpoint of this package stays."""
    head, net = make()
    first = checkpoint.save(tmp_path / "a", head, net=net)
    other = tmp_path / "b"
    kept = keep_alone(first, other)
    names = sorted(file.name for file in first.iterdir())
    assert kept == other / first.name and sorted(file.name for file in kept.iterdir()) == names
    assert all(os.path.samefile(first / name, kept / name) for name in names)
    assert keep_alone(first, other) == kept  # once more changes nothing
    (other / "notes").mkdir()
    (other / "step_0000000007").mkdir()
    shutil.copytree(kept, other / ".partial-step_0000000009")  # of a process that died

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *files: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
        step(head, net)
        second = checkpoint.save(tmp_path / "a", head, net=net)
        saved = copied(state(head, net))
        kept = keep_alone(second, other)
    assert not os.path.samefile(second / "manifest.json", kept / "manifest.json")
    assert {path.name for path in other.iterdir()} == {"notes", "step_0000000007", "latest", kept.name}
    (other / "step_0000000007").rmdir()
    step(head, net)
    checkpoint.load(other, head, net=net)
    assert same(state(head, net), saved)

    # Another training has another checkpoint of the same step, and an older one may take its place.
    head, net = make(seed=5)
    older = checkpoint.save(tmp_path / "c", head, net=net)
    step(head, net)
    of_same_step = checkpoint.save(tmp_path / "c", head, net=net)
    for source, name in ((of_same_step, f"{second.name}.1"), (older, older.name)):
        assert keep_alone(source, other) == other / name
        assert [path.name for path in other.iterdir() if path.name.startswith("step_")] == [name]


def test_a_full_disk_while_a_checkpoint_is_kept_alone(tmp_path, monkeypatch):
    head, net = make()
    kept = keep_alone(checkpoint.save(tmp_path / "a", head, net=net), tmp_path / "b")
    before = copied(state(head, net))
    step(head, net)
    second = checkpoint.save(tmp_path / "a", head, net=net)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *files: (_ for _ in ()).throw(OSError(errno.EXDEV, "another disk")))
        patch.setattr(shutil, "copyfileobj", lambda *files: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
        with pytest.raises(OSError, match=r"no room|No space left"):
            keep_alone(second, tmp_path / "b")
    assert checkpoint.latest(tmp_path / "b") == kept
    checkpoint.load(tmp_path / "b", head, net=net)
    assert same(state(head, net), before)
    assert keep_alone(second, tmp_path / "b") == checkpoint.latest(tmp_path / "b")


def test_writers_of_one_root_at_a_time(tmp_path, monkeypatch):
    """A second one begins and ends while the first writes its tensors: both checkpoints are whole and have names."""
    head, net = make()
    other_head, other_net = make(seed=5)
    inner = []
    own = storage.Writer.write_data

    def write_data(self, *arguments):
        if not inner:
            inner.append(None)
            inner[0] = checkpoint.save(tmp_path, other_head, net=other_net)
            remove_unfinished(tmp_path)  # as a run that resumes does
        return own(self, *arguments)

    monkeypatch.setattr(storage.Writer, "write_data", write_data)
    outer = checkpoint.save(tmp_path, head, net=net)
    assert (outer.name, inner[0].name) == ("step_0000000000", "step_0000000000.1")
    assert checkpoint.latest(tmp_path) == inner[0]
    assert {path.name for path in tmp_path.iterdir()} == {outer.name, inner[0].name, "latest"}
    for path, right in ((outer, state(head, net)), (inner[0], state(other_head, other_net))):
        found = make(seed=9)
        checkpoint.load(path, found[0], net=found[1])
        assert same(state(*found), right)


def test_two_processes_save_into_one_root(tmp_path):
    """Each saves twenty times as fast as it can. None fails, and the two that stay are whole."""
    children = []
    for seed in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                head, net = make(seed=seed)
                for _ in range(20):
                    checkpoint.save(tmp_path, head, net=net)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3 and names[0] == "latest"
    for name in names[1:]:
        head, net = make(seed=9)
        checkpoint.load(tmp_path / name, head, net=net)
