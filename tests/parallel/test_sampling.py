import contextlib

import pytest
import torch
from conftest import NoWaiting
from scipy import stats

import fused_arcface as fa
from fused_arcface import partial_fc
from fused_arcface.base import keyed_random
from fused_arcface.base.permutation import Permutation
from fused_arcface.center_update import PendingUpdate
from fused_arcface.engine import ops as ops_module
from fused_arcface.parallel.sampling import Sampler
from fused_arcface.parallel.sharding import Sharding


def sample(world_size: int, num_classes: int, rate: float, step: int, target: torch.Tensor, seed: int = 0) -> list:
    shards = [Sharding(num_classes, world_size, rank) for rank in range(world_size)]
    return [shard.class_start + Sampler(shard, rate, seed)(step, target) for shard in shards]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 16, 100, 1000, 99_991])
def test_permutation_is_one(size):
    image = Permutation(size, keyed_random.fold(1, size), torch.device("cpu"))(torch.arange(size))
    assert torch.equal(image.sort().values, torch.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 16, 100, 1000, 99_991])
def test_the_inverse_finds_the_ids_of_all_images(size):
    order = Permutation(size, keyed_random.fold(1, size), torch.device("cpu"))
    assert torch.equal(order.inverse(order(torch.arange(size))), torch.arange(size))
    assert torch.equal(order(order.inverse(torch.arange(size))), torch.arange(size))


@pytest.mark.parametrize(("num_classes", "rate", "rows"), [(1000, 0.1, 30), (37, 0.5, 60), (50_000, 0.001, 9)])
def test_classes_are_those_that_a_rank_of_every_class_gives(num_classes, rate, rows):
    """By the definition: the batch's classes, then the others in the order of their images until there are enough."""
    for step in (1, 2, 3):
        target = torch.randint(-2, num_classes, (rows,))
        order = Permutation(num_classes, keyed_random.fold(6, keyed_random.SAMPLE, step), torch.device("cpu"))
        used = set(target[target >= 0].tolist())
        for each in order(torch.arange(num_classes)).argsort().tolist():
            if len(used) >= max(1, round(rate * num_classes)):
                break
            used.add(each)
        assert sample(1, num_classes, rate, step, target, seed=6)[0].tolist() == sorted(used)


def test_a_sample_of_very_many_classes_costs_the_sample_alone():
    """A hundred billion classes: a byte for each would be 100 GB."""
    num_classes = 10**11
    target = torch.tensor([num_classes - 1, 5, 5, -1])
    parts = sample(3, num_classes, 1e-8, 1, target)
    drawn = torch.cat(parts)
    assert len(drawn) == 1000 and {5, num_classes - 1} <= set(drawn.tolist())
    assert torch.equal(drawn, sample(1, num_classes, 1e-8, 1, target)[0])
    sampler = Sampler(Sharding(num_classes, 3, 1), 1e-8, 0)
    candidates = sampler.candidates(1, torch.device("cpu")) + sampler.sharding.class_start
    assert set(parts[1].tolist()) <= set(candidates.tolist()) | {5}


@pytest.mark.parametrize(("num_classes", "rate"), [(1000, 0.1), (37, 0.5), (5, 0.01), (10_000, 0.999)])
def test_the_same_classes_on_any_number_of_ranks_and_exactly_as_many_as_asked(num_classes, rate):
    target = torch.tensor([num_classes - 1, 0, 0, -1])
    for step in (1, 2):
        expected = sample(1, num_classes, rate, step, target)[0]
        assert len(expected) == max(2 if num_classes > 1 else 1, round(rate * num_classes))
        assert set(expected.tolist()) >= {0, num_classes - 1}
        for world_size in (2, 3, 8):
            assert torch.equal(torch.cat(sample(world_size, num_classes, rate, step, target)), expected)


def test_more_classes_in_the_batch_than_asked_for():
    target = torch.arange(50).repeat(2)
    assert torch.equal(sample(1, 100, 0.1, 1, target)[0], torch.arange(50))


def test_steps_and_seeds_differ():
    none = torch.empty(0, dtype=torch.int64)
    draws = [sample(1, 1000, 0.1, step, none, seed)[0] for step in (1, 2) for seed in (0, 1)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [20, 1000])
def test_negatives_are_drawn_evenly_and_independently(num_classes):
    """Chi-squared tests at a confidence of 1e-6: each class as often, and neighbors (ids 1 and √C apart) as often
    together.
    """
    none, steps, rate = torch.empty(0, dtype=torch.int64), 1500, 0.3
    used = torch.zeros(steps, num_classes, dtype=torch.bool)
    for step in range(steps):
        used[step, sample(1, num_classes, rate, step, none)[0]] = True
    count = round(rate * num_classes)
    # The counts of one step sum to a constant, so their covariance has one eigenvalue less: C - 1 degrees of freedom.
    variance = steps * rate * (1 - rate) * num_classes / (num_classes - 1)
    statistic = float(((used.sum(0) - steps * rate) ** 2).sum()) / variance
    assert stats.chi2(num_classes - 1).sf(statistic) > 1e-6
    together = count * (count - 1) / num_classes / (num_classes - 1)
    for distance in (1, Permutation(num_classes, 0, torch.device("cpu")).b):
        pairs = int((used & used.roll(distance, 1)).sum())
        expected = steps * num_classes * together
        assert abs(pairs - expected) < 5 * (expected * (1 - together)) ** 0.5


@pytest.mark.parametrize(("num_classes", "rate", "rows"), [(1000, 0.1, 30), (37, 0.5, 60), (5, 0.01, 9), (9, 0.3, 0)])
def test_padded_sample_is_the_same_one(num_classes, rate, rows):
    for step in range(20):
        target = torch.randint(-2, num_classes, (rows,))
        for world_size in (1, 3, 8):
            for rank in range(world_size):
                sampler = Sampler(Sharding(num_classes, world_size, rank), rate, seed=2)
                exact, padded = sampler(step, target), sampler(step, target, padded=True)
                assert torch.equal(padded[: len(exact)], exact)
                assert (padded[len(exact) :] == sampler.sharding.num_local).all()
                assert len(padded) <= min(sampler.sharding.num_local, max(sampler.count, rows))


def test_room_of_one_shard_is_that_of_its_share():
    """Not that of the whole sample: 8 shards of a million classes have room for an eighth each, and for the batch."""
    sampler = Sampler(Sharding(1_000_000, 8, 3), 0.1, seed=0)
    batch = torch.arange(sampler.sharding.class_start, sampler.sharding.class_start + 500)
    exact, padded = sampler(1, batch), sampler(1, batch, padded=True)
    assert len(exact) < len(padded) < 12_500 + 500 + 1200 and torch.equal(padded[: len(exact)], exact)


def test_the_mode_sees_what_waits():
    tensor = torch.tensor([1.0, 0.0])
    for waits in (lambda: tensor[0].item(), lambda: tensor[tensor > 0], lambda: bool(tensor[0] > 0), tensor.nonzero):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            waits()


@pytest.mark.parametrize(("momentum_dtype", "scale"), [(torch.float32, 64.0), (torch.int8, 1000.0)])
def test_a_sampled_step_waits_for_nothing_on_a_gpu(momentum_dtype, scale, monkeypatch):
    """The line as it runs on a GPU, on the CPU with the reference's stages: the same step, to the bit, as the usual one
    there, and no value is read.
    """
    monkeypatch.setattr(ops_module, "check_target_range", lambda *_: None)  # the CPU's check alone
    monkeypatch.setattr(PendingUpdate, "start", lambda self, gradient: setattr(self, "_loss_gradient", gradient))
    recipe = fa.CenterSGD(lr=0.1, weight_decay=1e-3, momentum_dtype=momentum_dtype)
    options = {"sample_rate": 0.1, "scale": scale, "center_optimizer": recipe, "backend": "torch", "seed": 4}
    usual, padded = (fa.PartialFC(16, 300, **options) for _ in range(2))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        rows = (40, 8, 1, 0)[step]  # more classes than the sample's 30 in the first
        x = torch.randn(rows, 16, generator=generator)
        y = torch.randint(0, 300, (rows,), generator=generator)
        results = []
        for head in (usual, padded):
            monkeypatch.setattr(partial_fc, "_is_waited_for", lambda _, head=head: head is padded)
            mine = x.clone().requires_grad_()
            with NoWaiting() if head is padded else contextlib.nullcontext():
                loss, stats = head(mine, y, return_stats=True)
                loss.backward()
            state = head.center_optimizer.state[head.weight]
            results.append([loss, *stats, mine.grad, head.sampled, head.weight.clone(), *state.values()])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("optimizer", ["sgd", "sparse_adam", "dense"])
def test_rows_outside_the_sample_are_untouched(optimizer):
    head = fa.PartialFC(16, 200, scale=4, sample_rate=0.1, seed=3, dense_grad=optimizer == "dense")
    step = {
        "sgd": lambda: torch.optim.SGD([head.weight], lr=0.1, momentum=0.9),
        "sparse_adam": lambda: torch.optim.SparseAdam([head.weight], lr=0.1),
        "dense": lambda: torch.optim.SGD([head.weight], lr=0.1),
    }[optimizer]()
    for _ in range(3 if optimizer != "sgd" else 1):  # momentum itself moves rows of earlier steps
        before = head.weight.detach().clone()
        step.zero_grad()
        head(torch.randn(8, 16), torch.randint(0, 200, (8,))).backward()
        assert head.weight.grad.is_sparse == (optimizer != "dense")
        step.step()
        changed = (head.weight != before).any(1).nonzero().squeeze(1)
        assert torch.equal(changed, head.sampled) and len(changed) == 20


def test_sampled_gradient_is_that_of_the_sampled_classes_alone():
    head = fa.PartialFC(8, 60, sample_rate=0.25, dtype=torch.float64, seed=1)
    x = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 60, (10,))
    head(x, y).backward()
    gradient, d_x, used = head.weight.grad.to_dense(), x.grad, head.sampled
    x.grad = None
    centers = head.weight.detach()[used].requires_grad_()
    fa.reference.margin_softmax_loss(x, centers, torch.searchsorted(used, y)).backward()
    torch.testing.assert_close(gradient[used], centers.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d_x, x.grad, rtol=1e-10, atol=1e-10)
    gradient[used] = 0
    assert not gradient.any()


def test_centers_are_normal_and_a_function_of_seed_and_class_alone():
    rows = torch.empty(2000, 65)
    keyed_random.fill_normal(rows, seed=4, first_id=0, std=0.01)
    assert stats.kstest(rows.flatten().double().numpy() / 0.01, "norm").pvalue > 1e-6
    assert abs(float((rows[:, 1:] * rows[:, :-1]).mean())) < 5 * 1e-4 / (2000 * 64) ** 0.5
    assert abs(float((rows[1:] * rows[:-1]).mean())) < 5 * 1e-4 / (1999 * 65) ** 0.5
    part = torch.empty(7, 65)
    keyed_random.fill_normal(part, seed=4, first_id=1500, std=0.01)
    assert torch.equal(part, rows[1500:1507])
    other = torch.empty(7, 65)
    keyed_random.fill_normal(other, seed=5, first_id=1500, std=0.01)
    assert not (other == part).all(1).any()
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(fa.PartialFC(8, 20, dtype=dtype).weight, fa.PartialFC(8, 20).weight.to(dtype))


def test_words_of_tensors_and_of_integers_agree():
    key = keyed_random.fold(7, 1, 2**63)
    words = keyed_random.fold_each(key, torch.arange(100)).tolist()
    assert [word % 2**64 for word in words] == [keyed_random.fold(key, number) for number in range(100)]


@pytest.mark.parametrize(("num_classes", "world_size"), [(10, 4), (2, 3), (7, 7), (1000, 8)])
def test_shards_cover_the_classes_in_order(num_classes, world_size):
    shards = [Sharding(num_classes, world_size, rank) for rank in range(world_size)]
    ids = [shard.class_start + row for shard in shards for row in range(shard.num_local)]
    assert ids == list(range(num_classes))
    assert shards[0].counts() == [shard.num_local for shard in shards]
    assert [shard.localize(torch.tensor([-1, num_classes - 1])).tolist() for shard in shards if shard.num_local] == [
        [-1, shard.num_local - 1 if shard.class_start + shard.num_local == num_classes else -1]
        for shard in shards
        if shard.num_local
    ]
