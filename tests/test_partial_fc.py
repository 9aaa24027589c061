import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import distributed_helpers
from support.head_training import STEPS, D, batches, own_rows, train_head
from torch import nn
from torch.distributed.fsdp import fully_shard

import fused_arcface as fa
from fused_arcface import backends, partial_fc


def joined(results: list[dict]) -> dict:
    """All ranks' results as one process would have them; what must be equal on every rank is checked to be."""
    for other in results[1:]:
        assert other["losses"] == results[0]["losses"]
        assert torch.equal(other["final"], results[0]["final"])
    return results[0] | {
        name: [torch.cat(parts) for parts in zip(*(result[name] for result in results), strict=True)]
        for name in ("gradients", "sampled")
    }


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal to ``tolerance`` of the largest element, or of one."""
    largest = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


def assert_same_training(actual: dict, expected: dict, tolerance: float) -> None:
    assert torch.equal(actual["initial"], expected["initial"])
    assert_near(torch.tensor(actual["losses"]), torch.tensor(expected["losses"]), tolerance)
    for one, other in zip(actual["gradients"], expected["gradients"], strict=True):
        assert_near(one, other, tolerance)
    for one, other in zip(actual["sampled"], expected["sampled"], strict=True):
        assert torch.equal(one, other)
    assert_near(actual["final"], expected["final"], tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_any_number_of_ranks_trains_alike(backend, sample_rate, dtype, tolerance):
    # At s = 64 each logit of PyTorch's own fp32 products is off by 4e-6, which ten steps amplify past 1e-5.
    steps = 4 if (backend, dtype) == ("torch", torch.float32) else STEPS
    arguments = (23, 12, dtype, {"sample_rate": sample_rate}, backend, steps)
    expected = train_head(*arguments)
    for world_size in (2, 3, 4) if backend == "auto" else (3,):
        actual = joined(distributed_helpers.run_ranks(world_size, train_head, *arguments))
        assert_same_training(actual, expected, tolerance)


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("scale", [64.0, 128.0, 1000.0])
@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
def test_any_number_of_ranks_trains_alike_over_the_full_grid(backend, scale, sample_rate):
    arguments = (101, 17, torch.float64, {"sample_rate": sample_rate, "scale": scale}, backend, 10)
    expected = train_head(*arguments)
    for world_size in (1, 2, 3, 4):
        assert_same_training(joined(distributed_helpers.run_ranks(world_size, train_head, *arguments)), expected, 1e-10)


def test_one_shard_equals_the_reference():
    result = train_head(23, 12, torch.float64, {}, "auto")
    weight = result["initial"]
    for step, (x, y) in enumerate(batches(23, 12, torch.float64)):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        loss = fa.reference.margin_softmax_loss(x, weight, y)
        loss.backward()
        assert result["losses"][step] == pytest.approx(loss.item(), abs=1e-10)
        torch.testing.assert_close(result["gradients"][step], x.grad, rtol=1e-10, atol=1e-10)
        weight = (weight - 0.1 * weight.grad).detach()
    torch.testing.assert_close(result["final"], weight, rtol=1e-10, atol=1e-10)


def backbone() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, D)).double()


def wrapped_by(kind: str, model: nn.Module) -> nn.Module:
    if not dist.is_initialized():
        return model
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def train_backbone(kind: str, rows: int, options: dict) -> dict[str, torch.Tensor]:
    """A backbone under DistributedDataParallel or FSDP2, where there is a group, and the head beside it."""
    model, head = backbone(), fa.PartialFC(D, 11, dtype=torch.float64, **options)
    wrapped = wrapped_by(kind, model)
    parameters = [*wrapped.parameters(), *([] if head.center_optimizer else [head.weight])]
    optimizer = torch.optim.SGD(parameters, lr=0.05, foreach=False)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 11, (rows,), generator=generator)
        part = own_rows(head.ranks.world_size, head.ranks.rank, rows, 1)
        optimizer.zero_grad()
        head(wrapped(x[part]), y[part]).backward()
        optimizer.step()
    state = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state_of(model)}
    return {**state, "head": head.full_weight()}


def state_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.detach()) for name, value in model.state_dict().items()]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "world_size", "options"),
    [
        ("ddp", 2, {}),
        ("ddp", 4, {}),
        ("ddp", 4, {"center_optimizer": fa.CenterSGD(0.05), "sample_rate": 0.6}),
        ("fsdp2", 2, {}),
        ("fsdp2", 3, {"center_optimizer": fa.CenterSGD(0.05)}),
    ],
)
def test_with_a_data_parallel_backbone_equals_one_process_on_the_joint_batch(kind, world_size, options):
    expected = train_backbone(kind, 20, options)
    for actual in distributed_helpers.run_ranks(world_size, train_backbone, kind, 20, options):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_sampled_step_waits_for_nothing_on_a_gpu(backend, momentum_dtype):
    """PyTorch's own watch; test_sampling.py has the same line watched on the CPU."""
    reason = backends.available()[backend]
    if reason is not None:
        pytest.skip(f"backend {backend!r} cannot run here: {reason}")
    recipe = fa.CenterSGD(lr=0.1, weight_decay=5e-4, momentum_dtype=momentum_dtype)
    head = fa.PartialFC(64, 5000, sample_rate=0.1, center_optimizer=recipe, backend=backend, device="cuda")
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    y = torch.randint(0, 5000, (32,), device="cuda")

    def step() -> torch.Tensor:
        loss = head(x, y)
        loss.backward()
        head.center_optimizer.step()
        return loss.detach()

    step()  # compiles the kernels and makes the optimizer's state
    before = head.weight.detach().clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    changed = (head.weight.detach() != before).any(1)
    assert loss.isfinite() and changed[y].all() and 0 < changed.sum() <= 500


def inspect_head(num_classes: int, rows: int) -> dict:
    head = fa.PartialFC(D, num_classes, dtype=torch.float64, seed=2)
    ((x, y),) = batches(num_classes, rows, torch.float64, 1)
    y[0], y[-1] = -100, num_classes - 1
    part = own_rows(head.ranks.world_size, head.ranks.rank, rows, 1)
    loss, stats = head(x[part], y[part], return_stats=True)
    rows = [*stats, head.logits(x[part]), *head.topk(x[part], 3)]
    before = head.full_weight()
    head.load_full_weight(before.flip(0))
    return {
        "loss": loss.detach(),
        "rows": rows,
        "restored": torch.equal(head.full_weight(), before.flip(0)),
        "place": (head.class_start, head.num_local, len(head.weight), head.sampled.tolist()),
    }


@pytest.mark.distributed
def test_statistics_logits_and_topk_over_all_shards():
    (expected,) = [inspect_head(10, 9)]
    ((x, y),) = batches(10, 9, torch.float64, 1)
    y[0], y[-1] = -100, 9
    head = fa.PartialFC(D, 10, dtype=torch.float64, seed=2)
    loss, stats = fa.reference.margin_softmax_loss(x, head.weight, y, return_stats=True)
    logits = 64 * F.normalize(x) @ F.normalize(head.weight).T
    counted = y != -100
    torch.testing.assert_close(expected["loss"], loss.detach())
    for actual, wanted in zip(
        expected["rows"], [*stats, logits.detach(), *(logits / 64).detach().topk(3)], strict=True
    ):
        keep = counted if actual.shape == y.shape else slice(None)
        torch.testing.assert_close(actual[keep], wanted[keep])
    results = distributed_helpers.run_ranks(4, inspect_head, 10, 9)
    for index, wanted in enumerate(expected["rows"]):
        torch.testing.assert_close(torch.cat([result["rows"][index] for result in results]), wanted)
    for result in results:
        torch.testing.assert_close(result["loss"], expected["loss"])
        assert result["restored"]
    assert [result["place"][:3] for result in results] == [(0, 3, 3), (3, 3, 3), (6, 2, 2), (8, 2, 2)]
    assert [c for result in results for c in result["place"][3]] == list(range(10))


def test_evaluation_does_not_update_the_centers_nor_do_frozen_ones():
    head = fa.PartialFC(D, 50, center_optimizer=fa.CenterSGD(0.1, weight_decay=0.1), sample_rate=0.5)
    ((x, y),) = batches(50, 6, torch.float32, 1)
    before = head.full_weight()
    for freeze in (lambda: head.eval(), lambda: head.train().requires_grad_(False)):
        freeze()
        x = x.detach().requires_grad_()
        head(x, y).backward()
        assert torch.equal(head.weight, before) and head.weight.grad is None
        assert x.grad.isfinite().all() and x.grad.any()
    head.requires_grad_(True)
    head(x, y).backward()
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("optimizer", [None, fa.CenterSGD(0.1)])
@pytest.mark.parametrize("rows", [0, 3])
def test_one_class(optimizer, rows):
    head = fa.PartialFC(D, 1, center_optimizer=optimizer, sample_rate=1e-9)
    x = torch.randn(rows, D, requires_grad=True)
    loss = head(x, torch.zeros(rows, dtype=torch.int64))
    loss.backward()
    assert not x.grad.any() and head.weight.isfinite().all()
    assert loss.item() == 0 if rows else loss.isnan()  # the mean of no rows, as cross_entropy has it


def test_pickled_heads_go_on_alike():
    head = fa.PartialFC(D, 50, center_optimizer=fa.CenterSGD(0.1), sample_rate=0.5)
    ((x, y),) = batches(50, 6, torch.float32, 1)
    head(x, y).backward()
    twin = pickle.loads(pickle.dumps(head))
    assert type(twin.weight) is type(head.weight)
    assert twin.center_optimizer.param_groups[0]["params"][0] is twin.weight
    for each in (head, twin):
        each(x, y).backward()
    assert torch.equal(head.weight, twin.weight) and torch.equal(head.sampled, twin.sampled)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
@pytest.mark.parametrize("optimizer", [None, fa.CenterSGD(1)])
def test_a_compiled_step_trains_alike(optimizer, sample_rate, whole):
    """The forward pass alone is compiled, or the whole step with its backward pass."""
    torch.compiler.reset()
    heads = [fa.PartialFC(D, 50, sample_rate=sample_rate, center_optimizer=optimizer) for _ in range(2)]
    layer = nn.Linear(D, D)

    def step(head: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = head(layer(x).tanh(), y) + 1
        if whole:
            loss.backward()
        return loss

    steps = [step, torch.compile(step, backend="aot_eager")]
    for x, y in batches(50, 6, torch.float32):
        results = []
        for head, run in zip(heads, steps, strict=True):
            loss = run(head, x, y)
            if not whole:
                loss.backward()
            if head.center_optimizer is None:
                with torch.no_grad():
                    head.weight -= head.weight.grad.to_dense()
                head.weight.grad = None
            results.append([loss.detach(), layer.weight.grad, head.weight.detach(), head.sampled])
            layer.zero_grad()
        torch.testing.assert_close(results[1], results[0])


def test_evaluation_uses_all_classes_and_counts_no_step():
    head = fa.PartialFC(D, 50, sample_rate=0.2)
    ((x, y),) = batches(50, 6, torch.float32, 1)
    head.eval()
    loss = head(x, y)
    assert head.step == 0 and len(head.sampled) == 50
    torch.testing.assert_close(loss, fa.reference.margin_softmax_loss(x, head.weight, y))


def test_copies_and_state():
    head = fa.PartialFC(D, 10, sample_rate=0.5)
    assert list(head.state_dict()) == ["weight", "step"]
    assert torch.equal(copy.deepcopy(head).weight, head.weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample_rate": 0}, ValueError, r"sample_rate must be in \(0, 1\]; got 0"),
        ({"sample_rate": "1"}, TypeError, "sample_rate must be a number"),
        ({"num_classes": 0}, ValueError, "num_classes must be >= 1"),
        ({"seed": -1}, ValueError, "seed must be >= 0"),
        ({"seed": 2**63}, ValueError, r"seed must be in \[0, 2\^63\)"),
        ({"dense_grad": 1}, TypeError, "dense_grad must be a bool; got int"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point one"),
        ({"group": "world"}, TypeError, "group must be a ProcessGroup, a DeviceMesh or None; got str"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fa.PartialFC(**{"embedding_dim": 4, "num_classes": 10, **options})


@pytest.mark.parametrize(
    ("options", "name"),
    [({"sample_rate": 0.5}, "sample_rate < 1"), ({"center_optimizer": fa.CenterSGD(lr=0.1)}, "CenterSGD")],
)
def test_a_cuda_graph_of_steps_that_differ_is_refused(
    options: dict[str, object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = fa.PartialFC(4, 10, **options)
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    monkeypatch.setattr(partial_fc, "_is_captured", lambda device: True)
    with pytest.raises(RuntimeError, match=f"^PartialFC with {name} cannot be captured in a CUDA graph"):
        head(x, y)
    assert head.step == 0
    head.eval()
    head(x, y)
    fa.PartialFC(4, 10)(x, y)
