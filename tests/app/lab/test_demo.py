"""The demo at tiny sizes, and what it is made of: nets, heads, steps, and the bounds that it holds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import fused_arcface as fa
from fused_arcface.app.cli import run
from fused_arcface.app.data import LabeledImages, identity_images
from fused_arcface.app.lab import agreement, demo
from fused_arcface.app.lab.agreement import Agreement
from fused_arcface.app.lab.batches import shuffled_batches
from fused_arcface.app.lab.heads import ReferenceHead, SoftmaxHead
from fused_arcface.app.lab.plans import QUICK_DEMO, Plan, Recipe
from fused_arcface.app.lab.training import one_cycle, training_steps
from fused_arcface.app.nets.small import SmallNet, embed


class Shown:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.names: list[str] = []

    def begin(self, what: str, steps: int = 0) -> None: ...

    def step(self, loss: float) -> None:
        self.losses.append(loss)

    def ended(self, name: str, first_loss: float, last_loss: float, steps: int, seconds: float) -> None:
        self.names.append(name)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """One run of the whole command: its folder and its numbers."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by" / "it"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(["demo", "--quick", "--output", str(folder)]) == 0
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    return folder, json.loads((folder / "numbers.json").read_text())


@pytest.mark.slow
def test_writes_pictures_and_numbers(quick: tuple[Path, dict]) -> None:
    folder, numbers = quick
    for name in ("loss_curves.png", "roc.png", "identities.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and (folder / name).stat().st_size > 10_000
    assert numbers["broken"] == [] and numbers["fused_arcface"] == fa.__version__
    assert list(numbers["problems"]) == ["identities", "digits"]  # the set where margins win comes first
    for found in numbers["problems"].values():
        assert all(error <= 1e-5 for error in found["agreement"]["same_embeddings_worst_relative"].values())
        assert found["agreement"]["curves_greatest_difference"] <= 1e-2
        criteria = [training["criterion"] for training in found["trainings"]]
        assert criteria == ["softmax", "NormSoftmax", "ArcFace", "ArcFace, reference"]
        for training in found["trainings"]:
            assert len(training["losses"]) == found["recipe"]["steps"] and all(map(math.isfinite, training["losses"]))
            assert 0 <= training["tar_at_far"]["0.01"] <= 1 and 0.3 < training["accuracy"] <= 1


@pytest.mark.slow
def test_time_and_memory_of_the_head_are_measured(quick: tuple[Path, dict]) -> None:
    _, numbers = quick
    assert len(numbers["head"]) == 3
    for cost in numbers["head"]:
        assert cost["problem"] is None
        assert all(ms > 0 for ms in cost["milliseconds"].values())
    large = numbers["head"][-1]
    logits = large["case"]["N"] * large["case"]["C"] * 4
    assert large["peak_bytes"]["reference"] > logits > 0


@pytest.fixture
def small_plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Identities alone, without the measurements of time and memory."""
    monkeypatch.setattr(demo, "head_costs", lambda cases, seconds: [])
    return Plan((QUICK_DEMO.tasks[0],), (3,))


@pytest.mark.slow
def test_is_the_same_to_the_bit_and_leaves_random_state_alone(small_plan: Plan) -> None:
    first, second, state = Shown(), Shown(), torch.get_rng_state()
    found = demo.run_demo(small_plan, first)
    torch.manual_seed(1)
    demo.run_demo(small_plan, second)
    assert first.losses == second.losses and len(first.losses) == 4 * small_plan.tasks[0].recipe.steps
    torch.manual_seed(0)
    assert torch.get_rng_state().equal(state)
    assert found.broken() == []
    criteria = ("softmax", "NormSoftmax", "ArcFace", "ArcFace, reference")
    assert first.names == [f"identities, {criterion}, seed 3" for criterion in criteria]


@pytest.mark.slow
def test_a_broken_bound_ends_the_command_with_an_error(
    small_plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(agreement, "STEP_BOUND", 1e-12)
    monkeypatch.setattr("fused_arcface.app.lab.plans.QUICK_DEMO", small_plan)
    assert run(["demo", "--quick", "--output", str(tmp_path)]) == 1
    assert "FAILED: identities: d_weight of fused and reference differ by" in capsys.readouterr().err
    assert json.loads((tmp_path / "numbers.json").read_text())["broken"]


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert run(["demo", "--output", str(tmp_path / "taken")]) == 2
    shown = capsys.readouterr().err.replace("│", " ")  # rich breaks the line anywhere, by the path's length
    assert "cannotbewrittento:Notadirectory" in "".join(shown.split())


class WrongHead(fa.MarginHead):
    """Its loss is a little too large."""

    def forward(self, embeddings: Tensor, target: Tensor, **options: object) -> Tensor:
        return super().forward(embeddings, target) * 1.001


@pytest.mark.parametrize(("kind", "right"), [(fa.MarginHead, True), (WrongHead, False)])
def test_step_agreement_tells_right_from_wrong(kind: type[fa.MarginHead], right: bool) -> None:
    check, head = Agreement(), kind(16, 40, scale=16.0)
    check(head, torch.randn(8, 16), torch.randint(40, (8,)))
    assert (check.broken() == []) is right
    assert check.worst()["loss"] == pytest.approx(0 if right else 1e-3, abs=1e-6)
    assert head.weight.grad is None


def test_a_nan_breaks_the_bounds() -> None:
    check, head = Agreement(), fa.MarginHead(16, 40)
    check(head, torch.full((2, 16), torch.nan), torch.tensor([0, 1]))
    check(head, torch.randn(8, 16), torch.randint(40, (8,)))
    assert len(check.broken()) == 3
    check.compare_curves([1.0, math.nan], [1.0, 2.0])
    assert len(check.broken()) == 4
    check.compare_curves([1.0] * 50 + [9.0], [1.25] * 50 + [1.0])
    assert check.curve_difference == 0.25  # the first steps alone
    assert check.broken()[3:] == ["the losses of the two trainings differ by 2.5e-01 in 50 steps, 1e-02 allowed"]
    check.compare_curves([1.0], [1.0078125])
    assert len(check.broken()) == 3


def test_reference_head_is_the_fused_one() -> None:
    fused = fa.MarginHead(16, 40, margin=fa.CosFace(), scale=16.0)
    expected = ReferenceHead(16, 40, margin=fa.CosFace(), scale=16.0)
    expected.load_state_dict(fused.state_dict())
    x, y = torch.randn(8, 16), torch.tensor([0, 1, 2, -100, 4, 5, 6, 39])
    torch.testing.assert_close(fused(x, y), expected(x, y))
    assert expected(x, y, return_stats=True)[1].loss.shape == (8,)


def test_softmax_head_is_cross_entropy() -> None:
    head = SoftmaxHead(16, 40)
    x, y = torch.randn(8, 16), torch.randint(40, (8,))
    torch.testing.assert_close(head(x, y), torch.nn.functional.cross_entropy(head.linear(x), y))


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 32, 32), (3, 112, 96), (1, 1, 1)])
def test_small_net_takes_images_of_any_size(channels: int, height: int, width: int) -> None:
    net = SmallNet(24, channels=channels, width=4)
    images = torch.rand(3, channels, height, width)
    assert net(images).shape == (3, 24)
    embeddings = embed(net, images, batch_size=2)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    assert net.training and not embeddings.requires_grad


def test_steps_are_plain_training() -> None:
    """Cutting the graph at the embeddings changes no gradient: parameters end where one backward pass takes them."""
    data, recipe = identity_images(4, 5), Recipe(steps=3, batch_size=8, learning_rate=0.01)

    def make() -> tuple[SmallNet, fa.MarginHead, list[torch.nn.Parameter]]:
        torch.manual_seed(5)
        net, head = SmallNet(16, width=4), fa.MarginHead(16, 4, scale=16.0)
        return net, head, [*net.parameters(), *head.parameters()]

    net, head, parameters = make()
    seen: list[torch.Size] = []
    batches = shuffled_batches(data, 8, 3, seed=0)
    steps = list(training_steps(net, head, recipe, batches, lambda head, x, y: seen.append(x.shape)))
    plain_net, plain_head, plain_parameters = make()
    optimizer, scheduler = one_cycle(plain_parameters, recipe)
    for step, (images, target) in zip(steps, shuffled_batches(data, 8, 3, seed=0), strict=True):
        loss = plain_head(plain_net(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        assert step.loss == loss.item() and step.head_seconds > 0
    assert all(a.equal(b) for a, b in zip(parameters, plain_parameters, strict=True))
    assert seen == [(8, 16)] * 3


def test_batches_are_full_and_go_through_all_images() -> None:
    data = LabeledImages(torch.zeros(10, 1, 2, 2), torch.arange(10))
    batches = [batch.labels.tolist() for batch in shuffled_batches(data, 4, 5, seed=0)]
    assert all(len(set(batch)) == 4 for batch in batches) and len(batches) == 5
    assert not set(batches[0]) & set(batches[1])
    assert batches == [batch.labels.tolist() for batch in shuffled_batches(data, 4, 5, seed=0)]
    assert batches != [batch.labels.tolist() for batch in shuffled_batches(data, 4, 5, seed=1)]
    with pytest.raises(ValueError, match="batch_size must be <= the number of images 10; got 11"):
        next(shuffled_batches(data, 11, 1, seed=0))
