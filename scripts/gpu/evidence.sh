#!/usr/bin/env bash
# What docs/performance.md says of a GPU, measured again on one that nothing else uses: the product's checks,
# logits against Transformers, kernels, steps, tables and services. Kernel tests and sanitizers are
# run-kernel-tests.sh's. Needs the built addon, dist/, the CUDA library and kernel_bench; PyTorch for references and
# checkpoints, which it makes in WORK (25 GB) and finds there the next time. Each step leaves a log, or a JSON
# document, in OUT and prints one line; one that fails does not end the rest.
# Usage: scripts/gpu/evidence.sh OUT WORK [--build DIR] [--bf16 DIR] [--parts LIST]
#   --build  CMake build with kernel_bench and libstep_trace.so (build-native)
#   --bf16   folder of tiny-internvl's bf16 weights, for the golden cases
#   --parts  of checks,logits,kernels,steps,tables,service; all of them by default
# NODE names the Node binary, TM_CUPTI libcupti for the tables. Without a GPU it prints SKIP and exits 0.
set -uo pipefail
[ $# -ge 2 ] || { sed -n 2,12p "$0" >&2; exit 2; }
out=$(realpath -m "$1") work=$(realpath -m "$2"); shift 2
cd "$(dirname "$0")/../.."
build=build-native bf16= parts=checks,logits,kernels,steps,tables,service
while [ $# -gt 1 ]; do
  case $1 in
    --build) build=$2 ;;
    --bf16) bf16=$2 ;;
    --parts) parts=$2 ;;
    *) echo "unknown option $1; see the head of this file" >&2; exit 2 ;;
  esac
  shift 2
done
[ $# -eq 0 ] || { echo "$1 needs a value; see the head of this file" >&2; exit 2; }
for part in ${parts//,/ }; do
  case $part in
    checks | logits | kernels | steps | tables | service) ;;
    *) echo "--parts: no part '$part'; see the head of this file" >&2; exit 2 ;;
  esac
done
nvidia-smi -L > /dev/null 2>&1 || { echo "SKIP: no GPU"; exit 0; }
mkdir -p "$out" "$work" || exit 1
node=${NODE:-node} tests=$build/test/kernels status=0

step() {  # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS code=0; shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  echo "$name: exit $code, $((SECONDS - begin)) s $(grep -a 'checks passed' "$out/$name.log" | tail -1)"
  [ "$code" -eq 0 ] || status=1
  return "$code"
}
wants() { case ",$parts," in *",$1,"*) return 0 ;; esac; return 1; }
checkpoint() {  # folder, shape, arguments...: made once
  local folder=$work/$1; shift
  [ -e "$folder/done" ] && return
  step "make-$(basename "$folder")" 600 python3 scripts/gpu/make_checkpoint.py "$1" "$folder" "${@:2}" && touch "$folder/done"
}
bench() {  # name, checkpoint, session, arguments...
  step "$1" 600 "$node" scripts/gpu/bench-gpu.mjs "$work/$2" --session "$3" --out "$out/$1.json" "${@:4}"
}
# name, checkpoint, session, new tokens, ...: so many that all prompts are read before the first answer ends
table() { bench "table-$1" "$2" "$3" --new "$4" "${@:5}" --repeats 1 --kernels "$tests/libstep_trace.so" --peaks "$out/peaks.json"; }

nvidia-smi --query-gpu=name,driver_version,temperature.gpu --format=csv,noheader | tee "$out/gpu.txt"
if wants kernels || wants tables; then step peaks 120 python3 scripts/gpu/device_peaks.py "$out/peaks.json"; fi

if wants checks; then
  step test-gpu 900 "$node" scripts/gpu/test-gpu.mjs --out "$out" ${bf16:+--bf16 "$bf16"}
fi

if wants logits; then
  for of in qwen2.5-32b:2:awq qwen2.5-7b:3:none internvl2.5-4b:2:none internvl2.5-4b:2:awq; do
    IFS=: read -r shape layers quant <<< "$of"
    name=layers-$shape-$quant picture=(); [[ $shape = internvl* ]] && picture=(--picture)
    checkpoint "$name" "$shape" --layers "$layers" --quant "$quant" || continue
    step "trace-$name" 300 "$node" scripts/gpu/bench-gpu.mjs "$work/$name" --batch 1 --repeats 1 --new 4 "${picture[@]}" --trace "$work/$name.json"
    step "logits-$name" 300 python3 scripts/gpu/reference_logits.py "$work/$name" "$work/$name.json" --out "$out/logits-$name.json"
  done
fi

if wants kernels; then
  for part in quick layers decode prefill vision; do
    step "kernels-$part" 300 "$tests/kernel_bench" "$out/kernels-$part.json" $part
  done
fi

if wants steps || wants tables || wants service; then
  checkpoint 32b qwen2.5-32b --quant awq
  checkpoint 4b internvl2.5-4b --quant awq
fi
if wants steps; then
  bench steps-32b 32b 2048 --batch 1,16,64 --context 1024
  bench steps-32b-kv8 32b 2048 --batch 64 --context 1024 --quant 8
  bench steps-4b 4b 2048 --batch 1,16,64 --context 1024
fi
if wants tables; then
  table 32b-1k 32b 2048 24 --batch 1,16,64 --context 1024
  table 32b-1k-kv8 32b 2048 24 --batch 64,256 --context 1024 --quant 8
  table 32b-8k 32b 8448 24 --batch 1,16 --context 8192
  table 32b-8k-kv4 32b 8448 24 --batch 64 --context 8192 --quant 4
  table 4b-1k 4b 2048 24 --batch 1,16,64,256 --context 1024
  table 4b-8k 4b 8448 24 --batch 1,16,64 --context 8192
  table 4b-8k-kv8 4b 8576 330 --batch 256 --context 8192 --quant 8
fi
if wants service; then
  for model in 32b 4b; do
    for run in 1 2; do
      step "first-$model-$run" 300 "$node" scripts/gpu/bench-service.mjs "$work/$model" --parts first --out "$out/first-$model-$run.json"
    done
    step "load-$model" 600 "$node" scripts/gpu/bench-load.mjs "$work/$model" --out "$out/load-$model.json"
  done
  step full 900 "$node" scripts/gpu/bench-service.mjs "$work/32b" --parts full --quant 0,8,4 --out "$out/full.json"
  step picture 300 "$node" scripts/gpu/bench-service.mjs "$work/4b" --parts picture --out "$out/picture.json"
  step arrivals-32b 600 "$node" scripts/gpu/bench-service.mjs "$work/32b" --parts arrivals --chunk 2048 --prompts 2 --goal 20 --out "$out/arrivals-32b.json"
  step arrivals-4b 600 "$node" scripts/gpu/bench-service.mjs "$work/4b" --parts arrivals --chunk 2048 --prompts 2 --goal 5 --out "$out/arrivals-4b.json"
fi
exit $status
