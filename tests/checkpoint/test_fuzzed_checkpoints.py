"""Changed bytes in each file of a checkpoint, of both formats: data or the one error, nothing else."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.checkpoint_loaders import ERROR, load_file
from support.checkpointed_training import FORMAT_1
from torch import nn

import fused_arcface as fa
from fused_arcface import checkpoint


def mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(changed) or 1)
        match draw.randrange(5):
            case 0:
                changed[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del changed[place : place + draw.randrange(1, 30)]
            case 2:
                changed[place:place] = changed[: draw.randrange(1, 30)]
            case 3:
                changed[place : place + 4] = draw.choice([b"\xff\xff\xff\xff", bytes(4), b"9999", b"-1 0"])
            case 4:
                changed[place : place + 1] = bytes([changed[place] ^ 1 << draw.randrange(8)]) if changed else b""
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [40, pytest.param(2_500, marks=pytest.mark.full)])  # of each of some four files
@pytest.mark.parametrize("version", [1, 2])
def test_mutations_are_data_or_the_one_error(tmp_path, version, count):
    directory = FORMAT_1 / "step_0000000003"
    if version == 2:
        head, net = fa.PartialFC(4, 7, center_optimizer=fa.CenterSGD(0.1)), nn.Linear(3, 4)
        optimizer = torch.optim.AdamW(net.parameters())
        directory = checkpoint.save(tmp_path / "root", head, net=net, optimizer=optimizer, note={1: (2.5, b"x", {3})})
    draw, seen = random.Random(version), Counter()
    for path in sorted(directory.iterdir()):
        whole = path.read_bytes()
        slowest = 0.0
        for _ in range(count):
            start = time.process_time()
            try:
                load_file(directory, path.name, mutated(whole, draw), tmp_path / "work")
                seen[path.name, "data"] += 1
            except ERROR:
                seen[path.name, "error"] += 1
            slowest = max(slowest, time.process_time() - start)
        assert slowest < 20  # of the processor
        assert seen[path.name, "data"] + seen[path.name, "error"] == count
    assert sum(number for (_, outcome), number in seen.items() if outcome == "error") > count


@pytest.mark.parametrize("name", [".metadata", "manifest.json"])
@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b"\x80\x04" + b"]\x94a" * 9])
@pytest.mark.parametrize("version", [1, 2])
def test_deep_and_long_texts(tmp_path, name, text, version):
    directory: Path = FORMAT_1 / "step_0000000003"
    if version == 2:
        directory = checkpoint.save(tmp_path / "root", fa.PartialFC(4, 7))
    with pytest.raises(ERROR):
        load_file(directory, name, text, tmp_path / "work")


def test_a_manifest_with_a_name_that_no_file_has(tmp_path):
    directory = checkpoint.save(tmp_path / "root", fa.PartialFC(4, 7))
    text = (directory / "manifest.json").read_bytes()
    with pytest.raises(ERROR, match=r"manifest\.json cannot be read: .*name too long"):
        load_file(directory, "manifest.json", text.replace(b"__0_0", b"9" * 400), tmp_path / "work")
