#!/usr/bin/env bash
# Check and measure everything that needs a GPU, in one command and ten minutes. It downloads nothing:
#
#   bench/gpu_verify.sh [folder, bench/results/<name of the GPU> by default]
#
# builds the package as it stands (with CUDA where nvcc is found) and runs these phases, the most valuable first:
#
#   benchmark     time, memory and error of our backends and of the peers       rows.csv, rows.json, run.json
#   tests         the tests of the GPU backends
#   training      loss curves of every backend beside three seeds of torch      training.csv, .json, .png
#   identities    the most identities whose training step fits                  capacity.csv, .json
#   stored        a training step with class centers in host memory             stored_identities.csv, .json
#   sanitizer     compute-sanitizer's memcheck and racecheck on small shapes
#   smoke         a few tests of the CPU backend in this build
#
# Settings, all from the environment:
#
#   PHASES="benchmark training"   only these, in this order
#   BUDGET=590                    seconds for all of it; a phase has a limit of its own and what earlier ones left over
#   WHEELS=folder                 wheels of peers that are not installed here; README.md says how to fetch them
#   COMMIT=abc                    the commit that the rows name, where the folder is no checkout of git
#   PYTHON=python3                the interpreter: it needs torch, Triton, scikit-build-core, pybind11, CMake, Ninja and,
#                                 for the tests, pytest
#
# Results are written as they come, and summary.json (GPU, versions, commit, date; each phase with its outcome and
# seconds) after each phase, so a run that is cut short loses only its current phase. logs/ has the output of each
# phase. A phase that fails does not stop the next. The exit status is 1 if one failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
budget=${BUDGET:-590}
every="benchmark tests training identities stored sanitizer smoke"
read -ra chosen <<<"${PHASES:-$every}"
for name in "${chosen[@]}"; do
  if [[ " $every " != *" $name "* ]]; then
    echo "gpu_verify.sh: PHASES must be among: $every; got $name" >&2
    exit 1
  fi
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The commit that every row carries: the build below lies outside of the checkout.
FUSED_ARCFACE_COMMIT=${COMMIT:-$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)}
export FUSED_ARCFACE_COMMIT

gpu=$("$python" - "$work/machine.json" <<'END'
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_verify.sh needs torch: {error}. PYTHON=... names another interpreter")
if torch.version.cuda is None:
    sys.exit(f"gpu_verify.sh needs a GPU: this torch ({torch.__version__}) is built without CUDA")
if not torch.cuda.is_available():
    sys.exit("gpu_verify.sh needs a GPU: torch sees no CUDA device")


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


properties = torch.cuda.get_device_properties(0)
facts = {
    "device": properties.name,
    "compute_capability": f"{properties.major}.{properties.minor}",
    "multiprocessors": properties.multi_processor_count,
    "memory_bytes": properties.total_memory,
    "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
    "nvcc": said("nvcc", "--version").split("\n")[-1],
    "torch": torch.__version__,
    "triton": next((found.version for found in importlib.metadata.distributions(name="triton")), None),
    "python": platform.python_version(),
    "commit": os.environ["FUSED_ARCFACE_COMMIT"],
}
with open(sys.argv[1], "w") as file:
    json.dump(facts, file)
print(re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-"))
END
) || exit 1

out=$(realpath -m "${1:-bench/results/$gpu}")
mkdir -p "$out/logs"
phases=()
failed=0
planned=0

# Write summary.json from what is known so far, without the seconds that an import of torch takes.
summarize() {
  "$python" - "$work/machine.json" "$out/summary.json" "${phases[@]}" <<'END'
import datetime
import json
import sys

machine, path, *phases = sys.argv[1:]
with open(machine) as file:
    summary = json.load(file)
summary["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
summary["phases"] = [dict(zip(("phase", "outcome", "seconds"), each.rsplit("=", 2), strict=True)) for each in phases]
with open(path, "w") as file:
    json.dump(summary, file, indent=2)
    file.write("\n")
END
}

# phase NAME SECONDS COMMAND...: run a command, keep its output and note its outcome. Its limit is SECONDS and the time
# that earlier phases did not use.
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
  summarize
}

skip() {
  echo "==> $1: skipped, $2"
  phases+=("$1=skipped: $2=0")
  summarize
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# tests_phase NAME SECONDS ARGUMENTS...: runs tests in several processes, and keeps the logs of all.
tests_phase() {
  local name=$1 seconds=$2
  shift 2
  if ! has pytest; then
    failed=1
    skip "$name" "pytest is not installed"
    return
  fi
  phase "$name" "$seconds" "$python" bench/parallel_tests.py "$work/$name" "$processes" -m "not full" "$@"
  cat "$work/$name"/*.log >>"$out/logs/$name.log" 2>/dev/null || true
}

# run_NAME runs the phase of that name.
run_benchmark() { phase benchmark 220 "$python" bench/gpu_benchmark.py "$out" 190; }

run_training() { phase training 180 "$python" bench/gpu_training.py "$out" --seconds 170; }

run_identities() { phase identities 90 "$python" bench/gpu_identities.py "$out" --seconds 80; }

run_tests() {
  tests_phase tests_gpu 120 -k "(test_triton or test_cuda or on_a_gpu) and not interpreter and not emulated" \
    tests/backends/test_gpu.py tests/backends/test_triton.py tests/backends/test_cuda.py tests/backends/test_cuda_updates.py \
    tests/backends/test_cuda_negatives.py tests/backends/test_hopper.py \
    tests/test_partial_fc.py tests/engine/test_ops.py
  grep -h "beyond the weight" "$work"/tests_gpu/*.log 2>/dev/null || true
}

# 47 GB of centers and momentum in host memory, of which a step takes 0.5 GB each way.
run_stored() {
  phase stored 60 "$python" bench/stored_identities.py --device cuda --storage host --classes 30000000 --rate 0.01 \
    --rows 1024 --steps 20 --repeated --output "$out"
}

run_sanitizer() {
  if ! has pytest; then
    skip sanitizer "pytest is not installed"
    return
  elif ! command -v compute-sanitizer >/dev/null; then
    skip sanitizer "compute-sanitizer is not on the PATH"
    return
  fi
  local tool test
  # Without PyTorch's cache each tensor is an allocation of its own, so that an access past its end is seen.
  local -x PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # The tests of the Hopper kernels are skipped in a second where the GPU has none.
  local -A selected=(
    [hopper]="agrees_with_the_reference and on_a_gpu and (65x129 or 70x330)"
    [cuda]="agrees_with_the_reference and gpu and 140x300x40"
    [triton]="with_the_reference_on_a_gpu and bfloat16-bfloat16 and 140x600x40"
  )
  for tool in memcheck racecheck; do
    for test in hopper cuda triton; do
      phase "sanitizer_${test}_$tool" 25 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$python" -m pytest -o addopts= "tests/backends/test_$test.py" -q -p no:cacheprovider -x -k "${selected[$test]}"
    done
  done
}

# The whole suite is for machines without a GPU: it takes minutes of all cores, and most tests use no GPU.
run_smoke() { tests_phase smoke 30 -k "not on_a_gpu" tests/test_functional.py tests/backends/test_registry.py; }

phase build 60 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --target "$work/site" .
# Child processes must find the build as well.
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
found=$("$python" -c 'import fused_arcface; print(fused_arcface.__file__)')
if [[ $found != "$work/site/"* ]]; then
  echo "gpu_verify.sh: this build is not what Python imports, but '$found': see $out/logs/build.log, or uninstall" \
    "an editable fused-arcface" >&2
  exit 1
fi
if [[ -n ${WHEELS:-} ]]; then
  phase wheels 30 "$python" -m pip install --quiet --no-index --no-deps --target "$work/peers" "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:$work/peers
fi
# Caches of their own: kernels are compiled by this Triton, for this GPU. All phases share them.
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
cores=$(nproc)
processes=$((cores < 16 ? (cores + 1) / 2 : 8))

for name in "${chosen[@]}"; do "run_$name"; done
cat "$out/summary.json"
echo "results are in $out"
exit "$failed"
