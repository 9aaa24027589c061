"""README and docs: Python blocks run, commands exist, links lead somewhere, tables are current."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fused_arcface.app.cli import COMMANDS, load_command, run

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
D, C, N = 64, 1000, 8


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.DOTALL | re.MULTILINE)


def names_for(page: str) -> dict[str, Any]:
    """Return what a reader has before the first block: data, a small backbone, and sizes that a test can bear."""
    d = 512 if page == "README.md" else D
    images, labels = torch.randn(N, 6), torch.arange(N)
    if page == "docs/fine-tuning.md":
        labels = 1000 + labels % 2
    return {
        "torch": torch,
        "os": os,
        "backbone": nn.Linear(6, d),
        "images": images,
        "labels": labels,
        "loader": [(images, labels)] * 2,
        "num_classes": C,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run and the images that the pages name."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("reader")
    options = ["--data", "identities:8x4", "--epochs", "1", "--batch-size", "8", "--image-size", "32", "--workers", "0"]
    assert run(["train", "--output", str(folder / "runs/first"), *options]) == 0
    for name in ("ann.jpg", "bob.jpg"):
        Image.effect_noise((40, 40), 60).save(folder / name)
    return folder


PYTHON_PAGES = [name for name in NAMES if blocks(name, "python") and name != "docs/migration.md"]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", PYTHON_PAGES)
@pytest.mark.slow
def test_python_blocks_run(
    page: str, trained: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if page == "docs/frameworks.md":
        request.getfixturevalue("process_group")
        if importlib.util.find_spec("transformers") is None:
            transformers = types.ModuleType("transformers")
            transformers.PreTrainedModel = nn.Module  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.chdir(trained)
    names = names_for(page)
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec", dont_inherit=True), names)
    if "loss" in names:
        assert names["loss"].isfinite().all()


def test_only_lines_for_gpus_are_left_out() -> None:
    left_out = [
        block for name in NAMES for block in re.findall(r"^```python .*?\n(.*?)^```", text_of(name), re.S | re.M)
    ]
    assert len(left_out) == 1 and all('"cuda"' in block for block in left_out)


@cache
def options_of(command: str) -> set[str]:
    parameters = load_command(command).params
    return {option for each in parameters for option in (*each.opts, *each.secondary_opts)} | {"--help"}


@pytest.mark.parametrize("page", NAMES)
def test_commands_on_the_pages_exist(page: str) -> None:
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        for program in ("fused-arcface", "fused_arcface"):
            if program in words[:-1]:
                command, *arguments = words[words.index(program) + 1 :]
                assert command in {*COMMANDS, "--help", "--version", "COMMAND"}, line
                given = {argument for argument in arguments if argument.startswith("--")}
                assert not given or given <= options_of(command), line


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = text_of("docs/index.md")
    missing = [page.stem for page in (ROOT / "docs").glob("*.md") if not re.search(rf"^{page.stem}$", index, re.M)]
    assert missing == ["index"]


def test_lists_of_margins_and_formats_are_the_registries() -> None:
    update = runpy.run_path(str(ROOT / "docs" / "update.py"))
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    assert {path for path, text in pages.items() if update["with_lists"](text) != text} == set()
    assert [name for name in update["LISTS"] if f"<!-- {name} -->" not in "".join(pages.values())] == []


def test_the_readme_starts_with_the_two_commands() -> None:
    first = re.search(r"^```sh\n(.*?)^```", text_of("README.md"), re.DOTALL | re.MULTILINE)
    assert first and [line.split("#")[0].strip() for line in first[1].splitlines()] == ["make demo", "make test"]
    assert len(text_of("README.md").splitlines()) <= 130
