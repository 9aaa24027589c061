import pytest
import torch

import fused_arcface as fa
from fused_arcface import checkpoint, cli, convert, safetensors
from fused_arcface.sharding import Sharding

D, CLASSES = 6, 37


def trained_head(**options) -> fa.PartialFC:
    recipe = fa.CenterSGD(0.1, momentum_dtype=torch.int8)
    head = fa.PartialFC(D, CLASSES, **{"center_optimizer": recipe, "seed": 3, "dtype": torch.bfloat16, **options})
    head(torch.randn(4, D), torch.arange(4)).backward()
    return head


def test_checkpoint_to_one_file_and_back(tmp_path):
    head = trained_head()
    checkpoint.save(tmp_path / "saved", head)
    file = convert.convert([tmp_path / "saved"], tmp_path / "full.safetensors")
    tensors, _ = safetensors.read(file)
    assert torch.equal(tensors["weight"], head.full_weight()) and tensors["weight"].shape == (CLASSES, D)
    convert.convert([file], tmp_path / "back")
    other = fa.PartialFC(
        D, CLASSES, seed=3, dtype=torch.bfloat16, center_optimizer=fa.CenterSGD(1, momentum_dtype=torch.int8)
    )
    checkpoint.load(tmp_path / "back", other)
    assert torch.equal(other.weight, head.weight) and other.step == 1
    assert other.center_optimizer.param_groups[0]["lr"] == 0.1
    for name, tensor in head.center_optimizer.state[head.weight].items():
        assert torch.equal(other.center_optimizer.state[other.weight][name], tensor)


def insightface_files(folder, world_size: int, weight: torch.Tensor) -> None:
    folder.mkdir()
    for rank in range(world_size):
        shard = Sharding(len(weight), world_size, rank)
        state = {
            "epoch": 3,
            "global_step": 100,
            "state_dict_backbone": {"layer": torch.ones(2)},
            "state_dict_softmax_fc": {
                "weight": weight[shard.class_start : shard.class_start + shard.num_local].clone()
            },
            "state_optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
            "state_lr_scheduler": {"last_epoch": 3},
        }
        torch.save(state, folder / f"checkpoint_gpu_{rank}.pt")


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_insightface_shards_of_any_world_size(tmp_path, world_size):
    weight = torch.randn(CLASSES, D)
    insightface_files(tmp_path / "theirs", world_size, weight)
    convert.convert([tmp_path / "theirs"], tmp_path / "ours", seed=5)
    head = fa.PartialFC(D, CLASSES, seed=5, center_optimizer=fa.CenterSGD(0.1))
    checkpoint.load(tmp_path / "ours", head)
    assert torch.equal(head.full_weight(), weight)
    assert head.center_optimizer.param_groups[0]["lr"] == 0.1


def test_incomplete_insightface_shards_are_refused(tmp_path):
    insightface_files(tmp_path / "theirs", 3, torch.randn(CLASSES, D))
    (tmp_path / "theirs" / "checkpoint_gpu_2.pt").unlink()
    torch.save({"state_dict_softmax_fc": {"weight": torch.zeros(20, D)}}, tmp_path / "theirs" / "checkpoint_gpu_1.pt")
    with pytest.raises(convert.ConvertError, match=r"the shards must split the classes evenly"):
        convert.read(tmp_path / "theirs")
    (tmp_path / "theirs" / "checkpoint_gpu_0.pt").unlink()
    with pytest.raises(convert.ConvertError, match=r"must have the shards of ranks 0 to 1; got those of \[1\]"):
        convert.read(tmp_path / "theirs")


def test_pytorch_metric_learning(tmp_path):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.ArcFaceLoss(CLASSES, D)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    convert.convert([tmp_path / "theirs.pt"], tmp_path / "ours.safetensors")
    tensors, _ = safetensors.read(tmp_path / "ours.safetensors")
    assert torch.equal(tensors["weight"], theirs.W.detach().T)


def test_grow_and_merge(tmp_path):
    head = trained_head()
    checkpoint.save(tmp_path / "one", head)
    other = torch.randn(5, D)
    torch.save({"weight": other}, tmp_path / "two.pt")
    convert.convert([tmp_path / "one"], tmp_path / "grown", num_classes=50)
    grown = fa.PartialFC(D, 50, seed=3, dtype=torch.bfloat16, center_optimizer=head_recipe())
    new = grown.full_weight()[CLASSES:]
    checkpoint.load(tmp_path / "grown", grown)
    assert torch.equal(grown.weight[:CLASSES], head.weight)
    assert torch.equal(grown.weight[CLASSES:], new)  # those of a new head of this seed
    momentum = grown.center_optimizer.state[grown.weight]["momentum_buffer"]
    assert momentum[:CLASSES].any() and not momentum[CLASSES:].any()
    convert.convert([tmp_path / "one", tmp_path / "two.pt"], tmp_path / "both.safetensors")
    tensors, _ = safetensors.read(tmp_path / "both.safetensors")
    assert set(tensors) == {"weight"}
    assert torch.equal(tensors["weight"], torch.cat([head.full_weight(), other.bfloat16()]))
    with pytest.raises(convert.ConvertError, match=r"classes must be >= 37"):
        convert.convert([tmp_path / "one"], tmp_path / "less", num_classes=10)
    with pytest.raises(convert.ConvertError, match="the same embedding dimension; got 6 and 7"):
        convert.merge([convert.read(tmp_path / "one"), fake(7)])


def head_recipe() -> fa.CenterSGD:
    return fa.CenterSGD(0.1, momentum_dtype=torch.int8)


def fake(dim: int) -> convert.Centres:
    return convert.Centres({"weight": convert.Rows(torch.float32, (3, dim), lambda: iter([torch.zeros(3, dim)]))})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", b"junk of another kind", "is not a safetensors file"),
        ("x.safetensors", b"", "is not a safetensors file"),
        ("x.pt", b"junk", "cannot be read as a file of tensors"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(convert.ConvertError, match=message):
        convert.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no"):
        convert.read(tmp_path / "nothing")


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    with safetensors.Writer(path, {"weight": (torch.float32, (4, 3))}) as writer:
        writer.write("weight", [torch.ones(4, 3)])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(convert.ConvertError, match="is truncated"):
        convert.read(path)
    short = safetensors.Writer(tmp_path / "y.safetensors", {"weight": (torch.float32, (4, 3))})
    with pytest.raises(ValueError, match="3 elements are missing"), short as writer:
        writer.write("weight", [torch.ones(3, 3)])
    assert not list(tmp_path.glob("y*"))


def test_command_line(tmp_path, capsys):
    checkpoint.save(tmp_path / "saved", trained_head())
    assert cli.run(["convert", str(tmp_path / "saved"), str(tmp_path / "full.safetensors"), "--classes", "40"]) == 0
    assert f"weight (40, {D}) bfloat16" in capsys.readouterr().out
    assert cli.run(["convert", str(tmp_path / "none"), str(tmp_path / "x.safetensors")]) == 1
    assert "there is no" in capsys.readouterr().err


def test_python_package_reads_what_is_written(tmp_path):
    theirs = pytest.importorskip("safetensors.torch")
    head = trained_head()
    checkpoint.save(tmp_path / "saved", head)
    file = convert.convert([tmp_path / "saved"], tmp_path / "full.safetensors")
    assert torch.equal(theirs.load_file(file)["weight"], head.full_weight())
