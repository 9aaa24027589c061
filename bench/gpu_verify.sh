#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and ten minutes; fetches nothing:
#
#   bench/gpu_verify.sh [folder, bench/results/<name of the GPU> by default]
#
# builds the package as it stands (with CUDA where nvcc is found), runs the tests on the GPU, the benchmark,
# compute-sanitizer on small shapes, and the tests of the CPU, each within a time of its own and all within BUDGET
# seconds (590). Into the folder go:
#
#   summary.json           GPU, driver, versions, commit, date; each phase with its outcome and seconds
#   rows.csv, rows.json    the benchmark, a row for each provider, shape and pass; run.json has the samples
#   logs/                  what each phase said
#
# What is missing on the machine is said and skipped; a phase that fails does not stop the next. Exit status 1 if one
# failed. PYTHON names the interpreter: it needs torch, Triton, scikit-build-core, pybind11, CMake and Ninja, and pytest for
# the tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
budget=${BUDGET:-590}

gpu=$("$python" - <<'END'
import re
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_verify.sh needs torch: {error}. PYTHON=... names another interpreter")
if torch.version.cuda is None:
    sys.exit(f"gpu_verify.sh needs a GPU: this torch ({torch.__version__}) is built without CUDA")
if not torch.cuda.is_available():
    sys.exit("gpu_verify.sh needs a GPU: torch sees no CUDA device")
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
END
) || exit 1

out=$(realpath -m "${1:-bench/results/$gpu}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out/logs"
phases=()
failed=0

# phase NAME SECONDS COMMAND...: runs it for at most so long and what earlier phases left of theirs, keeps its output,
# notes how it went.
planned=0
phase() {
  local name=$1 limit start=$SECONDS outcome=ok status=0
  planned=$((planned + $2))
  limit=$(((planned < budget ? planned : budget) - SECONDS))
  shift 2
  if ((limit < 5)); then
    failed=1
    skip "$name" "the budget of $budget s is spent"
    return
  fi
  echo "==> $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$out/logs/$name.log" 2>&1 || status=$?
  if ((status == 124 || status == 137)); then
    outcome="ran out of its $limit s"
  elif ((status != 0)); then
    outcome="failed with status $status"
  fi
  if ((status != 0)); then failed=1; fi
  tail -n "$((status == 0 ? 12 : 60))" "$out/logs/$name.log"
  echo "    $outcome, $((SECONDS - start)) s"
  phases+=("$name=$outcome=$((SECONDS - start))")
}

skip() {
  echo "==> $1: skipped, $2"
  phases+=("$1=skipped: $2=0")
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

phase build 90 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --target "$work/site" .
# Child processes must find the build as well.
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
found=$("$python" -c 'import fused_arcface; print(fused_arcface.__file__)')
if [[ $found != "$work/site/"* ]]; then
  echo "gpu_verify.sh: this build is not what Python imports, but '$found': see $out/logs/build.log, or uninstall" \
    "an editable fused-arcface" >&2
  exit 1
fi
# A cache of its own: kernels are compiled by this Triton, for this GPU. All phases share it.
export TRITON_CACHE_DIR=$work/triton

cores=$(nproc)
processes=$((cores < 16 ? (cores + 1) / 2 : 8))
if has pytest; then
  phase tests_gpu 160 "$python" bench/parallel_tests.py "$work/tests_gpu" "$processes" -m "not full" \
    -k "(test_triton or test_cuda or on_a_gpu) and not interpreter and not emulated" \
    tests/backends/test_gpu.py tests/backends/test_triton.py tests/backends/test_cuda.py tests/backends/test_cuda_updates.py \
    tests/backends/test_cuda_negatives.py tests/backends/test_hopper.py \
    tests/test_partial_fc.py tests/engine/test_ops.py
  grep -h "beyond the weight" "$work"/tests_gpu/*.log || true
else
  failed=1
  skip tests_gpu "pytest is not installed"
fi

phase benchmark 170 "$python" bench/gpu_benchmark.py "$out" 130

if ! has pytest; then
  skip sanitizer "pytest is not installed"
elif ! command -v compute-sanitizer >/dev/null; then
  skip sanitizer "compute-sanitizer is not on the PATH"
else
  # Without PyTorch's cache each tensor is an allocation of its own, so that an access past its end is seen.
  for tool in memcheck racecheck; do
    phase "sanitizer_$tool" 35 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --target-processes all "$python" -m pytest -o addopts= tests/backends/test_triton.py -q -p no:cacheprovider -x \
      -k "with_the_reference_on_a_gpu and bfloat16-bfloat16 and 140x600x40"
    phase "sanitizer_cuda_$tool" 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --target-processes all "$python" -m pytest -o addopts= tests/backends/test_cuda.py -q \
      -p no:cacheprovider -x -k "agrees_with_the_reference and gpu and 140x300x40"
    # Skipped in a second where the GPU has no such kernels.
    phase "sanitizer_hopper_$tool" 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --target-processes all "$python" -m pytest -o addopts= tests/backends/test_hopper.py -q \
      -p no:cacheprovider -x -k "agrees_with_the_reference and on_a_gpu and (65x129 or 70x330)"
  done
fi

if has pytest; then
  # What is left: the shares above take 590 at most, and seldom all of it.
  phase tests_cpu "$((budget - planned))" "$python" bench/parallel_tests.py "$work/tests_cpu" "$processes" -m "not full" -k "not on_a_gpu" tests
else
  skip tests_cpu "pytest is not installed"
fi

for name in tests_gpu tests_cpu; do
  if [[ -d $work/$name ]]; then cat "$work/$name"/*.log >>"$out/logs/$name.log"; fi
done
"$python" - "$out/summary.json" "${phases[@]}" <<'END'
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys

import torch


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


path, *phases = sys.argv[1:]
properties = torch.cuda.get_device_properties(0)
summary = {
    "device": properties.name,
    "compute_capability": f"{properties.major}.{properties.minor}",
    "multiprocessors": properties.multi_processor_count,
    "memory_bytes": properties.total_memory,
    "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
    "nvcc": said("nvcc", "--version").split("\n")[-1],
    "torch": torch.__version__,
    "triton": version("triton"),
    "python": platform.python_version(),
    "commit": said("git", "describe", "--always", "--dirty", "--abbrev=12"),
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "phases": [dict(zip(("phase", "outcome", "seconds"), phase.rsplit("=", 2), strict=True)) for phase in phases],
}
with open(path, "w") as file:
    json.dump(summary, file, indent=2)
    file.write("\n")
print(json.dumps(summary, indent=2))
END
echo "results are in $out"
exit "$failed"
