"""The migration page: its "after" blocks run, and give what the blocks before them gave."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_arcface as fa
from fused_arcface.app.cli import load_command, run

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
    assert sum(code.startswith("# after") for code in blocks) == 10


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "Checkpoints"])
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


def test_verify_on_the_page_is_a_command() -> None:
    (command,) = re.findall(r"`fused-arcface (verify .*?)`", TEXT.replace("\n", " "))
    arguments = shlex.split(command)
    options = {option for parameter in load_command("verify").params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= options


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


def test_the_head_of_speaker_toolkits_agrees() -> None:
    names = namespace()
    before = execute(block("AAM-softmax", "before"), dict(names))
    made, _, used = block("AAM-softmax", "after").partition("loss = head")
    after = execute(made, dict(names))
    with torch.no_grad():
        after["head"].weight.copy_(before["weight"])
    execute(f"loss = head{used}", after)
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-5, atol=1e-5)
