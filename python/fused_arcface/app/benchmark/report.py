"""Rows: one flat record for each provider, case and pass, in CSV and JSON, beside the fuller record of a run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fused_arcface.backends import canonical
from fused_arcface.base.files import write_text

from ..measure.timing import Timing
from .cases import Case
from .names import Named, is_fused, is_ours, label


@dataclass(frozen=True)
class Measurement:
    """One provider on one case and pass."""

    provider: str
    backend: str
    pass_name: str
    case: Case
    timing: Timing
    error: float
    products: int
    """Flops of its matrix products in units of N·C·D."""
    peak_bytes: int | None = None

    @property
    def ms(self) -> float:
        return self.timing.median

    @property
    def ps_per_logit(self) -> float:
        return self.ms * 1e9 / (self.case.N * self.case.C)

    @property
    def flops_per_second(self) -> float:
        return self.products * self.case.N * self.case.C * self.case.D / (self.ms * 1e-3)

    @property
    def ceiling(self) -> str:
        """The dtype that its products are computed in, which is the key of the machine's ``flops_per_second``."""
        suffix = self.provider.rpartition("-")[2]
        return {"tf32": "tf32", "fp16": "float16"}.get(suffix, self.case.dtype)

    @property
    def is_ours(self) -> bool:
        return is_ours(self.provider)

    @property
    def is_fused(self) -> bool:
        """True if it is ours and does not store the logits."""
        return is_fused(self.provider, self.backend)

    @property
    def label(self) -> str:
        return label(self.provider, self.backend)

    def row(self, context: dict[str, str]) -> dict[str, Any]:
        """Return the flat record; ``context`` holds device, torch, commit and date.

        ``ms`` is the median. ``peak_bytes`` is the memory beyond inputs, class centers and gradients, None where it was
        not measured. ``error`` is the largest relative error of the loss and the gradients, compared with fp64.
        """
        case = self.case
        return {
            "provider": self.provider,
            "backend": self.backend,
            "pass": self.pass_name,
            "dtype": case.dtype,
            "weight_dtype": case.weight_dtype,
            "N": case.N,
            "C": case.C,
            "D": case.D,
            "ms": round(self.ms, 4),
            "ps_per_logit": round(self.ps_per_logit, 3),
            "peak_bytes": self.peak_bytes,
            "error": float(f"{self.error:.2e}"),
            **context,
        }

    def detail(self) -> dict[str, Any]:
        """Return the samples behind the row and the numbers derived from them, in milliseconds."""
        return {
            "provider": self.provider,
            "backend": self.backend,
            "pass": self.pass_name,
            "case": str(self.case),
            "least_ms": self.timing.least,
            "p20_ms": self.timing.quantile(0.2),
            "p80_ms": self.timing.quantile(0.8),
            "samples_ms": list(self.timing.samples),
            "flops_per_second": self.flops_per_second,
        }


@dataclass(frozen=True)
class Skip:
    """A provider that did not run a case, and the reason. If the case is None, it ran none."""

    provider: str
    backend: str
    case: Case | None
    reason: str


@dataclass
class Report:
    """Everything that a run found."""

    context: dict[str, str]
    """device, torch, commit, date"""
    measurements: list[Measurement]
    skips: list[Skip]
    machine: dict[str, Any]
    """Measured ceilings: ``flops_per_second`` of a product by dtype, ``copy_bytes_per_second``, on a CPU
    ``fma_flops_per_second`` (fp32, in registers alone), and the ``memory_bytes`` that were free."""

    def skip(self, provider: Named, case: Case | None, reason: str) -> None:
        """Note a skip once: a resumed run finds the same skips again."""
        found = Skip(provider.name, provider.backend, case, reason)
        if found not in self.skips:
            self.skips.append(found)

    def rows(self) -> list[dict[str, Any]]:
        return [measurement.row(self.context) for measurement in self.measurements]

    def has_wrong_result_of_ours(self) -> bool:
        """Return whether a result of this package did not agree with fp64."""
        return any(skip.reason.startswith("wrong") and is_ours(skip.provider) for skip in self.skips)

    def has_measured(self) -> bool:
        """Return whether anything else than the machine's ceilings was measured."""
        return not all(each.provider.startswith("ceiling") for each in self.measurements)

    def share_of_ceiling(self, each: Measurement) -> float | None:
        """Return a measurement's flops per second as a share of the machine's highest rate in that dtype.

        The highest rate is that of a large square product. On a CPU arithmetic in registers may be faster, because a
        library's product need not use the widest instructions.
        """
        product = self.machine["flops_per_second"].get(each.ceiling)
        registers = self.machine.get("fma_flops_per_second") if each.ceiling == "float32" else None
        reached = max((rate for rate in (product, registers) if rate is not None), default=None)
        return None if reached is None else each.flops_per_second / reached

    def write(self, folder: Path) -> list[Path]:
        """Write rows.csv, rows.json and run.json (samples, skips, ceilings) into ``folder``; return their paths."""
        run = {
            **self.context,
            "machine": self.machine,
            "measurements": [measurement.detail() for measurement in self.measurements],
            "skips": [asdict(skip) for skip in self.skips],
        }
        return [*write_rows(folder, "rows", self.rows()), write_json(folder / "run.json", run)]


def write_rows(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write NAME.csv and NAME.json into a folder, which is made if it is missing; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_csv(folder / f"{name}.csv", rows), write_json(folder / f"{name}.json", rows)]


def add_rows(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write the rows that are already in NAME.json, followed by new ones; see :func:`write_rows`."""
    file = folder / f"{name}.json"
    return write_rows(folder, name, [*(read_json(file) if file.exists() else []), *rows])


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows; return the path. The columns are all fields in their order; a row may lack some of them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(field for row in rows for field in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return path


def write_json(path: Path, value: Any, indent: int | None = 1, allow_nan: bool = False) -> Path:
    """Write a value, by default without NaN or infinity; return the path."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=allow_nan) + "\n")
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def check_same(earlier: Mapping[str, Any], here: Mapping[str, Any], *names: str) -> None:
    """Check that new results can be compared with an earlier run's: some columns of a row or context must be equal.

    Raises:
        ValueError: if one of them differs.
    """
    for name in names:
        if earlier[name] != here[name]:
            raise ValueError(f"the earlier run's {name} must be {here[name]}; got {earlier[name]}")


def read_report(folder: Path) -> Report:
    """Read a report from the files that :meth:`Report.write` wrote.

    Raises:
        FileNotFoundError: if one of them is missing.
    """
    rows, run = read_json(folder / "rows.json"), read_json(folder / "run.json")
    measurements = []
    for row, detail in zip(rows, run["measurements"], strict=True):
        case = Case(row["N"], row["C"], row["D"], row["dtype"], row["weight_dtype"])
        timing = Timing(tuple(detail["samples_ms"]))
        products = round(detail["flops_per_second"] * timing.median * 1e-3 / (case.N * case.C * case.D))
        names = row["provider"], canonical(row["backend"]), row["pass"]
        measurements.append(Measurement(*names, case, timing, row["error"], products, row["peak_bytes"]))
    skips = [Skip(**{**skip, "case": skip["case"] and Case(**skip["case"])}) for skip in run["skips"]]
    context = {name: run[name] for name in ("device", "torch", "commit", "date")}
    return Report(context, measurements, skips, run["machine"])
