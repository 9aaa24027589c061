"""The options that define a head's loss: the one place that checks them, shows them and names what they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_margin, check_scale, check_sub_centers
from .ranges import FROM_0_TO_1, check_number


@dataclass(frozen=True)
class HeadOptions:
    """The options of the loss. The heads, the function and the oracle check theirs by building one.

    Args:
        margin: A margin of this package, or a differentiable map of target cosines (N,) to modified cosines (N,).
        scale: The factor of the logits: a number, finite and > 0, a 0-dim parameter, or a module that adapts it.
        sub_centers: The centers of each class, in [1, 16].
        label_smoothing: The smoothing in [0, 1], as in ``cross_entropy``.

    Raises:
        TypeError: if an option has a wrong type.
        ValueError: if an option is out of its range, or two of them cannot be combined.
    """

    margin: Callable[[Tensor], Tensor]
    scale: Any = 64.0
    sub_centers: int = 1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_margin(self.margin)
        check_scale(self.scale)
        check_sub_centers(self.sub_centers)
        check_number("label_smoothing", self.label_smoothing, FROM_0_TO_1)
        if self.label_smoothing > 0 or self.scale_changes:
            self._check_beside_others()
        if not self.scale_changes:
            object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "label_smoothing", float(self.label_smoothing))

    def _check_beside_others(self) -> None:
        """Check that label smoothing and a scale that changes fit the other options."""
        others = self.needs()
        if self.label_smoothing > 0 and others:
            beside = next(iter(others.values())).rpartition(" of ")[2]
            raise ValueError(
                f"label_smoothing must be 0 with {beside}, because the logits must be linear in the class centers; "
                f"got {self.label_smoothing}"
            )
        for feature in ("modulated_negatives", "turned_negatives", "binary_losses"):
            if self.scale_changes and feature in others:
                raise ValueError(f"scale must be a number with {others[feature]}; got {self._scale_text()}")

    @property
    def scale_changes(self) -> bool:
        """True if the scale is learned or adapts to the training."""
        return isinstance(self.scale, (Tensor, nn.Module))

    def _scale_text(self) -> str:
        return "a learned scale" if isinstance(self.scale, Tensor) else f"scale={type(self.scale).__name__}()"

    def current_scale(self, num_classes: int) -> Any:
        """Return the scale as it is now: a number, or a 0-dim tensor."""
        scale: Any = self.scale
        return scale.current(num_classes) if hasattr(scale, "current") else scale

    def needs(self) -> dict[str, str]:
        """Return the features that not every backend has, by name, with the text that error messages have for them."""
        needs = {}
        if getattr(self.margin, "turns_negatives", False):
            needs["turned_negatives"] = f"the turned negatives of {type(self.margin).__name__}"
        elif hasattr(self.margin, "modulate"):
            needs["modulated_negatives"] = f"the modulated negatives of {type(self.margin).__name__}"
        if hasattr(self.margin, "binary"):
            needs["binary_losses"] = f"the binary losses of {type(self.margin).__name__}"
        if self.sub_centers > 1:
            needs["sub_centers"] = f"sub_centers={self.sub_centers}"
        return needs

    def check_step(self, target: object, num_classes: int, device: torch.device) -> None:
        """Check that these options fit what a step is called with.

        Raises:
            ValueError: if labels are mixed and the margin changes the negatives or has binary losses; if the scale is
                on another device; or if margin or scale do not fit the number of classes.
        """
        self.check_classes(num_classes)
        if isinstance(self.scale, Tensor) and self.scale.device != device:
            raise ValueError(f"scale must be on embeddings' device {device}; got {self.scale.device}")
        if not isinstance(target, (tuple, list)):
            return
        reasons = {
            "modulate": "which compares the negatives with one target",
            "binary": "whose losses of the classes are for one target",
        }
        for method, reason in reasons.items():
            if hasattr(self.margin, method):
                raise ValueError(
                    f"target must be labels (N,) with {type(self.margin).__name__}, {reason}; "
                    "got (first, second, share)"
                )

    def check_classes(self, num_classes: int) -> None:
        """Check that the scale, and a margin with a number for each class, fit the number of classes.

        Raises:
            ValueError: if one of them does not.
        """
        if isinstance(self.scale, nn.Module) and num_classes < 3:
            raise ValueError(f"{self._scale_text()} needs at least 3 classes; got C={num_classes}")
        own = getattr(self.margin, "num_classes", num_classes)
        if own != num_classes:
            name = type(self.margin).__name__
            raise ValueError(f"{name}: margins must be one for each of the C={num_classes} classes; got {own}")

    def describe(self) -> dict[str, str]:
        """Return each option as text, for a repr and to compare between ranks.

        A dataclass or a module among the margins is described by its values, any other callable by its name.
        """
        texts = {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if isinstance(self.scale, Tensor):  # its value is another one in each step
            texts["scale"] = self._scale_text()
        if not (dataclasses.is_dataclass(self.margin) or isinstance(self.margin, nn.Module)):
            texts["margin"] = getattr(self.margin, "__qualname__", type(self.margin).__qualname__)
        return texts

    def __str__(self) -> str:
        """Return the text for a head's repr: margin and scale, and the rarer options that are in use.

        A module among the margins is left out, as the head's repr lists it as a child.
        """
        usual = {"sub_centers": "1", "label_smoothing": "0.0"}
        texts = {name: text for name, text in self.describe().items() if text != usual.get(name)}
        if isinstance(self.margin, nn.Module):
            del texts["margin"]
        else:
            texts["margin"] = str(self.margin)
        return ", ".join(f"{name}={text}" for name, text in texts.items())
