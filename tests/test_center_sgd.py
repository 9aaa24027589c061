import copy
import gc

import pytest
import torch
from support import distributed_helpers
from torch.utils.checkpoint import checkpoint

import fused_arcface as fa
from fused_arcface.base import keyed_random

D = 70  # more than one block of an int8 momentum, and not a multiple of one
BACKENDS = ["torch", "auto"]


def batch(step: int, num_classes: int, rows: int = 12, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, torch.randint(0, num_classes, (rows,), generator=generator)


def head_of(num_classes: int = 300, **options) -> fa.PartialFC:
    recipe = fa.CenterSGD(**{"lr": 0.1, "weight_decay": 5e-4, **options.pop("recipe", {})})
    return fa.PartialFC(D, num_classes, center_optimizer=recipe, scale=16, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_torch_sgd_step_by_step(backend, momentum, dtype, tolerance):
    head = head_of(dtype=dtype, backend=backend, recipe={"momentum": momentum})
    weight = head.weight.detach().clone().requires_grad_()
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=momentum, weight_decay=5e-4)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 3, 0.5) for each in (sgd, head.center_optimizer)]
    for step in range(8):
        x, y = batch(step, 300, dtype=dtype)
        head(x, y).backward()
        d_x, x.grad = x.grad, None
        assert head.weight.grad is None
        sgd.zero_grad()
        fa.margin_softmax_loss(x, weight, y, scale=16, backend=backend).backward()
        torch.testing.assert_close(d_x, x.grad, rtol=1e-4, atol=tolerance * 100)
        for optimizer in (sgd, head.center_optimizer):
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        torch.testing.assert_close(head.weight, weight, rtol=0, atol=tolerance * float(weight.detach().abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampled_equals_row_sparse_sgd(backend):
    """A plain PyTorch SGD on the sampled rows; the others keep center and momentum to the bit."""
    head = head_of(1000, sample_rate=0.1, backend=backend, dtype=torch.float64)
    weight, momentum = head.weight.detach().clone(), torch.zeros(1000, D, dtype=torch.float64)
    for step in range(6):
        x, y = batch(step, 1000, dtype=torch.float64)
        head(x, y).backward()
        rows = head.sampled
        centers = weight[rows].requires_grad_()
        fa.reference.margin_softmax_loss(x, centers, torch.searchsorted(rows, y), scale=16).backward()
        momentum[rows] = 0.9 * momentum[rows] + centers.grad + 5e-4 * centers.detach()
        before = weight.clone()
        weight[rows] -= 0.1 * momentum[rows]
        torch.testing.assert_close(head.weight.detach(), weight, rtol=1e-12, atol=1e-12)
        others = torch.ones(1000, dtype=torch.bool).index_fill_(0, rows, False)
        assert torch.equal(weight[others], before[others])
        weight = head.weight.detach().clone()
        momentum = head.center_optimizer.state[head.weight]["momentum_buffer"].clone()


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_reference_in_every_storage(dtype, momentum_dtype, sample_rate):
    """The same random bits, so the results differ only where rounding of sums falls on another side of a threshold."""
    if fa.backends.available()["cpu"] is not None:
        pytest.skip(fa.backends.available()["cpu"])
    options = {"dtype": dtype, "sample_rate": sample_rate, "recipe": {"momentum_dtype": momentum_dtype}}
    one, other = (head_of(backend=backend, **options) for backend in ("torch", "cpu"))
    for step in range(4):
        x, y = batch(step, 300)
        states = [head.center_optimizer.state[head.weight] for head in (one, other)]
        for name in states[0]:
            states[1][name].copy_(states[0][name])
        other.load_full_weight(one.full_weight())
        for head in (one, other):
            head(x, y).backward()
        if momentum_dtype == torch.int8:
            torch.testing.assert_close(states[1]["momentum_scale"], states[0]["momentum_scale"], rtol=1e-4, atol=1e-9)
        buffers = [state["momentum_buffer"].double() for state in states]
        differ = (buffers[0] - buffers[1]).abs() > 1e-4 * buffers[0].abs() + 1e-6
        assert differ.double().mean() < (0 if momentum_dtype == torch.float32 else 0.01) + 1e-9
        quantum = 1 if momentum_dtype == torch.int8 else 2**-7 * float(buffers[0].abs().max())
        assert float((buffers[0] - buffers[1]).abs().max()) <= quantum
        differ = (one.weight - other.weight).abs() > 1e-5 * one.weight.abs() + 1e-6
        assert differ.double().mean() < (0 if dtype == torch.float32 else 0.01) + 1e-9


def train(steps: int, options: dict) -> tuple[list[float], torch.Tensor]:
    head = head_of(**options)
    world_size, rank = head.ranks.world_size, head.ranks.rank
    losses = []
    for step in range(steps):
        x, y = batch(step, 300, dtype=torch.float64)
        part = slice(len(y) * rank // world_size, len(y) * (rank + 1) // world_size)
        loss = head(x[part], y[part])
        loss.backward()
        losses.append(loss.item())
    return losses, head.full_weight()


@pytest.mark.distributed
@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.full), "auto"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
def test_any_number_of_ranks_trains_alike(backend, sample_rate):
    options = {"dtype": torch.float64, "backend": backend, "sample_rate": sample_rate}
    expected_losses, expected = train(10, options)
    for world_size in (2, 3) if backend == "auto" else (4,):
        for losses, weight in distributed_helpers.run_ranks(world_size, train, 10, options):
            assert losses == pytest.approx(expected_losses, abs=1e-10)
            torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_of_the_centers_is_unbiased(backend):
    """300 × 70 elements in each of 40 steps, from the same bf16 centers to the same fp32 result: the mean error of all
    has to lie within 5 standard errors (a false alarm in 2e6), each step's own in the worst of 40 (1e-5)."""
    from scipy import stats  # not above: ranks import this file, and scipy takes longer than they do

    exact = head_of(dtype=torch.float32, backend=backend, recipe={"lr": 0.01})
    start = exact.full_weight().bfloat16()
    exact.load_full_weight(start.float())
    x, y = batch(0, 300)
    exact(x, y).backward()
    head = head_of(dtype=torch.bfloat16, backend=backend, recipe={"lr": 0.01})
    errors = []
    for _ in range(40):
        head.load_full_weight(start)
        head.center_optimizer.state[head.weight]["momentum_buffer"].zero_()
        head(x, y).backward()
        spacing = 2.0 ** (torch.frexp(exact.weight.detach()).exponent - 8)  # of bf16 numbers around the result
        errors.append(((head.weight.float() - exact.weight) / spacing).detach().double())
    errors = torch.stack(errors)
    assert float(errors.abs().max()) <= 1.01
    assert float(errors.std()) > 0.1
    assert abs(float(errors.mean())) < 5 * float(errors.std()) / errors.numel() ** 0.5
    assert stats.ttest_1samp(errors.mean((1, 2)).numpy(), 0).pvalue > 1e-5
    # Rounding bits of different steps are independent: an element's mean error over the steps shrinks as it should.
    assert float(errors.mean(0).std()) < 1.2 * float(errors.std()) / 40**0.5 + 0.02


def test_rounding_bits_are_uniform():
    from scipy import stats

    bits = keyed_random.rounding_bits(keyed_random.rounding_key(1, 2), torch.arange(500), 64)
    for part in (bits & 0xFFFF, bits >> 16):
        assert stats.kstest(part.flatten().double().numpy() / 65536, "uniform").pvalue > 1e-6
    assert len(bits.unique()) > 0.99 * bits.numel()


def test_int8_momentum_stays_near_fp32():
    heads = [head_of(dtype=torch.float32, recipe={"momentum_dtype": dtype}) for dtype in (torch.float32, torch.int8)]
    moved = heads[0].full_weight()
    for step in range(10):
        x, y = batch(step, 300)
        for head in heads:
            head(x, y).backward()
    moved = float((heads[0].full_weight() - moved).norm())
    assert float((heads[0].full_weight() - heads[1].full_weight()).norm()) < 0.05 * moved


def test_two_outstanding_forwards():
    head = head_of()
    (x, y), before = batch(0, 300), head.full_weight()
    losses = [head(x, y), head(x, y)]
    with pytest.raises(fa.CenterUpdateError, match="1 other forward"):
        losses[1].backward()
    with pytest.raises(fa.CenterUpdateError, match="1 other forward"):
        sum(losses).backward()
    assert torch.equal(head.full_weight(), before)
    losses = losses[:1]
    gc.collect()
    with torch.no_grad():
        head(x, y)  # evaluation is none
    losses[0].backward()
    assert not torch.equal(head.full_weight(), before)


def test_second_backward_accumulation_and_weighted_loss():
    head = head_of()
    x, y = batch(0, 300)
    loss = head(x, y)
    loss.backward(retain_graph=True)
    after = head.full_weight()
    with pytest.raises(fa.CenterUpdateError, match="second backward pass through the same loss"):
        loss.backward()
    with pytest.raises(fa.CenterUpdateError, match=r"multiplied by 0\.5"):
        (head(x, y) / 2).backward()
    assert torch.equal(head.full_weight(), after)
    head.center_optimizer.step()
    for _ in range(2):
        head(x, y).backward()
    with pytest.raises(fa.CenterUpdateError, match="2 backward passes before step"):
        head.center_optimizer.step()
    head(x, y).backward()
    head.center_optimizer.step()


def test_clipping_the_norm_of_a_gradient_that_does_not_exist():
    head = head_of()
    x, y = batch(0, 300)
    head(x, y).backward()
    for clip in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_):
        with pytest.raises(fa.CenterUpdateError, match="clip"):
            clip(head.parameters(), 1.0)
    head.zero_grad()
    assert head.weight.grad is None
    assert isinstance(head.weight, torch.nn.Parameter)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler_is_divided_out(backend):
    heads = [head_of(backend=backend) for _ in range(2)]
    x, y = batch(0, 300)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    heads[0](x, y).backward()
    scaler.scale(heads[1](x, y)).backward()
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-6, atol=1e-8)
    before = heads[1].full_weight()
    (heads[1](x, y) * torch.inf).backward()
    assert torch.equal(heads[1].full_weight(), before)


def poisoned(kind: str, options: dict) -> tuple[list[bool], float]:
    """Whether everything is as before, to the bit, after a step that has nothing finite to offer."""
    head = head_of(20, recipe={"weight_decay": 0.1}, **options)
    x, y = batch(0, 20)
    head(x, y).backward()
    kept = {"weight": head.weight, **head.center_optimizer.state[head.weight]}
    before = {name: tensor.detach().clone() for name, tensor in kept.items()}
    with torch.no_grad():
        if kind == "nan" and head.ranks.rank == head.ranks.world_size - 1:
            x[3, 2] = torch.nan
    if kind == "ignored":
        y = torch.full_like(y, -100)
    if kind == "empty":
        x, y = x[:0], y[:0]
    loss = head(x, y)
    loss.backward()
    unchanged = [torch.equal(kept[name], tensor) for name, tensor in before.items()]
    head(*batch(1, 20)).backward()  # and the next step is a step again
    return [*unchanged, not torch.equal(head.weight, before["weight"])], loss.item()


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.5}, {"dtype": torch.bfloat16}], ids=str)
def test_nan_on_one_rank_skips_the_update_on_all(options):
    for kept, loss in distributed_helpers.run_ranks(2, poisoned, "nan", options):
        assert all(kept) and loss != loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["nan", "ignored", "empty"])
def test_a_loss_that_is_not_finite_skips_the_update(kind, backend):
    kept, loss = poisoned(kind, {"backend": backend})
    assert all(kept) and loss != loss


def test_centers_in_half_precision_are_refused_after_construction_too():
    head = head_of().half()
    x, y = batch(0, 300)
    with pytest.raises(TypeError, match=r"CenterSGD needs class centers of dtype .*; got torch.float16"):
        head(x.half(), y)
    before = head.double().full_weight()
    head(x.double(), y).backward()
    assert not torch.equal(head.weight, before)


def test_optimizer_state_and_copies():
    head = head_of(recipe={"momentum_dtype": torch.int8})
    x, y = batch(0, 300)
    head(x, y).backward()
    twin = copy.deepcopy(head)
    assert twin.center_optimizer.param_groups[0]["params"][0] is twin.weight
    state = copy.deepcopy(head.center_optimizer.state_dict())
    other = head_of(recipe={"momentum_dtype": torch.int8, "lr": 7})
    other.load_state_dict(head.state_dict())
    other.center_optimizer.param_groups[0]["lr"] = 7
    other.center_optimizer.load_state_dict(state)
    assert other.center_optimizer.param_groups[0]["lr"] == 0.1
    assert other.center_optimizer.state[other.weight]["momentum_buffer"].dtype == torch.int8
    for each in (head, twin, other):
        each(x, y).backward()
        assert torch.equal(each.weight, head.weight)
    earlier = {**state, "state": {0: dict(head.center_optimizer.state[head.weight])}}  # had the momentum as well
    with pytest.raises(ValueError, match="momentum_buffer must be"):
        head_of(200).center_optimizer.load_state_dict(earlier)


def test_frozen_backbone_and_plain_loop():
    head = head_of()
    x, y = batch(0, 300)
    first = head(x.detach(), y)
    first.backward()
    assert head(x.detach(), y) < first


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1}, ValueError, r"lr must be in \[0, inf\); got -1"),
        ({"lr": 0.1, "momentum": 1.0}, ValueError, r"momentum must be in \[0, 1.0\)"),
        ({"lr": "fast"}, TypeError, "lr must be a number; got str"),
        ({"lr": torch.ones(2)}, TypeError, "lr must be a number; got Tensor$"),
        ({"lr": 0.1, "momentum_dtype": torch.int32}, TypeError, "momentum_dtype must be one of"),
    ],
)
def test_bad_recipes(options, error, message):
    with pytest.raises(error, match=message):
        fa.CenterSGD(**options)


def test_bad_heads():
    with pytest.raises(TypeError, match="center_optimizer must be a recipe such as CenterSGD, or None; got SGD"):
        fa.PartialFC(4, 10, center_optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    with pytest.raises(TypeError, match=r"CenterSGD needs class centers of dtype .*; got torch.float16"):
        fa.PartialFC(4, 10, center_optimizer=fa.CenterSGD(0.1), dtype=torch.float16)


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_saved_tensors_that_are_copies(sample_rate):
    """Hooks that offload what is saved give copies back; the head's centers are to be updated all the same."""
    heads = [fa.PartialFC(4, 20, sample_rate=sample_rate, center_optimizer=fa.CenterSGD(0.1)) for _ in range(2)]
    x, y = torch.randn(6, 4), torch.randint(0, 20, (6,))
    for _ in range(2):
        heads[0](x.requires_grad_(), y).backward()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
            heads[1](x.requires_grad_(), y).backward()
    assert torch.equal(heads[0].weight, heads[1].weight)


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.int8])
def test_a_head_built_without_memory(momentum_dtype):
    recipe = fa.CenterSGD(0.1, momentum_dtype=momentum_dtype)
    usual, late = (
        fa.PartialFC(4, 20, center_optimizer=recipe),
        fa.PartialFC(4, 20, center_optimizer=recipe, device="meta"),
    )
    late.to_empty(device="cpu").reset_parameters()
    x, y = torch.randn(6, 4), torch.randint(0, 20, (6,))
    for head in (usual, late) * 2:
        head(x.clone().requires_grad_(), y).backward()
    assert torch.equal(usual.weight, late.weight)


def test_the_momentum_stays_with_weights_that_are_assigned(tmp_path):
    head = fa.PartialFC(4, 20, center_optimizer=fa.CenterSGD(0.1))
    x, y = torch.randn(6, 4), torch.randint(0, 20, (6,))
    head(x.requires_grad_(), y).backward()
    head.load_state_dict({name: tensor.clone() for name, tensor in head.state_dict().items()}, assign=True)
    fa.checkpoint.save(tmp_path, head)
    loaded = fa.PartialFC(4, 20, center_optimizer=fa.CenterSGD(0.1))
    fa.checkpoint.load(tmp_path, loaded)
    for each in (head, loaded):
        each(x, y).backward()
    assert torch.equal(head.weight, loaded.weight)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("optimizer", [None, fa.CenterSGD(0.1)])
def test_a_recomputed_step_is_refused(optimizer, use_reentrant):
    head = fa.PartialFC(4, 20, sample_rate=0.5, center_optimizer=optimizer)
    before, x = head.weight.detach().clone(), torch.randn(6, 4, requires_grad=True)
    loss = checkpoint(head, x, torch.arange(6), use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=r"outside of torch\.utils\.checkpoint"):
        loss.backward()
    assert torch.equal(head.weight, before) and head.weight.grad is None


def test_an_optimizer_says_what_it_needs_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_arcface.center_sgd.SGDOfCenters.needs", lambda _: {"padding": "that step"})
    head = head_of(backend="cpu")
    with pytest.raises(ValueError, match=r"^backend 'cpu' does not have that step: "):
        head(*batch(0, 300))
    head.eval()(*batch(0, 300))  # no step, so nothing is needed
    with pytest.raises(TypeError, match=r"^center_optimizer must be a recipe such as CenterSGD, or None; got dict$"):
        fa.PartialFC(D, 300, center_optimizer={"lr": 0.1})
