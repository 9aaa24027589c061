"""Help texts: whole sentences, one look, groups, and lines that fit."""

from __future__ import annotations

import re

import pytest

from fused_arcface.app.cli import COMMANDS, load_command, run


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_an_option_is_whole_sentences(name: str) -> None:
    command = load_command(name)
    for option in command.params:
        assert re.fullmatch(r"[A-Z0-9.\"`].*[.]", option.help or "", re.DOTALL), (option.name, option.help)
    summary, _, rest = (command.help or "").partition("\n\n")
    assert re.match("[A-Z][a-z]+,? ", summary) and summary.endswith(".") and (not rest or rest.rstrip().endswith("."))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_one_look_and_fits_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert not re.search(r"<bool>|\[default|range>|\x1b", shown)
    assert max(map(len, shown.splitlines())) <= 80
    groups = {option.rich_help_panel for option in load_command(name).params}
    assert len(groups) > 1 or len(load_command(name).params) <= 12


def test_a_default_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {option.name: option.help for option in load_command("verify").params}
    assert texts["distance"] == (
        "Distance between two embeddings: cosine, euclidean, p-norm, inner-product or mahalanobis. Default: cosine."
    )
    assert texts["flip"] == "Add the embedding of the mirrored image to that of the image."
