#!/usr/bin/env bash
# Builds the CUDA backend with its kernel tests and runs them on a machine with a GPU, nvcc and CMake:
# no network and no Node needed. Writes OUT/kernel-tests.json (one entry a test: ok, failed, skipped)
# and one log a test.
# --arch: see native/backend/cuda/CMakeLists.txt; on a Hopper 80on90 and 90 run what other chips run.
# Usage: scripts/gpu/run-kernel-tests.sh [--out DIR] [--arch 90a] [--bench] [--quick] [--sanitize]
set -uo pipefail
cd "$(dirname "$0")/../.."
out=build-gpu/results arch=90a bench=0 quick= sanitize=0
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift ;;
    --arch) arch=$2; shift ;;
    --bench) bench=1 ;;
    --quick) quick=quick ;;
    --sanitize) sanitize=1 ;;
    *) echo "unknown option $1; see the head of this file" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$out"
build=${TURBOMIND_GPU_BUILD:-build-gpu}
generator=(); command -v ninja >/dev/null && generator=(-G Ninja)
build() {  # folder, racecheck, targets...
  local folder=$1 racecheck=$2; shift 2
  cmake -S . -B "$folder" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DTURBOMIND_CUDA=ON -DTURBOMIND_CUDA_ARCHS="$arch" \
    -DTURBOMIND_RACECHECK="$racecheck" > "$out/configure.log" 2>&1 || { cat "$out/configure.log"; exit 1; }
  cmake --build "$folder" -j "$(nproc)" --target "$@" > "$out/build.log" 2>&1 ||
    { grep -E "error|warning" "$out/build.log" | head -40; tail -5 "$out/build.log"; exit 1; }
}
sanitized=(cuda_pointwise_test cuda_gemm_test cuda_attention_test cuda_sample_test cuda_backend_test)
build "$build" OFF turbomind_cuda kernel_bench "${sanitized[@]}" cuda_loader_test cuda_upload_test cuda_lost_device_test
[ $sanitize -eq 1 ] && build "$build-racecheck" ON "${sanitized[@]}"

status=0
entries=
limit=240  # seconds of a test
run() {  # name, command...
  local name=$1; shift
  local begin=$EPOCHREALTIME
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  local code=$?
  local seconds=$(awk "BEGIN { printf \"%.2f\", $EPOCHREALTIME - $begin }")
  local result=failed
  [ $code -eq 0 ] && result=ok
  [ $code -eq 77 ] && result=skipped
  [ $result = failed ] && status=1
  entries="$entries${entries:+,}{\"name\":\"$name\",\"result\":\"$result\",\"exit\":$code,\"seconds\":${seconds:-0}}"
  echo "== $name: $result ($seconds s)"
  grep -E "^(FAIL|SKIP)|^    |cases,|ERROR SUMMARY" "$out/$name.log" | cut -c1-200 | head -60
}
for test in cuda_pointwise_test cuda_sample_test cuda_upload_test cuda_gemm_test cuda_attention_test cuda_backend_test cuda_loader_test \
  cuda_lost_device_test; do
  run "$test" "$build/test/kernels/$test"
done
if [ $sanitize -eq 1 ]; then
  limit=${TURBOMIND_SANITIZE_SECONDS:-900}
  for tool in memcheck racecheck; do
    from=$build; [ $tool = racecheck ] && from=$build-racecheck
    for test in "${sanitized[@]}"; do
      # The backend's test makes an allocation fail on purpose.
      extra=(); [ $tool-$test = memcheck-cuda_backend_test ] && extra=(--report-api-errors no)
      few=; case $test in cuda_gemm_test|cuda_attention_test|cuda_sample_test) few=quick ;; esac
      run "$tool-$test" compute-sanitizer --tool "$tool" "${extra[@]}" --error-exitcode 9 "$from/test/kernels/$test" $few
    done
  done
fi
if [ $bench -eq 1 ]; then
  "$build/test/kernels/kernel_bench" "$out/kernel-bench.json" $quick 2>&1 | tee "$out/kernel-bench.log"
fi
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)
echo "{\"gpu\":\"$gpu\",\"arch\":\"$arch\",\"tests\":[$entries]}" > "$out/kernel-tests.json"
exit $status
