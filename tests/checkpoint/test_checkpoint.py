import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import distributed_helpers
from support.checkpointed_training import CLASSES, D, Run
from torch import nn

import fused_arcface as fa
from fused_arcface import checkpoint


def resume_and_train(root: str, options: dict, ordinary: bool, steps: int) -> tuple[list[float], dict]:
    run = Run(options, ordinary)
    values = checkpoint.load(root, run.head, **run.others()) if checkpoint.latest(root) else {}
    losses = run.train(steps)
    checkpoint.save(root, run.head, **run.others(), note={"losses": losses})
    return losses, values


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ordinary", "options", "tolerance"),
    [
        (False, {"dtype": torch.float64, "sample_rate": 0.4}, 1e-6),
        (True, {"dtype": torch.float64}, 1e-6),
        pytest.param(False, {"dtype": torch.float64}, 1e-6, marks=pytest.mark.full),
        pytest.param(False, {"dtype": torch.float32}, 1e-4, marks=pytest.mark.full),
        pytest.param(False, {"dtype": torch.float32, "sample_rate": 0.4}, 1e-4, marks=pytest.mark.full),
        pytest.param(True, {"dtype": torch.float64, "sample_rate": 0.4}, 1e-6, marks=pytest.mark.full),
    ],
)
def test_resume_on_another_number_of_ranks(tmp_path, ordinary, options, tolerance):
    expected = Run(options, ordinary).train(30)
    losses = []
    for world_size in (4, 2, 3):
        results = distributed_helpers.run_ranks(world_size, resume_and_train, str(tmp_path), options, ordinary, 10)
        assert all(result == results[0] for result in results)
        assert results[0][1] == ({"note": {"losses": losses[-10:]}} if losses else {})
        losses += results[0][0]
    assert losses == pytest.approx(expected, abs=tolerance)


def saved_head(root: Path, **options) -> fa.PartialFC:
    head = fa.PartialFC(D, CLASSES, **{"center_optimizer": fa.CenterSGD(0.1, momentum_dtype=torch.int8), **options})
    head(torch.randn(4, D), torch.arange(4)).backward()
    checkpoint.save(root, head)
    return head


def test_every_storage_comes_back_to_the_bit(tmp_path):
    head = saved_head(tmp_path, dtype=torch.bfloat16)
    head.center_optimizer.param_groups[0]["lr"] = 0.025
    checkpoint.save(tmp_path, head, epoch=7)
    other = fa.PartialFC(
        D, CLASSES, dtype=torch.bfloat16, center_optimizer=fa.CenterSGD(9, momentum_dtype=torch.int8), sample_rate=0.5
    )
    assert checkpoint.load(tmp_path, other) == {"epoch": 7}
    assert torch.equal(other.weight, head.weight) and other.step == head.step == 1
    states = [each.center_optimizer.state[each.weight] for each in (head, other)]
    assert states[0].keys() == states[1].keys() == {"momentum_buffer", "momentum_scale"}
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]) and states[0][name].dtype == states[1][name].dtype
    assert other.center_optimizer.param_groups[0]["lr"] == 0.025


def test_the_newest_are_kept(tmp_path):
    head = saved_head(tmp_path)
    names = [checkpoint.save(tmp_path, head, keep=2).name for _ in range(3)]
    assert checkpoint.latest(tmp_path).name == names[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *sorted(names[1:])]
    (tmp_path / ".partial-step_9").mkdir()
    checkpoint.save(tmp_path, head)
    assert not (tmp_path / ".partial-step_9").exists()


def damage(root: Path, kind: str) -> None:
    newest = checkpoint.latest(root)
    data = next(newest.glob("*.distcp"))
    if kind == "truncated":
        data.write_bytes(data.read_bytes()[:-1])
    elif kind == "a file less":
        data.unlink()
    elif kind == "foreign":
        (newest / "manifest.json").write_text(json.dumps({"format": "other"}))
    elif kind == "no manifest":
        (newest / "manifest.json").unlink()
    elif kind == "later":
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"is truncated: __0_0.distcp must have \d+ bytes; it is \d+ bytes long"),
        ("a file less", r"is truncated: __0_0.distcp must have \d+ bytes; it is missing"),
        ("foreign", "is a checkpoint of another program"),
        ("no manifest", "manifest.json cannot be read"),
        ("later", "saved by a later version of this package: format 99"),
    ],
)
def test_damaged_checkpoints_are_refused_and_nothing_is_loaded(tmp_path, kind, message):
    saved_head(tmp_path)
    damage(tmp_path, kind)
    head = fa.PartialFC(D, CLASSES, center_optimizer=fa.CenterSGD(0.1, momentum_dtype=torch.int8))
    before = head.full_weight()
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load(tmp_path, head)
    assert torch.equal(head.full_weight(), before) and head.step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": CLASSES + 1}, f"num_classes was {CLASSES} when saved; this head's is {CLASSES + 1}"),
        ({"embedding_dim": D + 1}, f"embedding_dim was {D} when saved"),
        ({"seed": 1}, "seed was 0 when saved; this head's is 1"),
        ({"dtype": torch.float64}, r"momentum_buffer was .* torch.int8 when saved; this head's is .* torch.float64"),
        ({"center_optimizer": None}, r"head.momentum_buffer was .*; this head's is none"),
    ],
)
def test_checkpoints_of_another_head_are_refused(tmp_path, options, message):
    saved_head(tmp_path)
    options = {"embedding_dim": D, "num_classes": CLASSES, "center_optimizer": fa.CenterSGD(0.1), **options}
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load(tmp_path, fa.PartialFC(**options))


def test_nothing_there(tmp_path):
    head = saved_head(tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.load(tmp_path / "empty", head)
    with pytest.raises(checkpoint.CheckpointError, match="has no backbone"):
        checkpoint.load(tmp_path / "full", head, backbone=nn.Linear(1, 1))
    (tmp_path / "theirs").mkdir()
    shutil.copy(next((tmp_path / "full").glob("step_*/.metadata")), tmp_path / "theirs")
    with pytest.raises(checkpoint.CheckpointError, match="is a checkpoint of another program"):
        checkpoint.load(tmp_path / "theirs", head)


# What torchrun starts: trains to step 12 with a save every 3 steps, and dies once, in the way the last argument names.
# In a function, so that nothing holds the process group when it is destroyed: gloo's threads would otherwise outlive it
# and abort now and then while the interpreter ends (torch 2.13: they drop a collective of the backward pass, which
# needs the interpreter).
_WORKER = """
import os, signal, sys
import torch, torch.distributed as dist
from support.checkpointed_training import Run
from fused_arcface import checkpoint
from fused_arcface.checkpoint.storage import Writer

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def main(root, log, fault):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    run = Run({"dtype": torch.float64, "sample_rate": 0.4}, False)
    if checkpoint.latest(root):
        checkpoint.load(root, run.head, **run.others())
    while run.head.step < 12:
        if first and run.ranks.rank == 1 and run.head.step == 7 and fault == "step":
            run.head.register_forward_hook(die)
        (loss,) = run.train(1)
        if run.ranks.rank == 0:
            with open(log, "a") as file:
                print(run.head.step, loss, file=file)
        if run.head.step % 3 == 0:
            if first and run.ranks.rank == 1 and run.head.step == 6 and fault == "save":
                Writer.write_data = die
            checkpoint.save(root, run.head, **run.others())

torch.set_num_threads(1)
dist.init_process_group("gloo")
main(*sys.argv[1:])
dist.destroy_process_group()
"""


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is POSIX")
@pytest.mark.parametrize("fault", [pytest.param("step", marks=pytest.mark.full), "save"])
def test_a_rank_killed_is_restarted_from_the_last_checkpoint(tmp_path, fault):
    """kill -9 of rank 1 in a step, or in a save: torchrun starts both anew and the losses are those of a run
    without."""
    (tmp_path / "worker.py").write_text(_WORKER)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[1], Path(fa.__file__).parents[1]))),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # torch 2.13 otherwise hands the addresses of the first start to the ranks of the second: nobody is there.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    log, root = tmp_path / "log", tmp_path / "checkpoints"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["--monitor-interval=0.1", str(tmp_path / "worker.py"), str(root), str(log), fault]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [line.split() for line in log.read_text().splitlines()]
    steps = [int(step) for step, _ in seen]
    # Killed in step 8, or in the save after step 6: the run goes on after the last complete save.
    assert steps == ([*range(1, 8), *range(7, 13)] if fault == "step" else [*range(1, 7), *range(4, 13)])
    expected = Run({"dtype": torch.float64, "sample_rate": 0.4}, False).train(12)
    for step, loss in seen:
        assert float(loss) == pytest.approx(expected[int(step) - 1], abs=1e-9)
    assert checkpoint.latest(root).name == "step_0000000012"
