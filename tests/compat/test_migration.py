"""The migration page: its "after" blocks run, and give what the blocks before them gave."""

from __future__ import annotations

import importlib.util
import itertools
import math
import pydoc
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_arcface as fa
from fused_arcface.app.cli import load_command, run
from fused_arcface.app.training.schedule import Schedule

TEXT = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"```(\w+)\n(.*?)```", body, re.DOTALL)
    for title, body in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE)
}
N, D, C = 40, 16, 11
PAIRED = ["ArcFace", "CosFace", "Normalized softmax", "Sub-centers"]


def block(section: str, kind: str) -> str:
    (found,) = (code for language, code in SECTIONS[section] if language == "python" and code.startswith(f"# {kind}\n"))
    return found


def namespace() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    backbone = nn.Linear(6, D)
    return {
        "math": math,
        "torch": torch,
        "backbone": backbone,
        "embeddings": backbone(torch.randn(N, 6, generator=generator)),
        "labels": torch.arange(N) % C,
        "num_classes": C,
    }


def execute(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "docs/migration.md", "exec"), names)
    return names


def test_the_page_has_what_is_tested() -> None:
    blocks = [code for section in SECTIONS.values() for language, code in section if language == "python"]
    assert all(code.startswith(("# before\n", "# after\n")) for code in blocks)
    assert sum(code.startswith("# after") for code in blocks) == 17


WITH_FILES = {"Checkpoints", "Resume their training"}
RUNNING = [
    name
    for name, found in SECTIONS.items()
    if name not in WITH_FILES and any(code.startswith("# after") for _, code in found)
]


@pytest.mark.parametrize("section", RUNNING)
def test_after_blocks_run(section: str) -> None:
    names = execute(block(section, "after"), namespace())
    if "loss" in names:
        assert names["loss"].shape == () and names["loss"].isfinite()
    elif section == "Verification":
        assert names["accuracy"].shape == (10,)


def test_insightface_drop_in_and_native_head_agree() -> None:
    """One name's straight-through margin is the other's ``boundary="none", gradient="straight_through"``."""
    drop_in = execute(block("The same script, another import", "after"), namespace())
    embeddings = drop_in["embeddings"]
    native = fa.MarginHead(D, C, margin=fa.ArcFace(0.5, boundary="none", gradient="straight_through"))
    with torch.no_grad():
        native.weight.copy_(drop_in["module_partial_fc"].weight)
    loss = native(embeddings.detach(), drop_in["labels"])
    assert isinstance(loss, Tensor)
    loss.backward()
    torch.testing.assert_close(loss, drop_in["loss"])
    torch.testing.assert_close(native.weight.grad, drop_in["module_partial_fc"].weight.grad)


def test_the_native_head_updates_its_centers() -> None:
    code = block("The head itself: exact gradient, optimizer inside", "after")
    before, _, rest = code.partition("loss = head")
    names = execute(before, namespace())
    centers = names["head"].weight.detach().clone()
    execute(f"loss = head{rest}", names)
    assert not names["head"].weight.equal(centers)


def test_checkpoints_are_converted_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("work_dirs/run").mkdir(parents=True)
    centers = torch.randn(C, D)
    for rank, rows in enumerate((centers[:6], centers[6:])):  # insightface's shards of 11 classes on two ranks
        torch.save(
            {"epoch": 1, "global_step": 9, "state_dict_backbone": {}, "state_dict_softmax_fc": {"weight": rows}},
            f"work_dirs/run/checkpoint_gpu_{rank}.pt",
        )
    commands = [code for language, code in SECTIONS["Checkpoints"] if language == "sh"]
    for line in "".join(commands).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "fused-arcface" and run(arguments) == 0
    names = execute(block("Checkpoints", "after"), namespace())
    assert names["head"].weight.equal(centers)


def polynomial_with_warm_up(steps: int, rising: int, power: float) -> list[float]:
    """Return the rates of insightface's PolynomialLRWarmup, by its own recursion, for a highest rate of 1."""
    rates = [1.0]
    for step in range(1, steps):
        if step <= rising:
            rates.append(step / rising)
        else:
            progress, before = ((each - rising) / (steps - rising) for each in (step, step - 1))
            rates.append(rates[-1] * ((1 - progress) / (1 - before)) ** power)
    return rates


@pytest.mark.parametrize("rising", [0, 3])
def test_a_configuration_file_becomes_a_command(
    rising: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command starts, with a small net and few images; its schedule is that of insightface, after the warm-up."""
    (line,) = [code for language, code in SECTIONS["A configuration file"] if language == "sh"]
    program, *arguments = shlex.split(line)
    small = "--data identities:8x4 --backbone small --image-size 32 --batch-size 8 --epochs 5 --workers 0 --dry-run"
    monkeypatch.chdir(tmp_path)
    assert program == "fused-arcface" and run([*arguments, *small.split()]) == 0
    assert "straight_through" in capsys.readouterr().out.replace("\n", "")
    given = dict(itertools.pairwise(arguments))
    schedule = Schedule(20, given["--schedule"], float(given["--power"]), rising / 20)
    rates = [schedule.factor(step) for step in range(20)]
    right = polynomial_with_warm_up(20, rising, 1.0)  # train_v2.py does not name the power, whose default is 1
    assert rates[rising:] == pytest.approx(right[rising:])
    assert rates[:rising] == right[1 : rising + 1]  # insightface rises from the second step on


def test_verify_on_the_page_is_a_command() -> None:
    (command,) = re.findall(r"`fused-arcface (verify .*?)`", TEXT.replace("\n", " "))
    arguments = shlex.split(command)
    options = {option for parameter in load_command("verify").params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= options


def test_options_in_the_table_of_configurations() -> None:
    body = TEXT.partition("### A configuration file")[2].partition("###")[0]
    named = set(re.findall(r"--[a-z][a-z-]*", body))
    options = {
        option
        for command in ("train", "verify")
        for parameter in load_command(command).params
        for option in parameter.opts
    }
    assert len(named) > 15 and named <= options


@pytest.mark.skipif(
    importlib.util.find_spec("pytorch_metric_learning") is None, reason="pytorch-metric-learning is not installed"
)
@pytest.mark.parametrize("section", PAIRED)
def test_before_and_after_agree(section: str) -> None:
    names = namespace()
    torch.manual_seed(4)
    before = execute(block(section, "before"), dict(names))
    # The head is made by the page; its centers become the loss's.
    made, _, used = block(section, "after").partition("loss = head")
    after = execute(made, dict(names))
    with torch.no_grad():
        after["head"].weight.copy_(before["loss_func"].W.T)
    execute(f"loss = head{used}", after)
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-5, atol=1e-5)
    if "logits" in before:
        torch.testing.assert_close(after["logits"], before["logits"], rtol=1e-5, atol=1e-4)
    gradients = [
        torch.autograd.grad(found["loss"], (names["embeddings"], weight), retain_graph=True)
        for found, weight in ((before, before["loss_func"].W), (after, after["head"].weight))
    ]
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1][1], gradients[0][1].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("section", ["AAM-softmax", "Sub-centers with a margin for each class"])
def test_a_head_and_the_formula_before_it_agree(section: str) -> None:
    names = namespace()
    before = execute(block(section, "before"), dict(names))
    made, _, used = block(section, "after").partition("loss = head")
    after = execute(made, dict(names))
    with torch.no_grad():
        after["head"].weight.copy_(before["weight"])
    execute(f"loss = head{used}", after)
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(loss, (names["embeddings"], weight), retain_graph=True)
        for loss, weight in ((before["loss"], before["weight"]), (after["loss"], after["head"].weight))
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_the_file_of_a_recipe_makes_the_head() -> None:
    """As HyperPyYAML reads it: ``!new:`` calls, ``!ref`` is a value."""
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        pass

    def called(loader: Any, path: str, node: Any) -> Any:
        return pydoc.locate(path)(**loader.construct_mapping(node, deep=True))  # type: ignore[operator]

    Loader.add_multi_constructor("!new:", called)
    Loader.add_constructor("!ref", lambda loader, node: C)
    ((_, text),) = [found for found in SECTIONS["SpeechBrain"] if found[0] == "yaml"]
    head = yaml.load(text, Loader=Loader)["classifier"]
    assert head.margin == fa.ArcFace(0.2) and head.scale == 30 and head.weight.shape == (C, 192)


def test_a_scheduler_changes_the_margin_of_the_projection() -> None:
    after = execute(block("WeSpeaker", "after"), namespace())
    after["head"].update(margin=0.1)
    assert after["head"].margin == fa.ArcFace(0.1, "continuous") and after["head"].margin.margin == 0.1


class Cosines(nn.Module):
    """SpeechBrain's ECAPA-TDNN classifier without further layers, in this test's words: (N, 1, D) to (N, 1, C)."""

    def __init__(self, input_size: int, out_neurons: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_neurons, input_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x.squeeze(1)), F.normalize(self.weight)).unsqueeze(1)


class AngularLogits:
    """SpeechBrain's AdditiveAngularMargin: cosines (N, C) and one-hot targets to scaled logits."""

    def __init__(self, margin: float, scale: float) -> None:
        self.margin, self.scale = margin, scale

    def __call__(self, cosine: Tensor, targets: Tensor) -> Tensor:
        phi = cosine * math.cos(self.margin) - (1 - cosine**2).sqrt() * math.sin(self.margin)
        past = cosine - math.sin(math.pi - self.margin) * self.margin
        phi = torch.where(cosine > math.cos(math.pi - self.margin), phi, past)
        return self.scale * (targets * phi + (1 - targets) * cosine)


class DivergenceLoss:
    """SpeechBrain's LogSoftmaxWrapper."""

    def __init__(self, logits: AngularLogits) -> None:
        self.logits = logits

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = outputs.squeeze(1)
        one_hot = F.one_hot(targets.squeeze(1), outputs.shape[1]).float()
        log_probabilities = self.logits(outputs, one_hot).log_softmax(1)
        return F.kl_div(log_probabilities, one_hot, reduction="sum") / one_hot.sum()


class ArcProduct(nn.Module):
    """WeSpeaker's ArcMarginProduct: logits (N, C), past π less by 1 + cos(π - margin)."""

    def __init__(self, in_features: int, out_features: int, scale: float, margin: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.scale, self.margin = scale, margin

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))
        phi = cosine * math.cos(self.margin) - (1 - cosine**2).sqrt() * math.sin(self.margin)
        past = cosine - (1 + math.cos(math.pi - self.margin))
        phi = torch.where(cosine > math.cos(math.pi - self.margin), phi, past)
        one_hot = F.one_hot(label, cosine.shape[1])
        return self.scale * (one_hot * phi + (1 - one_hot) * cosine)


STAND_INS = {
    "speechbrain.lobes.models.ECAPA_TDNN": {"Classifier": Cosines},
    "speechbrain.nnet.losses": {"AdditiveAngularMargin": AngularLogits, "LogSoftmaxWrapper": DivergenceLoss},
    "wespeaker.models.projections": {"ArcMarginProduct": ArcProduct},
}


@pytest.mark.parametrize(("section", "made"), [("SpeechBrain", "classifier"), ("WeSpeaker", "projection")])
def test_speaker_toolkits_by_name(section: str, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both blocks of the page: the same loss and gradients, with targets on both sides of the boundary."""
    for path, names in STAND_INS.items():
        for name in [path[:i] for i, each in enumerate(path) if each == "."]:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        module = types.ModuleType(path)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, path, module)
    given = namespace()
    definition, _, _ = block(section, "before").rpartition("loss = ")
    use = block(section, "before").removeprefix(definition)
    before = execute(definition, dict(given))
    weight = before[made].weight
    with torch.no_grad():
        weight[3] = 0.05 * weight[3] - given["embeddings"][3]  # of label 3, opposite to its center
    execute(use, before)
    definition, _, used = block(section, "after").partition("loss, stats = head")
    after = execute(definition, dict(given))
    after["head"].load_state_dict({"weight": weight})
    execute(f"loss, stats = head{used}", after)
    assert after["stats"].target_cosine.min() < -0.99
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(loss, (given["embeddings"], center), retain_graph=True)
        for loss, center in ((before["loss"], weight), (after["loss"], after["head"].weight))
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
