"""The state of a run in a head's ``state_dict()``: its step, and the optimizer's momentum and settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.checks import describe_tensor
from .joint_calls import JointCalls

_OPTIMIZER = "center_optimizer."  # before the names of its state in the head's state_dict


class RunState(JointCalls):
    """A head whose ``state_dict()`` continues a run."""

    def _run_state(self) -> dict[str, Tensor]:
        """Return what ``state_dict()`` holds beside weight: tensors alone, as safetensors stores nothing else."""
        state = {"step": torch.tensor(self.step, device="cpu")}
        if self.center_optimizer is not None:
            of_optimizer = self.center_optimizer.run_state(self.weight)
            state |= {_OPTIMIZER + name: tensor for name, tensor in of_optimizer.items()}
        return state

    def _is_in_memory(self) -> bool:
        """Return true if ``weight`` has the class centers, which may be in a file."""
        store = self.__dict__.get("center_store")  # none yet while the head is built
        return store is None or store.in_memory

    def _check_in_memory(self, call: str) -> None:
        """Raise RuntimeError if the class centers are in a file: a state dict would hold none of them."""
        if not self._is_in_memory():
            raise RuntimeError(
                f"{call} has no class centers, as center_storage keeps them in a file: use "
                "fused_arcface.checkpoint.save and load"
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._check_in_memory("state_dict()")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: tensor for name, tensor in self._run_state().items()}

    def _out_of_range(self, given: dict[str, Tensor], prefix: str) -> list[str]:
        """Return an error message for each number of a loaded state that is out of its range."""
        wrong = []
        if "step" in given and int(given["step"]) < 0:
            wrong.append(f"{prefix}step must be >= 0; got {int(given['step'])}")
        settings = given.get(_OPTIMIZER + "settings")
        if settings is not None:
            try:
                self.center_optimizer.check_loaded(settings)
            except ValueError as error:
                wrong.append(f"{prefix}{_OPTIMIZER}settings: {error}")
        return wrong

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load weight and, where the dict has it, the state of a run. With weight alone a run begins."""
        self._check_in_memory("load_state_dict()")
        own = self._run_state()
        given = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        if given:
            missing_keys += [prefix + name for name in own.keys() - given.keys()]
            wrong = [
                f"{prefix}{name} must be {describe_tensor(own[name])}; got {describe_tensor(tensor)}"
                for name, tensor in given.items()
                if describe_tensor(own[name]) != describe_tensor(tensor)
            ] or self._out_of_range(given, prefix)
            if wrong:
                error_msgs += wrong
                return
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if key not in {prefix + name for name in given}]
        if len(error_msgs) > errors or not (given or prefix + "weight" in state_dict):
            return
        self.step = int(given.pop("step", 0))
        if self.center_optimizer is not None:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            of_optimizer = {name.removeprefix(_OPTIMIZER): tensor for name, tensor in given.items()}
            self.center_optimizer.load_run_state(self.weight, of_optimizer, assign)
