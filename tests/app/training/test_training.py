"""Training runs inside this process: interrupted by signals and resumed, in micro-batches, with bad data."""

from __future__ import annotations

import os
import pickle
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_files import encoded, picture, write_folder, write_records
from support.training_runs import TINY, losses, run, weights
from torch import nn

import fused_arcface as fa
from fused_arcface.app.cli import run as run_command
from fused_arcface.app.data import DataError, ImageSpec, formats
from fused_arcface.app.data.pair_sets import read_pair_set
from fused_arcface.app.nets.backbones import build_backbone
from fused_arcface.app.nets.small import embed
from fused_arcface.app.training import events
from fused_arcface.app.training.config import OptionError, TrainConfig, read_options
from fused_arcface.app.training.events import Noted, Stepped, Verified
from fused_arcface.app.training.joint_step import JointStep
from fused_arcface.app.training.outcomes import TrainingError, TrainingOutcome
from fused_arcface.app.training.runs import RunError, load_backbone
from fused_arcface.app.training.trainer import train
from fused_arcface.app.training.verifier import Verifier
from fused_arcface.base.extras import MissingExtra
from fused_arcface.evaluation import pair_scores, verify_scores

NONE = "none of BMP, DIB, GIF, JPEG, PNG, PPM, TGA, TIFF, WEBP"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sample_rate": 0.5, "accumulation": 2, "optimizer": "adamw"},
        {"center_optimizer": "joint", "precision": "bf16", "workers": 2},
        {"precision": "fp16", "margin": "CosFace(0.2)", "schedule": "polynomial"},
        {"margin": "AdaFace", "sub_centers": 2, "accumulation": 2},
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, options: dict) -> None:
    config = TINY.replace(options)
    assert run(config, tmp_path / "whole")[0] == TrainingOutcome(9, 9)
    outcome, _ = run(config, tmp_path / "parts", stop_at=4)  # within the second epoch
    assert outcome == TrainingOutcome(4, 9, signal.SIGINT)
    outcome, _ = run(config, tmp_path / "parts", resume=True, stop_at=7, by=signal.SIGTERM)
    assert outcome == TrainingOutcome(7, 9, signal.SIGTERM)
    assert run(config, tmp_path / "parts", resume=True)[0] == TrainingOutcome(9, 9)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]


@pytest.mark.slow
def test_a_run_that_went_down_goes_back_to_its_last_checkpoint(tmp_path: Path) -> None:
    class Power(Exception):
        pass

    def fail(event: events.Event) -> None:
        if isinstance(event, Stepped) and event.step == 8:
            raise Power

    run(TINY, tmp_path / "whole")
    with pytest.raises(Power):
        train(TINY.replace({"save_every": 2}), tmp_path / "parts", listener=fail)
    assert len(losses(tmp_path / "parts")) in (7, 8)
    _, heard = run(TINY, tmp_path / "parts", resume=True)
    assert heard[0].step == 6 and losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_micro_batches_give_the_whole_batchs_gradients() -> None:
    """With a net that neither normalizes over the batch nor draws; and running statistics count each image once."""
    images, labels = torch.randn(7, 1, 8, 8), torch.arange(7) % 5

    def gradients(sizes: list[int]) -> tuple[list[torch.Tensor], float, torch.Tensor]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 6))
        head = fa.PartialFC(6, 5, center_optimizer=fa.CenterSGD(0.1))
        result = JointStep(net, head, "fp32", torch.amp.GradScaler("cpu", enabled=False))(
            list(images.split(sizes)), labels, 0
        )
        return [each.grad for each in net.parameters()], result.loss, head.weight.detach()

    whole, parts = gradients([7]), gradients([3, 2, 2])
    assert whole[1] == pytest.approx(parts[1], rel=1e-6)
    for a, b in zip([*whole[0], whole[2]], [*parts[0], parts[2]], strict=True):
        assert (a - b).norm() < 1e-5 * a.norm()

    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 6))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    JointStep(net, fa.PartialFC(6, 5), "fp32", scaler)(list(images.split([3, 4])), labels, 0)
    assert net[1].num_batches_tracked == 2
    expected = 0.9 * 0.1 * images[3:].flatten(1).mean(0) + 0.1 * images[:3].flatten(1).mean(0)
    assert torch.allclose(net[1].running_mean, expected, atol=1e-6)  # the last micro-batch comes first


def test_pixels_that_are_not_finite_and_too_many_are_bad_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", 3, 4, kinds=(("L", 16, 16, "png"),))
    broken, large = root / "person_001" / "00.tif", root / "person_002" / "00.png"
    pixels = np.full((16, 16), 0.5, dtype=np.float32)
    pixels[0, 0] = np.nan
    (root / "person_001" / "00.png").unlink()
    Image.fromarray(pixels).save(broken)
    Image.new("L", (16, 17)).save(large)
    config = TINY.replace({"data": str(root), "epochs": 1, "channels": 1, "max_pixels": 256, "batch_size": 12})
    _, heard = run(config, tmp_path / "run")
    noted = [event.text for event in heard if isinstance(event, Noted)]
    assert (
        f"{broken} cannot be decoded as an image: its pixels must be finite; the next image is taken instead" in noted
    )
    assert f"{large} must have at most max_pixels=256 pixels; got 16 × 17; the next image is taken instead" in noted
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.parametrize("bad", ["skip", "stop"])
def test_unreadable_images_and_empty_identities(tmp_path: Path, bad: str) -> None:
    root = write_folder(tmp_path / "faces", 4, 4)
    config = TINY.replace({"data": str(root), "bad_data": bad, "epochs": 1})
    broken = root / "person_001" / "01.png"
    broken.write_text("not an image")
    if bad == "stop":
        file = re.escape(str(broken))
        with pytest.raises(
            DataError, match=f"{file} cannot be read as an image.*; bad_data is stop, so this is an error$"
        ):
            run(config, tmp_path / "run")
    else:
        outcome, heard = run(config, tmp_path / "run")
        notes = [event.text for event in heard if isinstance(event, Noted)]
        assert outcome == TrainingOutcome(2, 2) and all(
            event.loss < 100 for event in heard if isinstance(event, Stepped)
        )
        assert notes == [f"{broken} cannot be read as an image: {NONE}; the next image is taken instead"]
    (root / "person_9").mkdir()
    if bad == "stop":
        with pytest.raises(
            DataError, match=r"person_9: an identity without images; bad_data is stop, so this is an error$"
        ):
            run(config, tmp_path / "run")
    else:
        _, heard = run(config, tmp_path / "other")
        assert f"{root / 'person_9'}: an identity without images; skipped" in [
            e.text for e in heard if isinstance(e, Noted)
        ]
    for path in root.rglob("*.[jp]*g"):
        path.write_text("")
    with pytest.raises(DataError, match=r"^16 images in a row cannot be read; the last: .*png cannot be read"):
        run(config.replace({"bad_data": "skip", "channels": 1, "workers": 1}), tmp_path / "third")


def test_records_are_trained_on_and_a_truncated_file_is_reported(tmp_path: Path) -> None:
    root = write_records(tmp_path, identities=4, samples=4, labels_each=2)
    (root / "train.rec").write_bytes((root / "train.rec").read_bytes()[:-2000])
    config = TINY.replace({"data": str(root), "epochs": 1, "image_size": None, "verify_data": str(root)})
    outcome, heard = run(config, tmp_path / "run")
    assert outcome.step == outcome.steps == 1
    notes = [event.text for event in heard if isinstance(event, Noted)]
    assert notes and all(re.search(r"train\.rec: record \d+ at byte \d+ cannot be read", note) for note in notes)
    assert next(event for event in heard if isinstance(event, Verified)).found.accuracy > 0
    assert load_backbone(tmp_path / "run")[1] == ImageSpec(32, 1)
    with pytest.raises(DataError, match=r"record \d+ at byte"):
        run(config.replace({"bad_data": "stop"}), tmp_path / "other")


def test_options_are_chosen_by_the_data_and_the_net(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "faces", 4, 5, (("RGB", 50, 70, "png"), ("L", 50, 50, "png")))
    config = TINY.replace({"data": os.path.relpath(root), "epochs": 1, "image_size": None})
    run(config, tmp_path / "run")
    saved = TrainConfig().replace(read_options(tmp_path / "run" / "config.toml"))
    assert saved == config.replace(
        {"data": str(root), "image_size": 50, "channels": 3, "embedding_dim": 128, "lr": 0.1, "scale": 16.0}
    )
    assert (tmp_path / "run" / "classes.txt").read_text().split() == [f"person_{i:03d}" for i in range(4)]


def test_what_cannot_be_verified_is_said_first(tmp_path: Path) -> None:
    write_folder(tmp_path / "few", 2, 2)
    with pytest.raises(OptionError, match="verify_data: "):
        run(TINY.replace({"verify_data": str(tmp_path / "few")}), tmp_path / "run")


@pytest.mark.slow
def test_verification_on_an_insightface_set_without_its_unreadable_images(tmp_path: Path) -> None:
    """The figures are those of the pairs of whose images both can be read, and ``verify`` gives the same."""
    images = [encoded(picture(100 + i // 2, i)) for i in range(48)]
    images[7] = b"no image"
    same = [i % 4 != 3 for i in range(24)]  # of pair 3 the second image is the bad one: a pair of two people
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, same)))
    images[6:8], same[3:4] = [], []
    (tmp_path / "rest.bin").write_bytes(pickle.dumps((images, same)))
    found = {}
    for name in ("lfw", "rest"):
        config = TINY.replace({"epochs": 1, "verify_data": str(tmp_path / f"{name}.bin"), "workers": 1})
        _, heard = run(config, tmp_path / name)
        (found[name],) = [event.found for event in heard if isinstance(event, Verified)]
        notes = [event.text for event in heard if isinstance(event, Noted)]
        bad = "verification: lfw.bin[7]: an image of 8 bytes cannot be read"
        assert len(notes) == (name == "lfw") and all(note.startswith(bad) for note in notes), notes
        assert all(note.endswith("; its pairs are left out") for note in notes)
    net, spec = load_backbone(tmp_path / "lfw")
    pairs = read_pair_set(str(tmp_path / "rest.bin"))
    embeddings = embed(net, torch.stack([pairs.read(i, spec) for i in range(46)]))
    right = verify_scores(pairs.pairs.same, pair_scores(embeddings, pairs.pairs), fars=[0.1])
    for each in found.values():
        assert each.num_pairs == (18, 5) and each.fold_accuracy.tolist() == right.fold_accuracy.tolist()
        assert each.tar[0.1] == right.tar[0.1] and len(each.tar) == 3


def test_an_unreadable_image_of_the_verification_is_named_once(tmp_path: Path) -> None:
    images = [encoded(picture(100 + i // 2, i)) for i in range(92)]
    same = [i % 2 == 0 for i in range(46)]
    for bad, said in (((6, 7, 8), 3), (range(6, 30), 21)):
        for i in bad:
            images[i] = b"no image"
        (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, same)))
        verifier = Verifier(read_pair_set(str(tmp_path / "lfw.bin")), batch_size=8, workers=0)
        checked, problems = verifier(torch.nn.Flatten(), ImageSpec(8, 1), torch.device("cpu"), "lfw", 0)
        named = [f"lfw.bin[{i}]: an image of 8 bytes cannot be read" for i in bad][:20]
        assert [problem.partition(" as an image")[0] for problem in problems[:20]] == named and len(problems) == said
        assert checked and checked.digest and sum(checked.found.num_pairs) == 46 - len({i // 2 for i in bad})
    assert problems[-1] == "4 more images cannot be read"


def test_a_verification_that_fails_does_not_end_the_training(tmp_path: Path) -> None:
    images = [encoded(picture(0, i)) for i in range(40)]
    for i in range(20):
        images[2 * i + 1] = b"no image"
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, [i % 2 == 0 for i in range(20)])))
    outcome, heard = run(TINY.replace({"epochs": 1, "verify_data": str(tmp_path / "lfw.bin")}), tmp_path / "run")
    assert outcome == TrainingOutcome(3, 3) and not any(isinstance(event, Verified) for event in heard)
    assert [e.text for e in heard if isinstance(e, Noted)][-1].startswith("verification: no figures, ")


def test_a_net_that_is_not_finite_is_reported(tmp_path: Path) -> None:
    run(TINY.replace({"epochs": 1}), tmp_path / "first")
    state = torch.load(tmp_path / "first" / "model.pt")
    state["projection.1.weight"].fill_(torch.nan)
    torch.save(state, tmp_path / "nan.pt")
    heard: list[events.Event] = []
    config = TINY.replace({"epochs": 1, "init": str(tmp_path / "nan.pt")})
    with pytest.raises(TrainingError, match="all 3 steps were skipped: no loss or gradient was finite"):
        train(config, tmp_path / "second", listener=heard.append)
    notes = [event.text for event in heard if isinstance(event, Noted)]
    assert notes[0] == "step 1: loss nan, the gradient is not finite: the net was left as it was"
    assert notes[-1] == "verification: no figures, the net's embeddings are not finite"


def test_a_trained_net_is_loaded_and_its_file_too(tmp_path: Path) -> None:
    run(TINY, tmp_path / "run")
    net, spec = load_backbone(tmp_path / "run", "cpu")
    assert spec == ImageSpec(16, 1) and not net.training and net(torch.zeros(1, *spec.shape)).shape == (1, 128)
    plain = build_backbone("small", 128, spec)
    plain.load_state_dict(torch.load(tmp_path / "run" / "model.pt"))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), net.state_dict().values(), strict=True))


def test_a_run_starts_from_weights_in_a_file(tmp_path: Path) -> None:
    run(TINY, tmp_path / "first")
    config = TINY.replace({"init": str(tmp_path / "first" / "model.pt"), "lr": 0.0, "epochs": 1})
    run(config, tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name and "num" not in name)
    for content in (b"no weights", b""):
        (tmp_path / "other.pt").write_bytes(content)
        with pytest.raises(OptionError, match=r"init: .*other\.pt cannot be read as a file of tensors: "):
            run(config.replace({"init": str(tmp_path / "other.pt")}), tmp_path / "third")
    with pytest.raises(
        OptionError,
        match=r"init: .*model\.pt has no weights of this net: projection\.1\.weight must be \(7, .*; it is \(128, ",
    ):
        run(config.replace({"embedding_dim": 7}), tmp_path / "third")


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing does not exist; make a run with"):
        load_backbone(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is not a folder; make a run with"):
        load_backbone(tmp_path / "file")
    with pytest.raises(RunError, match=r"is not a training run: it has no config\.toml"):
        load_backbone(tmp_path)
    TINY.save(tmp_path / "config.toml")
    with pytest.raises(RunError, match="must have image_size, channels and embedding_dim"):
        load_backbone(tmp_path)
    TINY.replace({"channels": 1, "embedding_dim": 8}).save(tmp_path / "config.toml")
    with pytest.raises(RunError, match="has no complete checkpoint yet"):
        load_backbone(tmp_path)
    (tmp_path / "config.toml").write_text("epoch = 3")
    with pytest.raises(RunError, match=r"config\.toml: no option is called epoch; did you mean epochs"):
        load_backbone(tmp_path)
    run(TINY, tmp_path / "run")
    text = (tmp_path / "run" / "config.toml").read_text().partition("\n")[2]  # without its checksum
    (tmp_path / "run" / "config.toml").write_text(text.replace("embedding_dim = 128", "embedding_dim = 64"))
    with pytest.raises(RunError, match=r"the checkpoint does not fit config\.toml"):
        load_backbone(tmp_path / "run")


def test_a_run_is_neither_overwritten_nor_mixed_up(tmp_path: Path) -> None:
    run(TINY, tmp_path, stop_at=2)
    with pytest.raises(RunError, match="holds a run already: add --resume to continue it"):
        run(TINY, tmp_path)
    with pytest.raises(RunError, match="cannot be written: "):
        run(TINY, tmp_path / "config.toml" / "run")
    with pytest.raises(RunError, match="a resumed run keeps its batch_size, 8; got 6"):
        run(TINY.replace({"batch_size": 6}), tmp_path, resume=True)
    with pytest.raises(RunError, match="a resumed run keeps its 6 identities; identities:5x4 has 5"):
        run(TINY.replace({"data": "identities:5x4"}), tmp_path, resume=True)
    outcome, heard = run(
        TINY.replace({"lr": 0.01, "epochs": 4, "schedule": "constant", "warm_up": 0.0}), tmp_path, resume=True
    )
    assert outcome == TrainingOutcome(12, 12) and {event.lr for event in heard if isinstance(event, Stepped)} == {0.01}


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for options, message in (
        (
            {"accumulation": 5},
            r"batch_size must be >= 10, .* the 1 × 5 parts \(ranks × micro-.* got 8 and 24",
        ),
        ({"device": "cuda:0"} if not torch.cuda.is_available() else {"device": "gpu"}, "device"),
        ({"device": "abacus"}, "device must be auto, cpu, cuda or cuda:N; got 'abacus'"),
        ({"backend": "cuda"}, "backend 'cuda'"),
        ({"backend": "triton", "margin": "InterTopK"}, "backend 'triton' does not have the turned negatives"),
        (
            {"label_smoothing": 0.1},
            "label_smoothing needs center_optimizer joint: .* got label_smoothing 0.1 with center_optimizer fused",
        ),
    ):
        with pytest.raises(OptionError, match=message):
            run(TINY.replace(options), tmp_path)
    with pytest.raises(DataError, match="must hold two identities or more; got 1"):
        run(TINY.replace({"data": "identities:1x9"}), tmp_path)
    with pytest.raises(OptionError, match=re.escape(f"data must be {formats.listed()}; got nothing")):
        run(TINY.replace({"data": ""}), tmp_path)


def test_tensorboard_is_written_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that has its interface: the package is not among the tests' requirements."""
    written: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed",))

    monkeypatch.setitem(sys.modules, "tensorboard", object())
    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(TINY.replace({"epochs": 1}), tmp_path)
    assert written[0] == (str(tmp_path / "tensorboard"), 1) and written[-1] == ("closed",)
    curve = [value for name, value, *_ in written[1:-1] if name == "train/loss"]
    assert curve == losses(tmp_path)
    names = {each[0] for each in written}
    assert {"train/target_angle", "train/head_share", "verification/accuracy", "verification/tar_at_far_0.01"} <= names


def test_the_command_takes_a_file_and_the_command_line_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.toml"
    file.write_text(
        'data = "identities:6x4"\nepochs = 7\nbatch_size = 8\nimage_size = 16\nworkers = 0\nmargin = "CosFace(0.2)"\n'
    )
    arguments = ["train", "--config", str(file), "--output", str(tmp_path / "run"), "--epochs", "2", "--no-flip"]
    assert run_command(arguments) == 0
    shown = capsys.readouterr().out
    assert (
        "24 images of 6 identities" in shown
        and re.search(r"epoch +2/2  loss \d", shown)
        and "verified  accuracy" in shown
    )
    saved = TrainConfig().replace(read_options(tmp_path / "run" / "config.toml"))
    assert (saved.epochs, saved.batch_size, saved.margin, saved.flip) == (2, 8, "CosFace(0.2)", False)
    assert run_command(arguments) == 2 and "holds a run already" in capsys.readouterr().err
    assert run_command(["train", "--output", str(tmp_path / "run"), "--resume"]) == 0  # nothing left to do
    assert run_command(["train", "--data", "nowhere", "--output", str(tmp_path / "x")]) == 2
    assert f"data must be {formats.listed()}" in capsys.readouterr().err
    assert run_command(["train", "--data", "identities", "--output", str(tmp_path / "x"), "--lr", "-1"]) == 2
    assert "lr must be >= 0; got -1.0" in capsys.readouterr().err
    file.write_text("epoch = 7\n")
    assert run_command([*arguments[:4], str(tmp_path / "x")]) == 2
    assert f"{file}: no option is called epoch; did you mean epochs?" in capsys.readouterr().err


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "faces", 2, 2)
    for module in ("PIL", "PIL.Image", "PIL.ImageOps"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r'pillow is not installed.*pip install "fused_arcface\[train\]"'):
        run(TINY.replace({"data": str(root)}), tmp_path / "run")
