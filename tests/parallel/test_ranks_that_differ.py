"""One rank of two differs, in each option and each mode: both get the right result, or both the same named error.

All cases run in one pair of processes. None may wait until the timeout of their group ends it.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import distributed_helpers

import fused_arcface as fa
from fused_arcface.compat import insightface

pytestmark = pytest.mark.distributed

D, CLASSES = 4, 11
LIMIT = 60  # seconds: the watch over the collectives takes some three, also on a busy machine
Record = Callable[[str, Callable[[], Any]], None]
# Of the same range, so that their reprs differ in the digest alone.
CLASS_MARGINS = [fa.ClassMargin([0.1, middle, *[0.4] * (CLASSES - 2)]) for middle in (0.2, 0.3)]


def rows(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(3, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (3,), generator=generator)


class Rank:
    """One rank of the pair: makes heads, and knows whether it is the one that differs."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank = group, dist.get_rank()
        self.differs = self.rank == 1

    def head(self, **options: Any) -> fa.PartialFC:
        return fa.PartialFC(D, CLASSES, dtype=torch.float64, group=self.group, **options)

    def step(self, head: fa.PartialFC, x: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
        """Forward and backward pass; the gradient by this rank's embeddings."""
        own, y = rows(self.rank)
        x = own.requires_grad_() if x is None else x
        result = head(x, y, **arguments)
        (result[0] if isinstance(result, tuple) else result).backward()
        return x.grad


def learned_scale() -> dict[str, Any]:
    return {"scale": torch.nn.Parameter(torch.tensor(8.0))}


# Each changes rank 1's head, or what it is called with, after a first step that was alike.
CHANGED_HEADS: dict[str, tuple[Callable[[fa.PartialFC], Any], str]] = {
    "scale": (lambda head: setattr(head, "scale", 30.0), "scale"),
    "margin": (lambda head: setattr(head, "margin", fa.CosFace()), "margin"),
    "class margins": (lambda head: setattr(head, "margin", CLASS_MARGINS[1]), "margin"),
    "sample_rate": (lambda head: setattr(head, "sample_rate", 0.5), "sample_rate"),
    "seed": (lambda head: setattr(head, "seed", 7), "seed"),
    "step": (lambda head: setattr(head, "step", 7), "step"),
    "backend": (lambda head: setattr(head, "backend", "torch"), "backend"),
    "label_smoothing": (lambda head: setattr(head, "label_smoothing", 0.1), "label_smoothing"),
    "dense_grad": (lambda head: setattr(head, "dense_grad", True), "dense_grad"),
    "eval": (lambda head: head.eval(), "training"),
    "frozen": (lambda head: head.requires_grad_(False), "weight.requires_grad"),
    "half": (lambda head: head.bfloat16(), "weight.dtype"),
}
CHANGED_GROUPS = ["lr", "momentum", "weight_decay"]
CHANGED_ARGUMENTS = ["sample_weight", "target", "reduction", "ignore_index", "loss_weight", "k"]
# Changes of a margin or scale with a state; the error has the case's name.
CHANGED_STATES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[fa.PartialFC], Any]]] = {
    "margin.training": (lambda: {"margin": fa.AdaFace()}, lambda head: head.margin.eval()),
    "margin.state": (lambda: {"margin": fa.AdaFace()}, lambda head: head.margin.norm_mean.fill_(7)),
    "scale.value": (learned_scale, lambda head: head.scale.data.fill_(9)),
    "scale.requires_grad": (learned_scale, lambda head: head.scale.requires_grad_(False)),
    "scale.state": (lambda: {"scale": fa.AdaCos()}, lambda head: head.scale.scale.fill_(7)),
    "scale.training": (lambda: {"scale": fa.AdaCos()}, lambda head: head.scale.eval()),
}


def run_matrix(directory: str) -> dict[str, Any]:
    """What became of each case: an error's type and text, or a result; and its seconds."""
    rank = Rank(dist.new_group(timeout=timedelta(seconds=3 * LIMIT)))
    outcomes: dict[str, Any] = {}

    def record(name: str, case: Callable[[], Any]) -> None:
        start = time.perf_counter()
        try:
            outcome = case()
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        outcomes[name] = (outcome, time.perf_counter() - start)

    def after_a_step(head: fa.PartialFC, change: Callable[[fa.PartialFC], Any]) -> fa.PartialFC:
        rank.step(head)
        if rank.differs:
            change(head)
        return head

    for name, (change, _) in CHANGED_HEADS.items():
        head = after_a_step(rank.head(margin=CLASS_MARGINS[0] if name == "class margins" else fa.ArcFace()), change)
        record(name, lambda head=head: rank.step(head))
    for name in CHANGED_GROUPS:
        head = rank.head(center_optimizer=fa.CenterSGD(0.1))
        after_a_step(head, lambda head, name=name: head.center_optimizer.param_groups[0].update({name: 0.5}))
        record(name, lambda head=head: rank.step(head))
    recipe = fa.CenterSGD(0.1)
    for name, change in {
        "optimizer": lambda head: setattr(head, "center_optimizer", None),
        "weight alone loaded": lambda head: head.load_state_dict({"weight": head.weight.detach().clone()}),
        "another weight": lambda head: setattr(head, "weight", torch.nn.Parameter(rows(1)[0])),
    }.items():
        changed = after_a_step(rank.head(center_optimizer=None if name == "another weight" else recipe), change)
        record(name, lambda changed=changed: rank.step(changed))
    for name, (options, change) in CHANGED_STATES.items():
        head = rank.head(**options())
        if not name.endswith((".state", ".value")):  # those are compared in the first step
            rank.step(head)
        if rank.differs:
            change(head)
        record(name, lambda head=head: rank.step(head))
    record_calls(rank, record)
    record_equal(rank, record)
    record_constructors(rank, record)
    record_checkpoints(rank, record, Path(directory))
    return outcomes


def record_calls(rank: Rank, record: Record) -> None:
    """Arguments and calls that differ, on one head: the ranks agree again after each error."""
    head, (x, y) = rank.head(), rows(rank.rank)
    rank.step(head)
    fp32 = x.float().requires_grad_()

    def under(mode: Any, call: Callable[[], Any]) -> Any:
        if not rank.differs:
            return call()
        with mode:
            return call()

    def either(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], Any]:
        return second if rank.differs else first

    weights = torch.ones(3)
    record("sample_weight", lambda: head(x, y, sample_weight=None if rank.differs else weights))
    record("sample_weight refused", lambda: head(x, y, sample_weight=-weights if rank.differs else weights))
    record("target", lambda: head(x, (y, y, 0.5) if rank.differs else y))
    record("share refused", lambda: head(x, (y, y, 2.0 if rank.differs else 0.5)))
    record("reduction", lambda: head(x, y, reduction="none" if rank.differs else "mean"))
    record("ignore_index", lambda: head(x, y, ignore_index=-1 if rank.differs else -100))
    record("loss_weight", lambda: head(x, y, loss_weight=2.0 if rank.differs else 1.0))
    record("loss_weight refused", lambda: head(x, y, loss_weight=-1.0 if rank.differs else 1.0))
    record("no_grad", lambda: under(torch.no_grad(), lambda: rank.step(head)))
    record("inference_mode", lambda: under(torch.inference_mode(), lambda: head(x, y)))
    record("dtype", lambda: rank.step(head, fp32 if rank.differs else None))
    record("autocast", lambda: under(torch.autocast("cpu", torch.bfloat16), lambda: head(fp32, y)))
    record("return_stats type", lambda: head(x, y, return_stats="yes" if rank.differs else True))
    record("forward or logits", either(lambda: head(x, y), lambda: head.logits(x)))
    record("forward or full_weight", either(lambda: head(x, y), head.full_weight))
    record("logits or topk", either(lambda: head.logits(x), lambda: head.topk(x, 2)))
    record("full_weight or load", either(head.full_weight, lambda: head.load_full_weight(torch.zeros(CLASSES, D))))
    record("k", lambda: head.topk(x, 3 if rank.differs else 2))
    record("k refused", lambda: head.topk(x, 0 if rank.differs else 2))
    record("logits refused", lambda: head.logits(x[0] if rank.differs else x))
    record("target refused", lambda: head(x, y.double() if rank.differs else y))
    record("device refused", lambda: head(x.to("meta") if rank.differs else x, y))
    record("load refused", lambda: head.load_full_weight(torch.zeros(CLASSES, 5 if rank.differs else D)))
    other = rank.head()
    if rank.differs:
        other.bfloat16()
    record("full_weight dtype", other.full_weight)
    wide = fa.PartialFC(16 * D, CLASSES, dtype=torch.float64, group=rank.group)
    record("another head", either(lambda: head(x, y), lambda: wide(x.repeat(1, 16), y)))
    record("another head's topk", either(lambda: wide.topk(x.repeat(1, 16), 1), lambda: head.topk(x, 1)))
    record("a head or its construction", either(lambda: head(x, y), rank.head))
    as_wide = rank.head()
    record("a head as wide", either(lambda: rank.step(head), lambda: rank.step(as_wide)))
    record("heads still together", lambda: wide(x.repeat(1, 16), y).isfinite().item())
    record("still together", lambda: rank.step(head).isfinite().all().item())


def record_equal(rank: Rank, record: Record) -> None:
    """What one rank may ask for alone, or not have: the others take part."""
    x, y = rows(rank.rank)

    def statistics() -> Any:
        head = rank.head()
        loss, stats = head(x, y, return_stats=True)
        alone = rank.head()
        result = alone(x.clone().requires_grad_(), y, return_stats=rank.differs)
        (result[0] if rank.differs else result).backward()
        if rank.differs:
            torch.testing.assert_close(result[1], stats, rtol=0, atol=0)
        return torch.equal(result[0] if rank.differs else result, loss.detach())

    def one_needs_no_gradient(make: Callable[[], fa.PartialFC], frozen: bool) -> Callable[[], Any]:
        def case() -> Any:
            expected, actual = make(), make()
            reference = x.clone().requires_grad_()
            expected(reference, y).backward()
            actual.requires_grad_(not frozen)
            own = x.clone().requires_grad_(not rank.differs)
            actual(own, y).backward()
            same = frozen or torch.equal(actual.weight.grad.to_dense(), expected.weight.grad.to_dense())
            return same and (own.grad is None if rank.differs else torch.equal(own.grad, reference.grad))

        return case

    def without_rows() -> Any:
        head = rank.head(sample_rate=0.5)
        nothing = x[:0].clone().requires_grad_()
        loss = head(nothing, y[:0])
        loss.backward()
        return loss.isnan().item() and nothing.grad.shape == (0, D) and not head.weight.grad.to_dense().any().item()

    def without_rows_of_its_own() -> Any:
        head = rank.head(margin=fa.ElasticFace(plus=True))
        nothing = x[:0].clone().requires_grad_()
        losses = head(nothing, y[:0], reduction="none")
        losses.sum().backward()
        return losses.shape == (0,) and nothing.grad.shape == (0, D) and not head.weight.grad.any().item()

    def without_rows_updated() -> Any:
        head = rank.head(center_optimizer=fa.CenterSGD(0.1, weight_decay=0.1))
        rank.step(head)
        before = head.weight.detach().clone()
        head(x[:0].clone().requires_grad_(), y[:0]).backward()
        return torch.equal(head.weight, before) and rank.step(head).isfinite().all().item()

    record("return_stats", statistics)
    head = rank.head()
    own = y.int() if rank.differs else y
    record("labels of another dtype", lambda: torch.equal(head(x, y).detach(), head(x, own).detach()))
    record("embeddings without gradient", one_needs_no_gradient(rank.head, frozen=False))
    record("nothing to train", one_needs_no_gradient(rank.head, frozen=True))
    warnings.filterwarnings("ignore", "PartialFC_V2: function is no margin")
    slow_head = partial(insightface.PartialFC_V2, lambda cosines, _: 64 * cosines, D, CLASSES)  # over the default group
    record("slow path without gradient", one_needs_no_gradient(slow_head, frozen=False))
    record("no rows", without_rows)
    record("no rows, their losses", without_rows_of_its_own)
    record("no rows with CenterSGD", without_rows_updated)


def record_constructors(rank: Rank, record: Record) -> None:
    """Arguments that rank 1's constructor refuses."""
    wrong = {"scale": -1.0, "num_classes": 0, "backend": "tpu", "dtype": torch.int32, "device": "cuda:99"}
    for name, value in wrong.items():
        options = {"embedding_dim": D, "num_classes": CLASSES, "group": rank.group}
        options |= {name: value} if rank.differs else {}
        record(f"constructor {name}", lambda options=options: fa.PartialFC(**options))


def record_checkpoints(rank: Rank, record: Record, directory: Path) -> None:
    """Checkpoints that one rank cannot write or read, or names otherwise."""
    head = rank.head()
    save, load = fa.checkpoint.save, fa.checkpoint.load
    (directory / "file").touch()
    root = directory / "saved"
    save(root, head, epoch=1)
    record("save to a file", lambda: save(directory / "file", head))
    record("save elsewhere", lambda: save(directory / ("b" if rank.differs else "a"), head))
    record("save another", lambda: save(root, head, **({"net": 1} if rank.differs else {})))
    record("load from elsewhere", lambda: load(directory / "none" if rank.differs else root, head))
    record("load from nowhere", lambda: load(root if rank.differs else directory / "none", head))
    record("load another", lambda: load(root, head, **({"net": torch.nn.Linear(1, 1)} if rank.differs else {})))
    record("load", lambda: load(root, head))
    calls = [lambda: load(root, head), lambda: save(root, head), head.full_weight, lambda: rank.step(head)]
    for first, second in itertools.combinations(range(4), 2):
        record(f"calls {first} or {second}", calls[second if rank.differs else first])
    record("save to nothing", lambda: save(3.5 if rank.differs else root, head))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return distributed_helpers.run_ranks(2, run_matrix, str(tmp_path_factory.mktemp("checkpoints")))


def both(outcomes: list[dict[str, Any]], name: str) -> tuple[Any, Any]:
    for rank in outcomes:
        assert rank[name][1] < LIMIT
    return outcomes[0][name][0], outcomes[1][name][0]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *((case, name) for case, (_, name) in CHANGED_HEADS.items()),
        *((name, f"center_optimizer.{name}") for name in CHANGED_GROUPS),
        *((name, name) for name in [*CHANGED_STATES, *CHANGED_ARGUMENTS]),
        ("optimizer", "center_optimizer.lr"),
        ("weight alone loaded", "step"),
        *((name, "torch.is_grad_enabled()") for name in ("no_grad", "inference_mode")),
        ("forward or logits", "call"),
        ("forward or full_weight", "call"),
        ("logits or topk", "call"),
        ("full_weight or load", "call"),
        ("full_weight dtype", "weight.dtype"),
        *((name, "head") for name in ("another head", "another head's topk", "a head as wide")),
    ],
)
def test_what_must_be_alike_is_refused_by_name_on_both(outcomes, case, name):
    first, second = both(outcomes, case)
    assert first == second
    assert first.startswith(f"ValueError: PartialFC: {name} must be the same on every rank; got rank 0: ")


def test_a_constructor_meets_no_other_call(outcomes):
    first, second = both(outcomes, "a head or its construction")
    rule = "call must be the same on every rank; got rank 0: forward(), rank 1: PartialFC"
    assert first == f"ValueError: PartialFC: {rule}"
    assert second == first.replace("PartialFC: call", "the ranks: call")


@pytest.mark.parametrize("case", ["dtype", "autocast"])
def test_another_dtype_is_refused_on_both(outcomes, case):
    first, second = both(outcomes, case)
    assert first == second and first.startswith("TypeError: embeddings must have the same dtype on every rank; got ")


@pytest.mark.parametrize(
    ("case", "own"),
    [
        ("k refused", "ValueError: k must be >= 1; got 0"),
        ("loss_weight refused", "ValueError: loss_weight must be finite and >= 0; got -1.0"),
        ("another weight", "RuntimeError: PartialFC: weight must be this rank's (5, 4); got (3, 4)"),
        ("logits refused", "ValueError: embeddings must be (N, D=4); got (4,)"),
        ("target refused", "TypeError: target must have one of the dtypes"),
        ("device refused", "ValueError: embeddings must be on weight's device cpu; got meta"),
        ("share refused", "ValueError: target[2] must be in [0, 1]; got 2.0"),
        ("sample_weight refused", "ValueError: sample_weight must be finite and >= 0; got -1 at row 0"),
        ("return_stats type", "TypeError: return_stats must be a bool; got str"),
    ],
)
def test_what_one_rank_refuses_raises_on_both(outcomes, case, own):
    first, second = both(outcomes, case)
    assert second.startswith(own)
    assert first == "RuntimeError: rank(s) 1 refused the arguments of this step: see the error there"


def test_a_wrong_full_weight_raises_on_both(outcomes):
    assert both(outcomes, "load refused") == ("ValueError: tensor must be (C_total=11, D=4); got (11, 5)",) * 2


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("scale", "ValueError: scale must be finite and > 0; got -1.0"),
        ("num_classes", "ValueError: num_classes must be >= 1; got 0"),
        ("backend", "ValueError: backend must be one of"),
        ("dtype", "TypeError: dtype must be a floating-point one; got torch.int32"),
        ("device", ""),  # torch's own words
    ],
)
def test_what_one_constructor_refuses_raises_on_both(outcomes, name, own):
    first, second = both(outcomes, f"constructor {name}")
    assert second.startswith(own) and first == f"RuntimeError: PartialFC failed on rank 1: {second}"


@pytest.mark.parametrize(
    "case",
    [
        "return_stats",
        "labels of another dtype",
        "embeddings without gradient",
        "nothing to train",
        "slow path without gradient",
        "no rows",
        "no rows, their losses",
        "no rows with CenterSGD",
        "still together",
        "heads still together",
    ],
)
def test_what_may_differ_gives_the_right_result_on_both(outcomes, case):
    assert both(outcomes, case) == (True, True)


def test_checkpoints(outcomes):
    for case, message in {
        "save elsewhere": "ValueError: checkpoint.save: root must be the same on every rank",
        "save another": "ValueError: checkpoint.save: others must be the same on every rank",
        "load from nowhere": "FileNotFoundError: no checkpoint in ",
        "save to a file": "CheckpointError: ",
    }.items():
        first, second = both(outcomes, case)
        assert first == second and first.startswith(message)
    assert "file: the checkpoint of step 0 cannot be written: [Errno 17] File exists: " in first
    assert both(outcomes, "load from elsewhere") == ({"epoch": 1}, {"epoch": 1})  # the first rank chooses for all
    first, second = both(outcomes, "load another")
    assert second.endswith(" has no net") and first == f"RuntimeError: checkpoint.load failed on rank 1: {second}"
    assert both(outcomes, "load") == ({"epoch": 1}, {"epoch": 1})
    names = ["checkpoint.load()", "checkpoint.save()", "full_weight()", "forward()"]
    for one, other in itertools.combinations(range(4), 2):
        first, second = both(outcomes, f"calls {one} or {other}")
        made = f"got rank 0: {names[one]}, rank 1: {names[other]}"
        assert first == second == f"ValueError: PartialFC: call must be the same on every rank; {made}"
    first, second = both(outcomes, "save to nothing")
    assert second.startswith("TypeError: ") and first == f"RuntimeError: checkpoint.save failed on rank 1: {second}"
