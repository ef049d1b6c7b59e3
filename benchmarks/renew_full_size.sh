#!/usr/bin/env bash
# The figures of the full-size architecture with random weights that hang on this package's speed, measured anew on one
# H100 or two. With the packages of the other formats: pip install -e ".[baselines]".
#
#   bash benchmarks/renew_full_size.sh FOLDER
#
# FOLDER takes 41 GB, best in memory: the original and its NF4 repository, made there unless they are. What each run says
# goes to a file in FOLDER/log. An interruption ends all of them; the same command goes on from there, as long as no
# Python file has changed.
set -uo pipefail

folder=${1:?usage: bash benchmarks/renew_full_size.sh FOLDER}
mkdir -p "$folder/log"
# By this name in the commands that the results record.
ln -sfn "$(realpath "$folder")" FOLDER
code=$(find ernie_image_nf4 benchmarks -name '*.py' | sort | xargs cat | sha256sum)
if [ "$code" != "$(cat FOLDER/measured/code 2> /dev/null)" ]; then
  rm -rf FOLDER/measured FOLDER/alone.json # which benchmarks.serve keeps
  mkdir FOLDER/measured
  echo "$code" > FOLDER/measured/code
fi
second="" # a GPU of its own for the other formats, unless the caller has chosen one for all
[ -n "${CUDA_VISIBLE_DEVICES:-}" ] || second=$(nvidia-smi --list-gpus 2> /dev/null | sed -n '2s/.*/1/p')
source "$(dirname "$0")/side_by_side.sh" FOLDER/log

run() { # GPU NAME RESULT MODULE ARGUMENTS...: unless it is measured; RESULT becomes benchmarks/NAME_h100.json
  local gpu=$1 name=$2 result=FOLDER/measured/$3
  shift 3
  [ -e "FOLDER/measured/$name.done" ] && return
  start "$gpu" "$name" -m "$@"
  finish $! && cp "$result" "benchmarks/${name}_h100.json" && touch "FOLDER/measured/$name.done"
}

start 0 synthetic -c "import sys; from ernie_image_nf4.benchmarking.run import make_synthetic; make_synthetic(sys.argv[1])" FOLDER
finish $! || exit 1

speed() {
  run 0 benchmark benchmark/benchmark.json ernie_image_nf4 benchmark --synthetic FOLDER --out-dir FOLDER/measured/benchmark --resume
  run 0 lora lora.json benchmarks.lora --work FOLDER --output FOLDER/measured/lora.json
}
others() {
  run "$second" peers peers.json benchmarks.peers --synthetic FOLDER --output FOLDER/measured/peers.json --resume
  run "$second" serve serve.json benchmarks.serve speed --work FOLDER --output FOLDER/measured/serve.json
}
if [ -n "$second" ]; then
  (end_together && speed) &
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
#   python -m benchmarks.calibrate --work FOLDER --output benchmarks/calibrate_h100.json --variants scale_search,calibrated \
#     --keep-files
#   for size in 512 1024; do python benchmarks/skipping_mini.py --output benchmarks/skipping_h100_$size.json \
#     --device cuda --dtype bfloat16 --model FOLDER/ERNIE-Image-NF4 --size $size --steps 50 --captions 4; done
#   python -m benchmarks.summary
