import pytest
import torch
from support.net_files import load_weights

import fused_arcface as fa
from fused_arcface import checkpoint
from fused_arcface.app import cli
from fused_arcface.app.nets.small import SmallNet
from fused_arcface.checkpoint import convert, safetensors
from fused_arcface.checkpoint.centers import Rows
from fused_arcface.parallel.sharding import Sharding

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


def fake(dim: int) -> convert.Centers:
    return convert.Centers({"weight": Rows(torch.float32, (3, dim), lambda: iter([torch.zeros(3, dim)]))})


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
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert.read(tmp_path / "nothing")


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.write(path, {"weight": Rows.of(torch.ones(4, 3))})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(convert.ConvertError, match="is truncated"):
        convert.read(path)
    short = Rows(torch.float32, (4, 3), lambda: iter([torch.ones(3, 3)]))
    with pytest.raises(ValueError, match="3 elements are missing"):
        safetensors.write(tmp_path / "y.safetensors", {"weight": short})
    assert list(tmp_path.iterdir()) == [path]


def test_command_line(tmp_path, capsys):
    checkpoint.save(tmp_path / "saved", trained_head())
    assert cli.run(["convert", str(tmp_path / "saved"), str(tmp_path / "full.safetensors"), "--classes", "40"]) == 0
    assert f"weight (40, {D}) bfloat16" in capsys.readouterr().out
    assert cli.run(["convert", str(tmp_path / "none"), str(tmp_path / "x.safetensors")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_python_package_reads_what_is_written(tmp_path):
    theirs = pytest.importorskip("safetensors.torch")
    head = trained_head()
    checkpoint.save(tmp_path / "saved", head)
    file = convert.convert([tmp_path / "saved"], tmp_path / "full.safetensors")
    assert torch.equal(theirs.load_file(file)["weight"], head.full_weight())


def test_the_format_from_before_torch_1_6(tmp_path):
    weight = torch.randn(5, D)
    torch.save({"weight": weight}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(rows_of(tmp_path / "old.pt"), weight)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.pth"])
def test_git_lfs_pointers_are_named(tmp_path, name):
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 132\n")
    with pytest.raises(convert.ConvertError, match=r"x\.\w+ is a Git LFS pointer.*git lfs pull"):
        convert.read(tmp_path / name)
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        load_weights(SmallNet(8), tmp_path / name)


def test_a_name_that_is_no_utf8(tmp_path):
    weight = torch.randn(5, D)
    torch.save({"weight": weight}, tmp_path / "caf\udce9.pt")
    assert torch.equal(rows_of(tmp_path / "caf\udce9.pt"), weight)


def test_a_file_whose_name_is_no_utf8(tmp_path, capsys):
    source, target = tmp_path / "a.safetensors", tmp_path / "caf\udce9.safetensors"
    weight = torch.arange(12.0).reshape(3, 4)
    safetensors.write(source, {"weight": Rows.of(weight)})
    assert cli.run(["convert", str(source), str(target)]) == 0
    assert "weight (3, 4) float32" in capsys.readouterr().out
    assert torch.equal(safetensors.read(target)[0]["weight"], weight)


def test_objects_other_than_tensors_are_not_loaded(tmp_path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "whole.pt")
    with pytest.raises(convert.ConvertError, match=r"holds other objects than tensors.*save the state_dict\(\)"):
        convert.read(tmp_path / "whole.pt")


def rows_of(source, name: str = "weight", **options) -> torch.Tensor:
    return torch.cat(list(convert.read(source, **options).tensors[name].pieces()))


@pytest.mark.parametrize("destination", ["ours.safetensors", "ours"])
def test_sub_centers_of_pytorch_metric_learning(tmp_path, destination):
    """A head with the converted centers has the same nearest center of each class as theirs."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.SubCenterArcFaceLoss(num_classes=40, embedding_size=D, sub_centers=3)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    written = convert.convert([tmp_path / "theirs.pt"], tmp_path / destination, sub_centers=3, num_classes=42)
    found = convert.read(written)
    assert (found.num_classes, found.sub_centers) == (42, 3) and found.tensors["weight"].shape == (126, D)
    convert.convert([written], tmp_path / "again")
    head = fa.PartialFC(D, 42, sub_centers=3, scale=1.0)
    new = head.full_weight()[120:]
    checkpoint.load(tmp_path / "again", head)
    embeddings = torch.randn(7, D)
    assert torch.allclose(head.logits(embeddings)[:, :40], theirs.get_cosine(embeddings), atol=1e-6)
    assert torch.equal(head.full_weight()[120:], new)  # of a new head of this seed
    with pytest.raises(convert.ConvertError, match="has sub_centers=3; got 2"):
        convert.read(written, sub_centers=2)
    with pytest.raises(convert.ConvertError, match="must have sub_centers=7 rows of each class; it has 120"):
        convert.read(tmp_path / "theirs.pt", sub_centers=7)
    with pytest.raises(convert.ConvertError, match="the same sub_centers; got 3 and 1"):
        convert.merge([found, convert.read(tmp_path / "theirs.pt")])


def shards(folder, name: str, states: list, momentum: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for rank, state in enumerate(states):
        torch.save(state, folder / name.format(rank))
        if momentum is not None:
            torch.save(torch.ones(1, D), folder / momentum.format(rank))


def test_what_insightface_wrote_over_the_years(tmp_path):
    """The files of its partial_fc.py of 2021 (bare tensors, momentum beside them) and of 2022 (state_dict of the
    module, with and without sampling)."""
    weight = torch.randn(7, D)
    parts = [weight[:3], weight[3:5], weight[5:]]
    tensors = [part.clone() for part in parts]
    shards(tmp_path / "2021", "rank_{}_softmax_weight.pt", tensors, "rank_{}_softmax_weight_mom.pt")
    shards(tmp_path / "older", "rank:{}_softmax_weight.pt", tensors)
    shards(tmp_path / "2022", "softmax_fc_gpu_{}.pt", [{"weight": part.clone()} for part in parts])
    empty = torch.empty(0, 0)
    sampled = [
        {"weight": part.clone(), "weight_mom": torch.ones(len(part), D), "weight_activated": empty} for part in parts
    ]
    shards(tmp_path / "sampled", "softmax_fc_gpu_{}.pt", sampled)
    shards(tmp_path / "all", "softmax_fc_gpu_{}.pt", [{"weight_activated": part.clone()} for part in parts])
    for name, notes in (("2021", 1), ("older", 0), ("2022", 0), ("sampled", 1), ("all", 0)):
        found = convert.read(tmp_path / name)
        assert torch.equal(rows_of(tmp_path / name), weight), name
        assert len(found.notes) == notes and all(
            "the momentum of its class centers is left out" in n for n in found.notes
        )
    one = tmp_path / "2021" / "rank_1_softmax_weight.pt"
    assert torch.equal(rows_of(one), parts[1]) and convert.read(one).notes
    shards(tmp_path / "2022", "rank_{}_softmax_weight.pt", tensors)
    with pytest.raises(
        convert.ConvertError, match=r"must have shards of one kind; got softmax_fc_gpu.* name the files"
    ):
        convert.read(tmp_path / "2022")


def test_momentum_that_is_left_out_is_said(tmp_path, capsys):
    weight = torch.randn(5, D)
    insightface_files(tmp_path / "theirs", 1, weight)
    state = torch.load(tmp_path / "theirs" / "checkpoint_gpu_0.pt")
    momentum = {0: {"momentum_buffer": torch.ones(2)}, 1: {"momentum_buffer": torch.ones(5, D)}}
    state["state_optimizer"] = {"state": momentum, "param_groups": [{"lr": 0.1}]}
    torch.save(state, tmp_path / "theirs" / "checkpoint_gpu_0.pt")
    assert cli.run(["convert", str(tmp_path / "theirs"), str(tmp_path / "x.safetensors")]) == 0
    shown = capsys.readouterr()
    assert "the momentum of its class centers is left out" in shown.err and "5 classes of 1 center" in shown.out
    checkpoint.save(tmp_path / "one", trained_head(dtype=torch.float32))
    said: list[str] = []
    convert.convert([tmp_path / "one", tmp_path / "x.safetensors"], tmp_path / "both", noted=said.append)
    assert said == ["the momentum of the class centers is left out: not all sources have it in the same dtype"]


def test_destinations_and_seeds_that_cannot_be_are_refused_before_reading(tmp_path):
    torch.save({"weight": torch.randn(5, D)}, tmp_path / "x.pt")
    for name in ("y.onnx", "y.pt", "y.safetensor", "x.pt"):
        with pytest.raises(convert.ConvertError, match=rf"must be a \.safetensors file or a folder.*{name}"):
            convert.convert([tmp_path / "missing"], tmp_path / name)
    for seed in (-1, 1 << 63):
        with pytest.raises(convert.ConvertError, match=r"seed must be"):
            convert.convert([tmp_path / "missing"], tmp_path / "y", seed=seed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]
    (tmp_path / "run.v2").mkdir()
    assert convert.convert([tmp_path / "x.pt"], tmp_path / "run.v2").parent == tmp_path / "run.v2"
    assert convert.convert([tmp_path / "x.pt"], tmp_path / "Z.SafeTensors").is_file()
    assert convert.read(tmp_path / "Z.SafeTensors").num_classes == 5


def test_a_seed_or_sub_centers_in_a_file_that_no_head_takes(tmp_path):
    for values, message in (
        ('{"seed": -1}', "seed must be"),
        ('{"sub_centers": "3"}', "sub_centers"),
        ("[]", "object"),
    ):
        weight = {"weight": Rows.of(torch.zeros(2, D))}
        safetensors.write(tmp_path / "x.safetensors", weight, {"fused_arcface": values})
        with pytest.raises(convert.ConvertError, match=message):
            convert.convert([tmp_path / "x.safetensors"], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_training_run_is_a_source(tmp_path):
    head = trained_head()
    checkpoint.save(tmp_path / "run" / "checkpoints", head)
    (tmp_path / "run" / "config.toml").touch()
    assert torch.equal(rows_of(tmp_path / "run"), head.full_weight())
