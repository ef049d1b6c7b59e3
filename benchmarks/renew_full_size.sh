#!/usr/bin/env bash
# The figures of the full-size architecture with random weights that hang on this package's speed, measured anew on one
# H100 or two. With the packages of the other formats: pip install -e ".[baselines]".
#
#   bash benchmarks/renew_full_size.sh FOLDER
#
# FOLDER takes 41 GB, best in memory: the original and its NF4 repository, made there unless they are. What each run says
# goes to a file in FOLDER/log.
set -uo pipefail

folder=${1:?usage: bash benchmarks/renew_full_size.sh FOLDER}
mkdir -p "$folder/log"
rm -rf "$folder/benchmark" # or an earlier result would be taken for this one's
second="" # a GPU of its own for the other formats, unless the caller has chosen one for all
[ -n "${CUDA_VISIBLE_DEVICES:-}" ] || second=$(nvidia-smi --list-gpus 2> /dev/null | sed -n '2s/.*/1/p')

run() { # GPU NAME MODULE ARGUMENTS...: its words in a file; the others go on if it fails
  local gpu=$1 name=$2
  shift 2
  CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$gpu} python3 -m "$@" > "$folder/log/$name" 2>&1 || echo "$name failed: see $folder/log/$name" >&2
}

python3 -c "import sys; from ernie_image_nf4.benchmarking.run import make_synthetic; make_synthetic(sys.argv[1])" "$folder"

speed() {
  run 0 benchmark ernie_image_nf4 benchmark --synthetic "$folder" --out-dir "$folder/benchmark"
  cp "$folder/benchmark/benchmark.json" benchmarks/benchmark_h100.json
  run 0 lora benchmarks.lora --work "$folder" --output benchmarks/lora_h100.json
}
others() {
  run "$second" peers benchmarks.peers --synthetic "$folder" --output benchmarks/peers_h100.json
  run "$second" serve benchmarks.serve speed --work "$folder" --output benchmarks/serve_h100.json
}
if [ -n "$second" ]; then
  speed &
  others
  wait
else
  second=0
  speed
  others
fi
# One GPU each, and nothing else on it, then:
#   python -m benchmarks.cards --synthetic FOLDER
#   python -m benchmarks.threads_and_reloads
#   python -m benchmarks.calibrate --work FOLDER --output benchmarks/calibrate_h100.json --variants scale_search,calibrated
#   python -m benchmarks.summary
