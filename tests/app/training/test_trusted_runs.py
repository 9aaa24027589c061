"""A run whose margin is code of somebody's own: training imports it where the user has named it, evaluation never."""

import sys
from pathlib import Path

import pytest
from support.image_files import write_folder

from fused_arcface.app.cli import run as run_command
from fused_arcface.app.training.config import TrainConfig
from fused_arcface.app.training.runs import RunFolder, load_backbone
from fused_arcface.app.training.world import resume_command
from fused_arcface.margins.text import check_margin, imported_module


@pytest.fixture
def imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module with a margin; returns a function that says whether it has been imported since it was last asked."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\ndef steep(cosine):\n    return cosine - 0.2\n"
    (tmp_path / "strange_margin.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))

    def asked() -> bool:
        sys.modules.pop("strange_margin", None)
        found = ran.exists()
        ran.unlink(missing_ok=True)
        return found

    yield asked
    sys.modules.pop("strange_margin", None)


@pytest.mark.slow
def test_a_strangers_run_is_evaluated_without_its_code_and_resumed_with_it_if_trusted(tmp_path, imports, capsys):
    output, margin = str(tmp_path / "run"), ["--margin", "strange_margin:steep"]
    begin = ["train", "--data", "identities:6x4", "--output", output, "--epochs", "1", "--batch-size", "8"]
    assert run_command([*begin, *margin, "--image-size", "16", "--workers", "0", "--device", "cpu"]) == 0
    assert imports()

    faces = write_folder(tmp_path / "faces", 4, 3)
    for command in ("verify", "identify"):
        assert run_command([command, "--data", str(faces), "--checkpoint", output]) == 0
    load_backbone(Path(output))
    assert not imports()

    capsys.readouterr()
    resume = ["train", "--output", output, "--resume", "--epochs", "2"]
    assert run_command(resume) == 2
    said = capsys.readouterr().err
    assert "imports the module strange_margin" in said and "--margin strange_margin:steep, or add --trust" in said
    assert not imports()
    assert run_command([*resume, "--trust"]) == 0
    assert imports()
    # What a supervisor starts again and again: the margin is named on the command line.
    assert run_command(["train", "--output", output, "--resume", "--epochs", "3", *margin]) == 0
    assert imports()
    assert run_command(["train", "--output", output, "--resume", "--epochs", "4", "--margin", "CosFace(0.2)"]) == 0
    assert not imports()


def test_a_margin_in_a_file_needs_trust(tmp_path, imports, capsys):
    file = tmp_path / "options.toml"
    file.write_text('data = "identities:6x4"\nmargin = "strange_margin:steep"\n')
    assert run_command(["train", "--config", str(file), "--output", str(tmp_path / "run")]) == 2
    assert "--trust" in capsys.readouterr().err and not imports() and not (tmp_path / "run").exists()


def test_the_printed_command_names_the_margin(tmp_path):
    folder = RunFolder(tmp_path)
    TrainConfig(data="x", margin="strange_margin:steep").save(folder.config)
    assert resume_command(tmp_path).endswith(" --resume --margin strange_margin:steep")
    TrainConfig(data="x", margin="CosFace(0.2)").save(folder.config)
    assert resume_command(tmp_path).endswith(" --resume")


def test_options_name_modules_without_importing_them(imports):
    assert TrainConfig(margin="strange_margin:steep").margin == "strange_margin:steep"
    assert not imports()
    for text, module in (("a.b:c", "a.b"), ("许:c", "许"), ("ArcFace(0.5)", None), ("a:b:c", None), ("a b:c", None)):
        assert imported_module(text) == module
    for text in ("a:b:c", "a b:c", ":c", "a:", "os;x:y"):
        with pytest.raises(ValueError, match="margin must be a margin or MODULE:NAME"):
            check_margin(text)
