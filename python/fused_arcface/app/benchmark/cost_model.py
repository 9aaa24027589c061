"""A model of the head's training step on many devices: its time, the memory of a device, and the limiting factor.

Model-parallel layout: W devices hold C / W class centers each; every device's N / W embeddings are gathered by all,
each device computes all N rows against its own classes, and the embeddings' gradient is summed back to its owner. The
batch per device is fixed, so N grows with W, and a device's arithmetic (N·C/W logits) does not change with W; its
memory shrinks, and the collectives grow.

The rate of one device comes from rows of this benchmark, the network's figures are nominal. The table of a device that
has not been measured says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .names import is_ours
from .report import read_json


@dataclass(frozen=True)
class Device:
    """One device, running this package's head."""

    name: str
    seconds_per_mac: float
    """Time of forward and backward for one logit and one dimension: time / (N·C·D)."""
    bytes_per_second: float
    """Rate at which its memory is read or written."""
    memory_bytes: float
    measured: bool
    step_seconds: float = 0.0
    """Time of a step that does not grow with its size: launches, the host's program."""
    overlap: float = 1.0
    """Share of concurrent work that overlaps: 1 where copies, collectives and arithmetic have separate hardware, 0 on a
    thread that does one after the other."""

    @classmethod
    def from_report(cls, folder: Path) -> Device:
        """Read a run's files: the fastest of our passes with gradients over the run's largest problem.

        Raises:
            FileNotFoundError: if no run is there.
            ValueError: if the run has no such row.
        """
        rows, run = read_json(folder / "rows.json"), read_json(folder / "run.json")
        ours = [row for row in rows if is_ours(row["provider"]) and row["pass"] == "fwd+bwd"]
        if not ours:
            raise ValueError(f"{folder} must hold a fwd+bwd row of fused_arcface; it has none")
        work = max(row["N"] * row["C"] * row["D"] for row in ours)
        fastest = min(row["ms"] for row in ours if row["N"] * row["C"] * row["D"] == work)
        machine = run["machine"]
        return cls(
            run["device"], fastest * 1e-3 / work, machine["copy_bytes_per_second"], machine["memory_bytes"], True
        )


# 8·N·C·D flops at four fifths of the rate of the device's bf16 product, 790 TFLOP/s; a copy at 4.3 TB/s; some twenty
# launches of 5 µs.
H200 = Device("NVIDIA H200", 8 / (0.8 * 790e12), 4.3e12, 141e9, measured=False, step_seconds=1e-4)


@dataclass(frozen=True)
class Network:
    """Rates of one direction of one device; nominal ones of eight GPUs in a node, each with a 400 Gb/s port."""

    devices_per_node: int = 8
    node_bytes_per_second: float = 450e9
    bytes_per_second: float = 50e9
    latency_seconds: float = 10e-6
    """Latency of one collective for each doubling of the devices, launch included."""

    def seconds(self, total_bytes: float, devices: int) -> tuple[float, float]:
        """Return latency and transfer time of a gather or a scatter of ``total_bytes`` over all W devices.

        Every device moves (W - 1) / W of the bytes.
        """
        if devices == 1:
            return 0.0, 0.0
        rate = self.node_bytes_per_second if devices <= self.devices_per_node else self.bytes_per_second
        return self.latency_seconds * math.ceil(math.log2(devices)), total_bytes * (devices - 1) / devices / rate


@dataclass(frozen=True)
class Storage:
    """Bytes of one element of the class centers: at rest, and moved by the optimizer in a step."""

    name: str
    weight_bytes: float
    held_bytes: float
    """Class center, momentum and gradient where one exists."""
    optimizer_bytes: float
    """Read and written once a step beyond the two reads of the passes themselves."""


# torch.optim.SGD with weight decay: the gradient is written, then read; decay makes a copy; momentum and center are
# read and written.
SGD_FP32 = Storage("fp32 centers, products in bf16, torch.optim.SGD", 4, held_bytes=16, optimizer_bytes=36)
# The update in the backward's class tile: no gradient; center written, momentum read and written.
FUSED_FP32 = Storage("fp32 centers and momentum, updated in the backward", 4, held_bytes=8, optimizer_bytes=12)
# The same with bf16 center and int8 momentum read and written.
FUSED_BF16_INT8 = Storage(
    "bf16 centers, int8 momentum, updated in the backward (modeled)", 2, held_bytes=3.1, optimizer_bytes=4.2
)


@dataclass(frozen=True)
class ModeledStep:
    """One modeled training step of the head, in seconds and bytes of each device."""

    identities: int
    devices: int
    seconds: float
    arithmetic_seconds: float
    memory_bytes: float
    limit: str
    """The largest part: ``arithmetic``, ``memory traffic``, ``network``, ``latency`` or ``launches``; ``does not
    fit`` if it cannot be held."""

    @property
    def efficiency(self) -> float:
        """Share of the step that is the head's arithmetic."""
        return self.arithmetic_seconds / self.seconds


def predict(
    device: Device,
    identities: int,
    devices: int,
    *,
    batch: int = 128,
    D: int = 512,
    storage: Storage = FUSED_BF16_INT8,
    embedding_bytes: int = 2,
    network: Network = Network(),
) -> ModeledStep:
    """Predict the step of ``identities`` classes over ``devices``, each with ``batch`` embeddings of ``D`` dimensions.

    Each pass has half of the arithmetic (4NDC of 8NDC) and reads the centers once; the backward pass also has the
    optimizer's traffic. Arithmetic and traffic of a pass overlap, and so do the scatter of the embeddings' gradient and
    the backward pass. The gather, and the sum of two numbers a row, overlap with nothing.

    >>> step = predict(H200, 10**6, 1)
    >>> f"{step.seconds * 1e3:.1f} ms, {step.limit}"
    '1.3 ms, memory traffic'
    """
    rows, classes = batch * devices, math.ceil(identities / devices)
    elements = classes * D
    arithmetic = device.seconds_per_mac * rows * elements / 2  # of either pass
    stream = elements * storage.weight_bytes / device.bytes_per_second
    update = elements * storage.optimizer_bytes / device.bytes_per_second
    gather_latency, gather = network.seconds(rows * (D * embedding_bytes + 8), devices)
    sum_latency, sum_ = network.seconds(2 * rows * 8, devices)  # an all-reduce is a scatter and a gather
    scatter_latency, scatter = network.seconds(rows * D * 4, devices)

    parts = {
        "arithmetic": 0.0,
        "memory traffic": 0.0,
        "network": gather + sum_,
        "latency": gather_latency + 2 * sum_latency + scatter_latency,
        "launches": device.step_seconds,
    }
    forward = {"arithmetic": arithmetic, "memory traffic": stream}
    backward = {"arithmetic": arithmetic, "memory traffic": stream + update, "network": scatter}
    for at_once in (forward, backward):
        for name, added in _overlapped(device.overlap, at_once).items():
            parts[name] += added
    # Centers and optimizer; gathered embeddings, the sums of centers in fp32 and the gradient that is scattered.
    held = elements * storage.held_bytes + rows * D * (embedding_bytes + 8)
    limit = "does not fit" if held > device.memory_bytes else max(parts, key=lambda name: parts[name])
    return ModeledStep(identities, devices, sum(parts.values()), 2 * arithmetic, held, limit)


def _overlapped(overlap: float, parts: dict[str, float]) -> dict[str, float]:
    """Return the seconds that each of some concurrent parts adds to their time.

    The longest part adds all of its time, each other part the share that does not overlap.
    """
    longest = max(parts, key=lambda name: parts[name])
    return {name: seconds if name == longest else (1 - overlap) * seconds for name, seconds in parts.items()}


IDENTITIES = (10**6, 10**7, 10**8, 10**9)
DEVICES = (1, 8, 64, 256, 1024)


def grid(device: Device, **options: Any) -> list[ModeledStep]:
    """Return a step for each of :data:`IDENTITIES` on each of :data:`DEVICES`; ``options`` go to :func:`predict`."""
    return [predict(device, identities, count, **options) for identities in IDENTITIES for count in DEVICES]


def table(steps: Iterable[ModeledStep], device: Device, storage: Storage = FUSED_BF16_INT8) -> str:
    """Return a Markdown table of modeled steps, after a line that says whether the rate was measured."""
    source = "measured by this benchmark" if device.measured else "a model, not yet measured"
    lines = [
        f"Rate of one {device.name}: {source}. 128 embeddings of 512 dimensions a device; {storage.name}.",
        "",
        "| identities | devices | step | memory a device | efficiency | limited by |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for step in steps:
        name = f"10{str(round(math.log10(step.identities))).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
        held = f"{step.memory_bytes / 2**30:.{2 if step.memory_bytes < 100 * 2**30 else 0}f} GiB"
        time, efficiency = f"{step.seconds * 1e3:.2f} ms", f"{step.efficiency:.0%}"
        if step.limit == "does not fit":
            time = efficiency = "—"
        lines.append(f"| {name} | {step.devices} | {time} | {held} | {efficiency} | {step.limit} |")
    return "\n".join(lines)
