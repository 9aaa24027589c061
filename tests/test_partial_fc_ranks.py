"""What the ranks of a PartialFC agree on: its options, errors on one of them, its collectives, its group."""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import distributed_helpers
from support.head_training import D, batches, own_rows, train_head

import fused_arcface as fa
from fused_arcface.parallel import ranks as fused_distributed
from fused_arcface.parallel.agreement import Header

pytestmark = pytest.mark.distributed


def fewer_classes_than_ranks() -> list:
    head = fa.PartialFC(D, 2, dtype=torch.float64)
    x = torch.arange(1.0, D + 1, dtype=torch.float64).expand(2, D).clone().requires_grad_()
    loss = head(x, torch.tensor([0, 1]))
    loss.backward()
    return [loss.detach(), x.grad, head.num_local]


def test_more_ranks_than_classes():
    results = distributed_helpers.run_ranks(3, fewer_classes_than_ranks)
    expected, expected_gradient, _ = fewer_classes_than_ranks()
    assert [result[2] for result in results] == [1, 1, 0]
    for loss, gradient, _ in results:
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)  # each rank's rows are the joint batch's W-th part


def disagree(option: str, values: list) -> str:
    try:
        fa.PartialFC(**{"embedding_dim": 4, "num_classes": 10, option: values[dist.get_rank()]})
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("num_classes", [10, 11]),
        ("margin", [fa.ArcFace(), fa.ArcFace(0.4)]),
        ("seed", [0, 1]),
        ("dtype", [torch.float32, torch.float64]),
        ("sample_rate", [1.0, 0.5]),
        ("scale", [64.0, 30.0]),
        ("embedding_dim", [4, 5]),
        ("center_optimizer", [None, fa.CenterSGD(0.1)]),
        ("dense_grad", [False, True]),
    ],
)
def test_options_that_differ_between_ranks_are_refused_everywhere(option, values):
    for message in distributed_helpers.run_ranks(2, disagree, option, values):
        assert message.startswith(f"PartialFC: {option} must be the same on every rank; got rank 0: ")


def bad_arguments() -> dict[str, str]:
    """What each rank is told when rank 1 alone passes something wrong, one wrong thing after the other."""
    head = fa.PartialFC(4, 10)
    head(torch.randn(3, 4), torch.tensor([1, 2, 3]))
    wrong, x = dist.get_rank() == 1, torch.randn(2, 4)
    calls = {
        "label": lambda: head(x, torch.tensor([0, 10 if wrong else 1])),
        "shape": lambda: head(torch.randn(2, 5) if wrong else x, torch.tensor([0, 1])),
        "target": lambda: head(x, [0, 1] if wrong else torch.tensor([0, 1])),
        "logits": lambda: head.logits(torch.randn(2, 5) if wrong else x),
        "topk": lambda: head.topk(torch.randn(2, 5) if wrong else x, 2),
        "k": lambda: head.topk(x, 11 if wrong else 2),
        "load": lambda: head.load_full_weight([1] if wrong else torch.zeros(10, 4)),
        "dtype": lambda: fa.PartialFC(4, 10)(x.bfloat16() if wrong else x, torch.tensor([0, 1])),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            messages[name] = str(error)
    assert head(x, torch.tensor([0, 1])).isfinite()  # and the ranks still agree on where they are
    return messages


def test_bad_arguments_on_one_rank_raise_on_all():
    other, own = distributed_helpers.run_ranks(2, bad_arguments)
    assert own["shape"] == own["logits"] == own["topk"] == "embeddings must be (N, D=4); got (2, 5)"
    assert own["target"] == "target must be labels (N,), or (first, second, share) for mixed labels; got 2 items"
    assert own["k"] == "k must be <= C_total=10; got 11"
    for name in ("shape", "target", "logits", "topk", "k"):
        assert "rank(s) 1 refused" in other[name]
    for told in (own, other):
        assert "target must be in [0, C=10)" in told["label"]
        assert told["load"] == "tensor must be (C_total=10, D=4); got list"
        assert told["dtype"].startswith("embeddings must have the same dtype on every rank; got torch.float32, torch.b")


SCATTER = "all_reduce SUM"
"""The last collective of a step on a CPU, where gloo scatters a sum like that too; on a GPU it is a reduce-scatter."""


def collectives_of_a_step(options: dict, rows: list[int], **arguments: bool) -> list[str]:
    """The collectives of a forward and backward pass, in order; after one that has made room for its rows."""
    head = fa.PartialFC(D, 10, **options)
    ((x, y),) = batches(10, rows[head.ranks.rank], torch.float32, 1)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for module, names in {
            fused_distributed: ("_all_gather", "_reduce_scatter"),
            dist: ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "all_to_all", "send"),
        }.items():
            for name in names:
                plain = getattr(module, name)

                def counted(*args, name=name, plain=plain, **kwargs):
                    op = kwargs.get("op", dist.ReduceOp.SUM) if name == "all_reduce" else None
                    calls.append(name if op is None else f"{name} {'MAX' if op == dist.ReduceOp.MAX else 'SUM'}")
                    return plain(*args, **kwargs)

                patch.setattr(module, name, counted)
        for _ in range(2):
            calls.clear()
            result = head(x.clone().requires_grad_(), y, **arguments)
            (result[0] if arguments else result).backward()
    return calls


@pytest.mark.parametrize(
    ("options", "arguments", "more"),
    [
        ({}, {}, []),
        ({"sample_rate": 0.5}, {}, []),
        ({"center_optimizer": fa.CenterSGD(0.1)}, {}, []),
        ({}, {"return_stats": True}, ["all_reduce MAX"]),
    ],
)
def test_a_step_has_three_collectives(options, arguments, more):
    for calls in distributed_helpers.run_ranks(2, partial(collectives_of_a_step, **arguments), options, [3, 5]):
        assert calls == ["_all_gather", "all_reduce SUM", *more, SCATTER]


def test_beyond_the_normal_range_a_step_has_one_more():
    for calls in distributed_helpers.run_ranks(2, collectives_of_a_step, {"scale": 128.0}, [3, 5]):
        assert calls == ["_all_gather", "all_reduce MAX", "all_reduce SUM", SCATTER]


def subgroup_of_the_ranks() -> torch.Tensor | str:
    group = dist.new_group([1, 2])
    if dist.get_rank() in (1, 2):
        result = train_head(23, 12, torch.float64, {"group": group}, "auto")
        return result["final"]
    with pytest.raises(TypeError, match="group must be a ProcessGroup"):
        fa.PartialFC(D, 23, group=group)
    return "outside"


def test_subgroup():
    outside, *inside = distributed_helpers.run_ranks(3, subgroup_of_the_ranks)
    assert outside == "outside"
    for weight in inside:
        torch.testing.assert_close(weight, train_head(23, 12, torch.float64, {}, "auto")["final"])


def mesh_head() -> torch.Tensor:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    head = fa.PartialFC(4, 9, group=mesh["shard"])
    with pytest.raises(ValueError, match="one-dimensional DeviceMesh"):
        fa.PartialFC(4, 9, group=mesh)
    return head.full_weight()


def test_device_mesh():
    full = fa.PartialFC(4, 9).full_weight()
    for weight in distributed_helpers.run_ranks(4, mesh_head):
        assert torch.equal(weight, full)


def frozen_backbone_on_one_rank() -> list:
    head = fa.PartialFC(4, 9, dtype=torch.float64)
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=dist.get_rank() == 0)
    head(x, torch.tensor([0, 5])).backward()
    return [x.grad, head.weight.grad]


def test_embeddings_without_gradient_on_one_rank():
    first, second = distributed_helpers.run_ranks(2, frozen_backbone_on_one_rank)
    assert first[0] is not None and second[0] is None
    assert first[1].isfinite().all() and second[1].isfinite().all()


def record_devices(patch: pytest.MonkeyPatch) -> list[str]:
    """The devices of the tensors that are gathered from now on; the values of those on the meta device are made up."""
    devices = []

    def all_gather(received: torch.Tensor, send: torch.Tensor, group: object, async_op: bool = False) -> mock.Mock:
        devices.append(send.device.type)
        return mock.Mock()  # a work that has ended

    patch.setattr(fused_distributed, "_all_gather", all_gather)
    patch.setattr(fused_distributed, "_headers", lambda numbers: [Header(0)] * 2)
    return devices


def devices_of_headers() -> dict[str, list[str]]:
    """Where headers travel for class centers on a GPU, for which the meta device stands in: it is not the CPU."""
    groups = {"gloo": None, "cuda:gloo": dist.new_group(backend="cuda:gloo")}
    devices = {}
    for name, group in groups.items():
        ranks = fused_distributed.Ranks(group)
        with pytest.MonkeyPatch.context() as patch:
            devices[name] = record_devices(patch)
            ranks.refuse_batch(torch.device("meta"))
            ranks.meet("PartialFC", {}, torch.device("meta"))
    return devices


def test_headers_travel_where_the_group_has_a_backend():
    for devices in distributed_helpers.run_ranks(2, devices_of_headers):
        assert devices == {"gloo": ["cpu", "cpu"], "cuda:gloo": ["meta", "meta"]}


def train_with_headers_apart(dtypes: list[torch.dtype]) -> list[torch.Tensor | str]:
    """Losses of batches of growing size and changing dtype, and errors between them; headers as for a GPU."""
    fused_distributed.Ranks._headers_travel_apart = lambda self, device: True
    head, results = fa.PartialFC(D, 23, seed=5), []
    for step, dtype in enumerate(dtypes):
        ((x, y),) = batches(23, 4 * step + 3, torch.float32, 1)
        part = own_rows(head.ranks.world_size, head.ranks.rank, len(y), step)
        results.append(head(x[part].to(dtype), y[part]).detach())
        try:
            head.topk(x[part], 1 if head.ranks.rank == 0 else 2)
        except ValueError as error:
            results.append(str(error))
    return results


def test_headers_that_travel_apart():
    """The CPU stands in for a GPU."""
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    head = fa.PartialFC(D, 23, seed=5)
    for losses in distributed_helpers.run_ranks(2, train_with_headers_apart, dtypes):
        for step, dtype in enumerate(dtypes):
            ((x, y),) = batches(23, 4 * step + 3, torch.float32, 1)
            torch.testing.assert_close(losses[2 * step], head(x.to(dtype), y).detach())
            assert losses[2 * step + 1] == "PartialFC: k must be the same on every rank; got rank 0: 1, rank 1: 2"
