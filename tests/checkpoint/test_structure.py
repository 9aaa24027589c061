"""Checkpoints that strangers made: reading one runs no code, in format 2 and in the pickled format 1."""

import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from support import distributed_helpers
from support.checkpointed_training import FORMAT_1
from torch import nn
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import fused_arcface as fa
from fused_arcface import checkpoint
from fused_arcface.app import cli
from fused_arcface.checkpoint import convert
from fused_arcface.checkpoint.structure import split, to_json


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def load_format_1() -> dict:
    torch.manual_seed(0)
    head = fa.PartialFC(4, 7, seed=4, center_optimizer=fa.CenterSGD(9.0))
    net = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=9.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    values = checkpoint.load(FORMAT_1, head, net=net, optimizer=optimizer, scheduler=scheduler)
    momentum = head.center_optimizer.state[head.weight]["momentum_buffer"]
    rows = [None] * head.ranks.world_size
    if head.ranks.group is None:
        rows = [momentum.tolist()]
    else:
        torch.distributed.all_gather_object(rows, momentum.tolist())
    expected = {
        "weight": head.full_weight().tolist(),
        "momentum": [each for part in rows for each in part],
        "step": head.step,
        "lr": optimizer.param_groups[0]["lr"],
        "net.weight": net.weight.tolist(),
        "net.bias": net.bias.tolist(),
        "optimizer": [optimizer.state[each]["momentum_buffer"].tolist() for each in net.parameters()],
    }
    assert values == {"note": {"tuple": (1, None), 5: math.inf, "bytes": b"\x00\xff", "text": "许"}}
    assert scheduler.last_epoch == 3
    return expected


@pytest.mark.distributed
def test_format_1_is_read_on_any_number_of_ranks():
    expected = json.loads((FORMAT_1 / "expected.json").read_text())
    assert load_format_1() == expected
    for found in distributed_helpers.run_ranks(3, load_format_1):
        assert found == expected
    assert checkpoint.load_state(FORMAT_1, "net")["bias"].tolist() == expected["net.bias"]


def save_format_1(root: Path, head: fa.PartialFC, **others) -> Path:
    """Write as the package did before format 2."""
    state: dict = {}
    for name, value in {"head": checkpoint.head_state(head), **others}.items():
        state[name] = split(value.state_dict() if hasattr(value, "state_dict") else value, name, state)
    directory = root / "step_0000000000"
    directory.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp_save(state, storage_writer=FileSystemWriter(directory), planner=planner, no_dist=True)
    options = {"num_classes": head.num_classes, "embedding_dim": head.weight.shape[1], "seed": head.seed}
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    manifest = {"format": "fused_arcface.checkpoint", "version": 1, "head": options, "files": files}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_format_1_holds_what_torch_saves(tmp_path):
    """Every dtype, a convolution in channels-last order, an empty tensor and the values that pickles name functions
    for."""
    dtypes = [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool]
    tensors = {str(dtype): (torch.randn(3, 2) * 3).to(dtype) for dtype in [*dtypes, torch.complex64]}
    tensors |= {"conv": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "empty": torch.zeros(0, 2)}
    tensors |= {"scalar": torch.tensor(2.5), "part": torch.arange(12.0).reshape(3, 4)[:, 1]}
    plain = {"set": {1, 2}, "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "complex": 1 + 2j, "big": 2**80}
    plain |= {"frozen": frozenset({3}), "counter": Counter(a=2), "device": torch.device("cuda:1"), "bytes": b"\x00\xff"}
    save_format_1(tmp_path, fa.PartialFC(4, 7), tensors=tensors, plain=plain, ordered=OrderedDict(a=1))
    found = checkpoint.load_state(tmp_path, "tensors")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert checkpoint.load_state(tmp_path, "plain") == plain
    assert checkpoint.load_state(tmp_path, "ordered") == {"a": 1}


def test_objects_in_format_1_need_trust(tmp_path):
    head = fa.PartialFC(4, 7)
    save_format_1(tmp_path, head, note=Fraction(1, 3), bomb=Bomb(tmp_path / "ran"), net=nn.Linear(2, 2))
    assert checkpoint.load_state(tmp_path, "net")["weight"].shape == (2, 2)  # it needs none of the others
    with pytest.raises(checkpoint.CheckpointError, match=r"note holds fractions.Fraction, which only .*--trust"):
        checkpoint.load_state(tmp_path, "note")
    with pytest.raises(checkpoint.CheckpointError, match=r"--trust, or trust=True"):
        checkpoint.load(tmp_path, head)
    assert not (tmp_path / "ran").exists()
    values = checkpoint.load(tmp_path, head, trust=True)
    assert values["note"] == Fraction(1, 3) and (tmp_path / "ran").exists()
    assert checkpoint.load_state(tmp_path, "note", trust=True) == Fraction(1, 3)


def test_a_value_of_format_1_that_repeats_itself_is_refused(tmp_path, monkeypatch):
    """The value takes some hundred bytes, and a walk through it never ends."""
    note: list = []
    for _ in range(60):
        note = [note, note]
    own = split
    monkeypatch.setitem(globals(), "split", lambda value, *others: value if value is note else own(value, *others))
    save_format_1(tmp_path, fa.PartialFC(4, 7), note=note)
    with pytest.raises(checkpoint.CheckpointError, match="note repeats a value without end"):
        checkpoint.load_state(tmp_path, "note")


@pytest.mark.slow
def test_a_name_of_a_tensor_in_format_1_is_a_text(tmp_path, monkeypatch):
    """Python would hash all levels of another key, and end by a signal."""
    own, save = split, torch.save
    note = b"\x80\x02cfused_arcface.checkpoint.structure\n_Stored\n)\x81}X\x03\0\0\0key)" + b"\x85" * 200_000 + b"sb."
    monkeypatch.setitem(globals(), "split", lambda value, *others: value if value == "note" else own(value, *others))

    def saved(value, file, **options):
        plain = io.BytesIO()
        save(value, plain, **options)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w") as target:
            for entry in source.infolist():
                is_note = value == "note" and entry.filename.endswith("data.pkl")
                target.writestr(entry.filename, note if is_note else source.read(entry))

    monkeypatch.setattr(torch, "save", saved)
    save_format_1(tmp_path, fa.PartialFC(4, 7), note="note")
    monkeypatch.undo()
    command = "import sys; from fused_arcface import checkpoint; checkpoint.load_state(sys.argv[1], 'note')"
    ended = subprocess.run([sys.executable, "-c", command, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "note has something else in the place of a tensor's name" in ended.stderr and ended.returncode == 1


def test_a_damaged_byte_in_format_1_is_found(tmp_path):
    """torch's own reader does not compare checksums."""
    directory = save_format_1(tmp_path, fa.PartialFC(4, 7), net=nn.Linear(2, 2))
    data = bytearray((directory / "__0_0.distcp").read_bytes())
    bias = checkpoint.load_state(tmp_path, "net")["bias"].numpy().tobytes()
    data[data.index(bias)] ^= 1
    (directory / "__0_0.distcp").write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="Bad CRC-32"):
        checkpoint.load_state(tmp_path, "net")


def test_centers_in_format_1_are_converted_with_trust(tmp_path, capsys):
    head = fa.PartialFC(4, 7, center_optimizer=fa.CenterSGD(0.5))
    head.center_optimizer.param_groups[0]["lr"] = np.float64(0.25)  # an object of NumPy's to a pickle
    save_format_1(tmp_path / "old", head)
    command = ["convert", str(tmp_path / "old"), str(tmp_path / "new.safetensors")]
    assert cli.run(command) == 1
    assert "which only running its code can bring back. If you trust whoever made it" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()
    assert cli.run([*command, "--trust"]) == 0
    found = convert.read(tmp_path / "new.safetensors")
    assert torch.equal(torch.cat(list(found.tensors["weight"].pieces())), head.full_weight())
    assert found.values["optimizer"]["lr"] == 0.25


@pytest.mark.slow
def test_a_run_in_format_1_is_resumed_with_trust(tmp_path, capsys):
    pytest.importorskip("PIL")
    run, root = str(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    data = ["--data", "identities:4x4", "--batch-size", "8", "--image-size", "16", "--workers", "0", "--device", "cpu"]
    assert cli.run(["train", *data, "--epochs", "1", "--output", run]) == 0
    saved = checkpoint.find(root)
    head = fa.PartialFC(saved.head["embedding_dim"], 4, seed=saved.head["seed"], center_optimizer=fa.CenterSGD(0.1))
    checkpoint.load(root, head)
    others = {name: checkpoint.load_state(root, name) for name in saved.names - {"head"}}
    shutil.rmtree(root)
    save_format_1(root, head, **others, note=Bomb(tmp_path / "ran"))
    capsys.readouterr()
    assert cli.run(["train", "--resume", "--epochs", "2", "--output", run]) == 1
    assert (
        "If you trust whoever made it, say so: --trust" in capsys.readouterr().err and not (tmp_path / "ran").exists()
    )
    assert cli.run(["train", "--resume", "--epochs", "2", "--output", run, "--trust"]) == 0
    assert (tmp_path / "ran").exists() and "4 steps are done" in capsys.readouterr().out


def test_a_hostile_table_of_format_1_runs_nothing(tmp_path):
    directory = save_format_1(tmp_path, fa.PartialFC(4, 7))
    table = directory / ".metadata"
    whole = table.read_bytes()
    hostile = {
        "a call": pickle.dumps(Bomb(tmp_path / "ran")),
        "a call by protocol 0": pickle.dumps(Bomb(tmp_path / "ran"), 0),
        "attributes of a class": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x01aK\x01s\x86b.",
        "a huge place in the memo": b"\x80\x04Nr\xff\xff\xff\xff.",
        "a huge buffer": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
        "no pickle": b"{}",
        "empty": b"",
        "cut short": whole[:-40],
    }
    for name, data in hostile.items():
        table.write_bytes(data)
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["files"][".metadata"] = len(data)
        (directory / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.find(tmp_path)
        assert not (tmp_path / "ran").exists(), name


def test_a_bomb_of_zip_is_not_unpacked(tmp_path):
    directory = save_format_1(tmp_path, fa.PartialFC(4, 7), net=nn.Linear(2, 2))
    data = directory / "__0_0.distcp"
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("data.pkl", "byteorder"):
            archive.writestr(f"archive/{name}", bytes(1_000_000))
    bomb = (tmp_path / "bomb").read_bytes()
    data.write_bytes((bomb + bytes(data.stat().st_size))[: data.stat().st_size])
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load_state(tmp_path, "net")


def test_values_come_back_as_they_were(tmp_path):
    """Format 2 has JSON, in which tuples, numbers as keys, infinities and bytes need a form of their own."""
    values = {
        "plain": [None, True, 1, 2**70, -0.1, "许\udcff", {"a": {}}, []],
        "pairs": {1: (2, (3.5,)), (4, "x"): b"\x00\xff", "$tuple": [1], None: frozenset({1})},
        "floats": [math.inf, -math.inf, 1 + 2j],
        "counter": Counter({3: 2}),
        "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cuda:1")],
        "random": np.random.RandomState(3).get_state(),
        "number": np.float64(0.1),
        "generator": torch.Generator().get_state(),
    }
    head = fa.PartialFC(4, 7)
    directory = checkpoint.save(tmp_path, head, nan=math.nan, tensor={3: (torch.arange(3),)}, **values)
    found = checkpoint.load(tmp_path, head)
    assert math.isnan(found.pop("nan"))
    assert checkpoint.load_state(tmp_path, "tensor")[3][0].tolist() == [0, 1, 2]
    assert torch.equal(checkpoint.load_state(tmp_path, "generator"), values["generator"])
    random = checkpoint.load_state(tmp_path, "random")
    assert random[0] == "MT19937" and np.array_equal(random[1], values["random"][1]) and random[1].dtype == np.uint32
    assert random[2:] == values["random"][2:]
    for name in ("plain", "pairs", "floats", "counter", "torch", "number"):
        assert found[name] == values[name] and type(found[name]) is type(values[name]), name
    json.loads((directory / ".metadata").read_bytes())


def test_values_that_would_need_code_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"note.x\[0\] must be made of tensors, .*; got fractions.Fraction"):
        checkpoint.save(tmp_path, fa.PartialFC(4, 7), note={"x": [Fraction(1, 3)]})
    assert list(tmp_path.iterdir()) == []


def refused_on_every_rank(root: str) -> str:
    try:
        checkpoint.save(root, fa.PartialFC(4, 7), note=Fraction(1, 3))
    except TypeError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_refused_values_are_an_error_on_every_rank(tmp_path):
    assert all(
        "got fractions.Fraction" in each
        for each in distributed_helpers.run_ranks(2, refused_on_every_rank, str(tmp_path))
    )


def parts_of(table: dict, *rows: tuple[int, int]) -> None:
    """Give the class centers parts of these first rows and numbers of rows, in bytes of their own."""
    weight = table["tensors"]["head.weight"]
    (part,) = weight["parts"]
    weight["parts"] = [
        {**part, "offsets": [first, 0], "sizes": [count, 4], "start": part["start"] + 16 * sum(n for _, n in rows[:at])}
        for at, (first, count) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table["tensors"]["head.weight"]["parts"][0].update(start=-64), "sizes must be integers >= 0"),
        (lambda table: table["tensors"]["head.weight"]["parts"][0].update(start=1 << 40), "nothing can lie in bytes"),
        (lambda table: table["tensors"]["head.weight"]["parts"][0].update(file="../../x"), "nothing can lie in bytes"),
        (lambda table: table["tensors"]["head.weight"].update(size=[1 << 40, 4]), "do not make up its size"),
        (lambda table: parts_of(table, (0, 5), (2, 2)), "do not make up its size"),  # rows 5 and 6 would be any memory
        (lambda table: parts_of(table, (0, 3), (4, 4)), "lies outside"),
        (lambda table: parts_of(table, (0, 7), (0, 0)), "two parts of head.weight begin at"),
        (lambda table: table["tensors"]["head.weight"].update(dtype="Tensor"), "Tensor"),
        (lambda table: table["tensors"].update(more=table["tensors"]["head.weight"]), "nothing can lie in bytes"),
        (lambda table: table["values"].update(head={"$os": "x"}), "[$]os is not a known kind of value"),
        (lambda table: table["values"]["head"].update(step=-1), "head has no step"),
        (lambda table: table["values"]["head"].update(step="0"), "head has no step"),
        (lambda table: table["values"].update(head={"$array": ["|O", [1], ""]}), "not an array of numbers"),
        (lambda table: table["values"].update(head={"$tuple": 5}), "head cannot be read"),
        (lambda table: table.pop("values"), "values"),
    ],
)
def test_hostile_tables_of_format_2_are_one_named_error(tmp_path, change, message):
    """Their checksums fit: a stranger can compute them too."""
    from fused_arcface.checkpoint import manifest as manifests

    head = fa.PartialFC(4, 7)
    directory = checkpoint.save(tmp_path, head)
    table = json.loads((directory / ".metadata").read_bytes())
    change(table)
    text = json.dumps(table).encode()
    (directory / ".metadata").write_bytes(text)
    manifest = json.loads((directory / "manifest.json").read_bytes())
    del manifest["crc32"]
    manifest["files"][".metadata"] = {"size": len(text), "crc32": [manifests.zlib.crc32(text)]}
    (directory / "manifest.json").write_text(json.dumps({**manifest, "crc32": manifests.crc32(manifest)}))
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load(tmp_path, head)


def test_json_names_the_place_of_a_foreign_object():
    with pytest.raises(TypeError, match=r"x\.a must be made of"):
        to_json({"a": object()}, "x")
