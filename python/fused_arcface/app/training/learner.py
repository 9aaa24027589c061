"""Net, head, optimizers and learning rates of a run, made from its options, saved and restored together."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_arcface import checkpoint
from fused_arcface.base.keyed_random import NET, fold
from fused_arcface.center_sgd import CenterSGD
from fused_arcface.checkpoint import CheckpointError
from fused_arcface.margins.schedule import at_strength
from fused_arcface.margins.text import parse_margin
from fused_arcface.partial_fc import PartialFC
from fused_arcface.store import StoreError
from fused_arcface.store.estimate import Estimate, estimate

from ..data.images import ImageSpec
from ..nets.backbones import build_backbone
from ..nets.weights import Misfit, fit_state, read_state
from .buffers import SavedBuffers
from .centers import load_centers
from .config import OptionError, TrainConfig
from .joint_step import JointStep, StepResult, Timer
from .runs import RunFolder, read_backbone
from .schedule import Schedule, parse_rise
from .world import World

# Each rank's running statistics are its own. torch 2.13 gave the option a new name and warns about the old one.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_OWN_STATISTICS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


class Learner:
    """One process's net and shard of the head, and the step that changes them.

    Args:
        config: options that :func:`fused_arcface.app.training.resolve.resolve` has completed.
        num_classes: C_total.
        steps: number of steps of the whole training.
        world: the processes that train together.
    """

    def __init__(self, config: TrainConfig, num_classes: int, steps: int, world: World) -> None:
        assert config.image_size and config.channels and config.embedding_dim and config.scale and config.lr is not None
        self.config, self.world = config, world
        self.updates = 0  # steps that were not skipped
        self.notes: list[str] = []
        """Notes on the weights and class centers that the training started from."""
        self._frozen_steps = config.frozen_epochs * (steps // config.epochs)
        self.spec = ImageSpec(config.image_size, config.channels)
        self._storage = estimate_for(config, num_classes, world.world_size)
        if config.center_storage != "device":
            self.notes.append(self._storage.describe(config.center_storage))
        self.head = _build_head(config, num_classes, world.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(config.seed, NET) >> 1)
            self.backbone = build_backbone(config.backbone, config.embedding_dim, self.spec).to(world.device)
        self._trained = [each for each in self.backbone.parameters() if each.requires_grad]
        net: nn.Module = self.backbone
        if world.world_size > 1:
            net = DistributedDataParallel(net, **_OWN_STATISTICS)
        driven = self._trained if self.head.center_optimizer is not None else [*self._trained, self.head.weight]
        if config.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(driven, config.lr, config.momentum)
        else:
            self.optimizer = torch.optim.AdamW(driven, config.lr)
        self._schedule = Schedule(steps, config.schedule, config.power, config.warm_up)
        self._margin, epoch = self.head.margin, steps // config.epochs
        self._margin_rise = parse_rise(config.margin_schedule, epoch) if config.margin_schedule else None
        self._scale_rise = parse_rise(config.scale_schedule, epoch) if config.scale_schedule else None
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self._step = JointStep(net, self.head, config.precision, self._scaler, config.seed)

    @property
    def lr(self) -> float:
        """Learning rate of the backbone in the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def memory(self) -> int:
        """Bytes on this rank of weights, gradients and optimizer states, of net and class centers.

        CenterSGD keeps a momentum beside the centers, and no gradient.
        """
        copies = 2 + (2 if self.config.optimizer == "adamw" else int(self.config.momentum > 0))
        net = copies * sum(each.nbytes for each in self.backbone.parameters())
        if self.head.center_store is not None:
            return net + self._storage.device_bytes
        return net + self.head.weight.nbytes * (copies if self.head.center_optimizer is None else 2)

    def learn(self, images: Tensor, labels: Tensor, sizes: list[int], number: int) -> StepResult:
        """Make one step.

        Args:
            images: (n, channels, size, size), this rank's images.
            labels: (n,) int64.
            sizes: sizes of the micro-batches that the images are cut into.
            number: number of the step, from 0.

        A step whose loss or gradient is not finite on any rank is skipped on all: weights, buffers, optimizers and the
        margin's state stay as they were, also if an error is raised.
        """
        frozen = number < self._frozen_steps
        # A frozen net keeps its running statistics too, and drops nothing out.
        self.backbone.train(not frozen)
        self._set_options(number)
        device = self.world.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        self.optimizer.zero_grad()
        centers, margin, head_steps = self.head.center_optimizer, self.head.margin, self.head.step
        buffers = SavedBuffers(self.backbone, *([margin] if isinstance(margin, nn.Module) else []))
        if centers is not None:
            centers.hold()  # the backbone's gradient, which comes after the head's, may not be finite
        idle = frozen and centers is not None  # nothing has a gradient that the backbone's optimizer would use
        updated = False
        try:
            result = self._step(list(images.split(sizes)), labels, number, frozen=frozen)
            updated = self._finish_gradients(result.loss, idle)
        except BaseException:
            self.head.step = head_steps
            raise
        finally:
            timer = Timer(device)
            if not updated:
                buffers.restore()
            if centers is not None:
                centers.release(apply=updated)
            timer.stop()
        if updated:
            if not idle:
                self._scaler.step(self.optimizer)
            self.updates += 1
        if not idle:
            self._scaler.update()  # lowers its factor where it has met a gradient that is not finite
        return result._replace(updated=updated, head_seconds=result.head_seconds + timer.seconds())

    def _finish_gradients(self, loss: float, idle: bool) -> bool:
        """Unscale and clip the gradients; return whether they and the loss are finite on all ranks."""
        if idle:
            return math.isfinite(loss)
        self._scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._trained, self.config.clip_norm or float("inf"))
        finite = math.isfinite(loss) and bool(norm.isfinite())  # the same on every rank: loss and gradients are
        if self.head.weight.grad is None:
            return finite
        # Each rank has its own class centers.
        unusable = not bool(self.head.weight.grad.isfinite().all())
        return self.world.sum([float(unusable)]) == [0.0] and finite

    def _set_options(self, number: int) -> None:
        """Set what the schedules change, before each step: the options of a checkpoint are not used."""
        config, factor = self.config, self._schedule.factor(number)
        assert config.lr is not None and config.scale is not None
        if self._margin_rise is not None:
            self.head.margin = at_strength(self._margin, self._margin_rise(number))
        if self._scale_rise is not None:
            self.head.scale = config.scale * self._scale_rise(number)
        options = {"lr": config.lr * factor, "weight_decay": config.weight_decay}
        if config.optimizer == "sgd":
            options["momentum"] = config.momentum
        for group in self.optimizer.param_groups:
            group.update(options)
        if self.head.center_optimizer is not None:
            centers = options | {"lr": config.center_lr * factor, "momentum": config.momentum}
            self.head.center_optimizer.param_groups[0].update(centers)

    def save(self, root: Path, step: int) -> Path:
        """Write a checkpoint after ``step`` steps and return its path. A collective."""
        values = {"step": step, "updates": self.updates}
        return checkpoint.save(root, self.head, keep=self.config.keep, **values, **self._objects())

    def start(self, names: list[str]) -> None:
        """Set net and head to the weights and class centers that the options name; OptionError if that fails.

        ``names`` are those of the identities, (C_total,).
        """
        option = "init"
        try:
            if self.config.init:
                path = Path(self.config.init)
                state = read_backbone(RunFolder(path)) if path.is_dir() else read_state(path)
                notes = fit_state(self.backbone, state, path, partial=self.config.init_partial)
                self.notes += [f"init: {note}" for note in notes]
            option = "centers"
            if self.config.centers:
                self.notes += load_centers(self.head, names, Path(self.config.centers))
        except (ValueError, CheckpointError) as error:
            hint = ". --init-partial takes what fits" if isinstance(error, Misfit) else ""
            raise OptionError(f"{option}: {error}{hint}") from None

    def load(self, root: Path, *, trust: bool = False) -> int:
        """Go back to the newest checkpoint and return the number of steps made by then. A collective."""
        saved = checkpoint.load(root, self.head, trust=trust, **self._objects())
        # A step uses the options of the run, never those of a file.
        for group in self.optimizer.param_groups:
            group.update(self.optimizer.defaults)
        step = _count(root, saved, "step")
        self.updates = _count(root, saved, "updates") if "updates" in saved else step
        self._check_state(root)
        return step

    def _check_state(self, root: Path) -> None:
        """Raise CheckpointError unless a step can use the states of optimizer and scaler. Both load any state."""
        known = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        for parameter, state in self.optimizer.state.items():
            if parameter not in known or not isinstance(state, dict):
                raise CheckpointError(f"{root}: the optimizer's state has parts of no parameter of the net")
            for name, value in state.items():
                fits = isinstance(value, Tensor) and value.shape in (parameter.shape, torch.Size())
                if not fits and value is not None:
                    raise CheckpointError(
                        f"{root}: the optimizer's {name} must be a tensor {tuple(parameter.shape)} or ()"
                    )
        for name, value in self._scaler.state_dict().items():
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise CheckpointError(f"{root}: the scaler's {name} must be a number >= 0; got {value!r:.40}")

    def _objects(self) -> dict[str, Any]:
        scaler = {"scaler": self._scaler} if self._scaler.is_enabled() else {}
        return {"backbone": self.backbone, "optimizer": self.optimizer, **scaler}


def estimate_for(config: TrainConfig, num_classes: int, ranks: int) -> Estimate:
    """Return the memory and disk of each rank's class centers, fp32 with fp32 momentum."""
    assert config.embedding_dim
    row_bytes = 4 * config.embedding_dim * (2 if config.momentum > 0 else 1)
    rows = num_classes * config.sub_centers
    sample = round(config.sample_rate * rows) + config.batch_size * config.sub_centers
    return estimate(-(-rows // ranks), min(-(-sample // ranks), rows), row_bytes)


def _count(root: Path, saved: dict[str, Any], name: str) -> int:
    value = saved.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise CheckpointError(f"{root}: {name} must be a whole number >= 0; got {value!r:.40}")
    return value


def _build_head(config: TrainConfig, num_classes: int, device: torch.device) -> PartialFC:
    assert config.embedding_dim and config.scale
    recipe = CenterSGD(config.center_lr, config.momentum, config.weight_decay)
    try:
        return PartialFC(
            config.embedding_dim,
            num_classes,
            margin=parse_margin(config.margin),
            scale=config.scale,
            sample_rate=config.sample_rate,
            seed=config.seed,
            center_optimizer=recipe if config.center_optimizer == "fused" else None,
            backend=config.backend,
            device=device,
            dtype=torch.float32,
            dense_grad=True,
            sub_centers=config.sub_centers,
            label_smoothing=config.label_smoothing,
            center_storage=config.center_storage,
        )
    except (TypeError, ValueError, StoreError) as error:  # options that the head does not take together
        raise OptionError(str(error)) from None
