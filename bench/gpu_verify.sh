#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and ten minutes: builds the package as it stands, runs all tests,
# compute-sanitizer on small shapes, and the benchmark; needs no network. Results go to a folder of their own:
#
#   bench/gpu_verify.sh [folder, runs/gpu_verify/<date> by default]
#
#   summary.json           GPU, driver, versions, commit, date; each phase with its outcome and seconds
#   tests*.xml, *.log      what each phase said
#   bench/, bench_flash/   rows.csv and rows.json of the benchmark, as picked, and with the flash passes wherever they can run
#
# What is missing on the machine is said and skipped; a phase that fails does not stop the next. Exit status 1 if one failed.
# PYTHON names the interpreter, which must have torch, Triton, pytest and the build's tools.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=$(realpath -m "${1:-runs/gpu_verify/$(date -u +%Y-%m-%dT%H%M%S)}")
site=$out/site
mkdir -p "$out"
phases=()
failed=0

# phase NAME SECONDS COMMAND...: runs it for at most so long, keeps its output, notes how it went.
phase() {
  local name=$1 limit=$2 start=$SECONDS outcome=ok
  shift 2
  echo "==> $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  if ((status == 124 || status == 137)); then
    outcome="ran out of its $limit s"
  elif ((status != 0)); then
    outcome="failed with status $status"
  fi
  if [[ $outcome != ok ]]; then
    failed=1
    tail -n 40 "$out/$name.log"
  else
    tail -n 4 "$out/$name.log"
  fi
  echo "    $outcome, $((SECONDS - start)) s"
  phases+=("$name=$outcome=$((SECONDS - start))")
}

skip() {
  echo "==> $1: skipped, $2"
  phases+=("$1=skipped: $2=0")
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

"$python" - <<'END' || exit 1
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu_verify.sh needs torch: {error}")
if not torch.cuda.is_available():
    sys.exit("gpu_verify.sh needs a GPU: torch sees no CUDA device")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
END

phase build 240 "$python" -m pip install --quiet --no-build-isolation --no-deps --target "$site" .
# The tests start child processes, which must find the build as well.
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
# A cache of its own: kernels are compiled by this Triton, for this GPU.
export TRITON_CACHE_DIR=$out/triton_cache

# The GPU's tests alone in a process: the memory that they measure is the device's.
phase tests_gpu 240 "$python" -m pytest tests/test_triton.py -m "not full" -k "not interpreter" -rs -s -p no:cacheprovider \
  --junitxml="$out/tests_gpu.xml"
grep -h "MB beyond" "$out/tests_gpu.log" || true
workers=()
if has xdist; then workers=(-n 8); fi
phase tests 240 "$python" -m pytest tests -m "not full" -k "not on_a_gpu" -rs -p no:cacheprovider "${workers[@]}" --junitxml="$out/tests.xml"

if command -v compute-sanitizer >/dev/null; then
  # Without PyTorch's cache each tensor is an allocation of its own, so that an access past its end is seen.
  for tool in memcheck racecheck; do
    phase "sanitizer_$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --target-processes all "$python" -m pytest tests/test_triton.py -q -p no:cacheprovider -x \
      -k "with_the_reference_on_a_gpu and bfloat16-140x600x40"
  done
else
  skip sanitizer "compute-sanitizer is not on the PATH"
fi

if "$python" -m fused_arcface bench --help >/dev/null 2>&1; then
  # Peers that need a package which is not installed are skipped by the benchmark, with the reason.
  phase bench 200 "$python" -m fused_arcface bench --device cuda --cases full --seconds 0.5 \
    --providers ours,eager,insightface,insightface-tf32,insightface-fp16,products --output "$out/bench"
  phase bench_flash 90 env FUSED_ARCFACE_TRITON_ALGORITHM=flash "$python" -m fused_arcface bench --device cuda --cases full \
    --seconds 0.5 --providers ours --backend triton --output "$out/bench_flash"
else
  skip bench "the command 'python -m fused_arcface bench' does not start: $("$python" -m fused_arcface bench --help 2>&1 | tail -n 1)"
fi

rm -rf "$site" "$TRITON_CACHE_DIR"
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
exit "$failed"
