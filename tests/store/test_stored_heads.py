"""Class centers in host memory and in a file train as those on the device, step for step, to the bit."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from conftest import NoWaiting
from support import distributed_helpers
from support.stored_training import CLASSES, DTYPES, ROWS, D, assert_equal, batch, make, state, train

import fused_arcface as fa
from fused_arcface import checkpoint, partial_fc
from fused_arcface.center_update import PendingUpdate
from fused_arcface.engine import ops as ops_module
from fused_arcface.store import StoreError, centers


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("sub_centers", [1, 2])
@pytest.mark.parametrize("storage", ["host", "file"])
def test_twenty_steps_equal_those_on_the_device(storage, sub_centers, dtypes, tmp_path):
    heads = [make(each, dtypes, sub_centers=sub_centers) for each in ("device", tmp_path / "store")]
    if storage == "host":
        heads[1].center_store.close()
        heads[1] = make("host", dtypes, sub_centers=sub_centers)
    right, mine = (train(head, 20) for head in heads)
    assert_equal(mine, right)
    assert_equal(state(heads[1]), state(heads[0]))
    x, _ = batch(0)
    for call in (lambda head: head.full_weight(), lambda head: head.topk(x, 5), lambda head: head.logits(x)):
        assert_equal(call(heads[1]), call(heads[0]))


def train_and_save(root: str, storage: str, dtypes: str, steps: int) -> list:
    """Resume, train, save; return losses, samples and all rows."""
    head = make(storage if storage in ("device", "host") else f"{root}/store", dtypes)
    if checkpoint.latest(root):
        checkpoint.load(root, head)
    results = train(head, steps)
    checkpoint.save(root, head)
    held = state(head)
    whole = {name: torch.cat(head.ranks.gather_rows(held[name], head.row_counts())) for name in held}
    if head.center_store is not None:
        head.center_store.close()
    return [[(loss, sampled) for loss, _, sampled in results], whole]


def train_storages(folder: str, steps: int) -> list:
    return [
        [
            train_and_save(f"{folder}/{storage}-{dtypes}", storage, dtypes, steps)
            for storage in ("device", "host", "file")
        ]
        for dtypes in DTYPES
    ]


@pytest.mark.distributed
def test_ranks_and_a_resumption_on_another_number_of_them(tmp_path):
    """Two ranks, then four, then one: each time the three storages are equal to the bit."""
    for world_size in (2, 4):
        for rank in distributed_helpers.run_ranks(world_size, train_storages, str(tmp_path), 7):
            for device, host, file in rank:
                assert_equal(host, device)
                assert_equal(file, device)
    for device, host, file in train_storages(str(tmp_path), 6):
        assert_equal(host, device)
        assert_equal(file, device)


@pytest.mark.parametrize("storage", ["host", "file"])
def test_a_step_moves_the_bytes_of_its_sample_through_buffers_of_its_own(storage, tmp_path):
    head = make("host" if storage == "host" else tmp_path / "s", "bf16+int8")
    row = D * 2 + D * 1 + 2 * 4  # center, momentum, two units
    x, y = batch(1)
    loss = head(x.requires_grad_(), y)
    count = len(head.sampled)
    traffic = head.center_store.traffic
    before = head.weight.detach().clone() if storage == "host" else None
    assert count == 50
    if storage == "host":
        assert (traffic.read, traffic.written) == (count * row, 0)
        assert torch.equal(head.weight, before)
    loss.backward()
    head.center_store.drain()
    assert traffic.written == count * row
    # A file's step has also read what the next step draws, 50 rows.
    assert traffic.read == count * row * (1 if storage == "host" else 2)
    if storage == "host":
        buffers = head.center_store._pipeline._buffers._sets
        addresses = {tensor.untyped_storage().data_ptr() for each in buffers for tensor in each.values()}
        held = {tensor.untyped_storage().data_ptr() for tensor in head._held().values()}
        assert len(addresses) >= 3 and not addresses & held
        changed = (head.weight != before).any(1).nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(head.sampled.tolist()) and len(changed) > 0


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("storage", ["host", "file"])
def test_the_way_of_a_gpu_with_the_cpu_in_its_place(storage, dtypes, tmp_path, monkeypatch):
    """Padded samples, the row more, the copies of a stream; with host memory no value is read."""
    monkeypatch.setattr(ops_module, "check_target_range", lambda *_: None)
    monkeypatch.setattr(PendingUpdate, "start", lambda self, gradient: setattr(self, "_loss_gradient", gradient))
    heads = make("device", dtypes, backend="torch"), make("host" if storage == "host" else tmp_path / "s", dtypes)
    for head in heads:
        head.backend = "torch"
    monkeypatch.setattr(centers, "waits", lambda _: True)
    # For the rows of a file the labels are on the host. Both are padded: padding may change the last bit of a product.
    monkeypatch.setattr(partial_fc, "_is_waited_for", lambda _: storage == "host")
    for step in range(8):
        results = []
        for head in heads:
            as_gpu = head is heads[1]
            x, y = batch(head.step, rows=(12, 60, 1)[step % 3])
            x.requires_grad_()
            with NoWaiting() if as_gpu and storage == "host" else contextlib.nullcontext():
                loss = head(x, y)
                loss.backward()
            results.append((loss.detach(), x.grad, head.sampled))
        assert_equal(results[1], results[0])
    monkeypatch.undo()
    assert_equal(state(heads[1]), state(heads[0]))


@pytest.mark.parametrize("storage", ["host", "file"])
def test_steps_out_of_order_take_the_rows_as_they_are(storage, tmp_path):
    """A forward pass without a backward pass, a step that is taken again, a loaded step, held and dropped updates."""
    heads = make("device"), make("host" if storage == "host" else tmp_path / "s")
    for head in heads:
        train(head, 3)
        with torch.no_grad():
            head(*batch(9))
        train(head, 2)
        head.step -= 1
        train(head, 2)
        head.center_optimizer.hold()
        train(head, 1)
        head.center_optimizer.release(apply=False)
        head.step -= 1
        head.center_optimizer.hold()
        train(head, 1)
        head.center_optimizer.release(apply=True)
        head.weight.requires_grad_(False)
        head(*batch(3))
        head.weight.requires_grad_(True)
        x, y = batch(7)
        head(x.masked_fill(torch.arange(ROWS)[:, None] == 2, torch.nan).requires_grad_(), y).backward()  # is skipped
        train(head, 2)
    assert_equal(state(heads[1]), state(heads[0]))


@pytest.mark.parametrize("storage", ["host", "file"])
def test_a_graph_whose_buffer_has_been_used_again_is_refused(storage, tmp_path):
    head = make("host" if storage == "host" else tmp_path / "s")
    before = state(head)
    x, y = batch(1)
    first = head(x.requires_grad_(), y)
    for _ in range(2):
        head(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()
    assert_equal(state(head), before)


def test_full_weight_is_loaded_into_a_file(tmp_path):
    heads = make("device"), make(tmp_path / "s")
    weight = torch.randn(CLASSES, D)
    for head in heads:
        train(head, 2)
        head.load_full_weight(weight)
        train(head, 2)
    assert_equal(state(heads[1]), state(heads[0]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"center_optimizer": None}, ValueError, "center_storage must be 'device' without a CenterSGD"),
        ({"sample_rate": 1.0}, ValueError, "center_storage must be 'device' with sample_rate=1"),
        ({"center_storage": 3}, TypeError, "center_storage must be 'device', 'host' or the path of a folder; got int"),
        ({"center_storage": ""}, ValueError, "center_storage must be .*; got ''"),
    ],
)
def test_what_cannot_work_is_refused(options, error, message, tmp_path):
    given = {"sample_rate": 0.1, "center_optimizer": fa.CenterSGD(0.1), "center_storage": tmp_path / "s", **options}
    with pytest.raises(error, match=message):
        fa.PartialFC(D, CLASSES, **given)
    assert list(tmp_path.iterdir()) == []


def test_calls_that_need_all_rows_say_so(tmp_path, monkeypatch):
    head = make(tmp_path / "s")
    for call in (head.state_dict, lambda: head.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"center_storage keeps them in a file: use fused_arcface\.checkpoint"):
            call()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(StoreError, match="cannot be copied"):
            copied(head)
    with pytest.raises(TypeError, match=r"keep their dtype torch\.float32; got torch\.bfloat16"):
        head.to(torch.bfloat16)
    monkeypatch.setattr("fused_arcface.stored_centers.available_bytes", lambda _: 100)
    with pytest.raises(MemoryError, match=r"full_weight\(\) needs 0\.0 GiB of host memory.*topk\(\) or logits\(\)"):
        head.full_weight()
    head.eval()
    with pytest.raises(RuntimeError, match=r"in eval\(\) the loss uses all class centers"):
        head(*batch(0))
    assert head.topk(batch(0)[0], 3)[1].shape == (ROWS, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_a_copy_of_a_head_in_host_memory_trains_apart_from_it(copied):
    head = make("host")
    train(head, 2)
    other = copied(head)
    before = state(head)
    train(other, 2)
    assert_equal(state(head), before)
    train(head, 2)
    assert_equal(state(head), state(other))


def test_a_state_dict_of_host_memory_is_that_of_the_device():
    heads = make("device"), make("host")
    for head in heads:
        train(head, 3)
    dicts = [head.state_dict() for head in heads]
    assert_equal(dicts[1], dicts[0])
    other = make("host", seed=6)
    other.load_state_dict(dicts[0])
    for head in (heads[0], other):
        head.seed = 5
        head.center_optimizer._seed = 5
        train(head, 3)
    assert_equal(state(other), state(heads[0]))


def other_rate(head: fa.PartialFC) -> None:
    head.sample_rate = 0.4


def other_seed(head: fa.PartialFC) -> None:
    head.seed += 1


def an_earlier_step(head: fa.PartialFC) -> None:
    head.step = 1


@pytest.mark.parametrize("change", [other_rate, other_seed, an_earlier_step])
@pytest.mark.parametrize("storage", ["host", "file"])
def test_a_change_between_steps_draws_other_rows_than_were_fetched(change, storage, tmp_path):
    heads = make("device", "fp32"), make("host" if storage == "host" else tmp_path / "s", "fp32")
    for head in heads:
        train(head, 3)
        change(head)
    right, mine = (train(head, 3) for head in heads)
    assert_equal(mine, right)
    assert_equal(state(heads[1]), state(heads[0]))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("between", [1, 2, 3])
@pytest.mark.parametrize("storage", ["host", "file"])
def test_forward_passes_without_a_gradient_leave_the_buffers_of_a_step(storage, between, dtypes, tmp_path):
    heads = make("device", dtypes), make("host" if storage == "host" else tmp_path / "s", dtypes)
    for head in heads:
        train(head, 2)
        x, y = batch(7)
        loss = head(x.requires_grad_(), y)
        with torch.no_grad():
            for number in range(between):
                head(*batch(20 + number))
        loss.backward()
        train(head, 2)
    assert_equal(state(heads[1]), state(heads[0]))


@pytest.mark.parametrize("storage", ["host", "file"])
def test_a_learned_scale_is_on_the_computing_device(storage, tmp_path):
    """The weight of a file is on ``meta``, which is the place of no scale."""
    gradients = []
    for where in ("device", "host" if storage == "host" else tmp_path / "s"):
        head = make(where, scale=torch.nn.Parameter(torch.tensor(20.0)))
        train(head, 3)
        gradients.append(head.scale.grad)
    assert gradients[0] != 0 and torch.equal(gradients[0], gradients[1])
