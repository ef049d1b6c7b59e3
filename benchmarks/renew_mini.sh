#!/usr/bin/env bash
# The figures that hang on the mini's weights, measured anew on one GPU or two after training/recipe.sh. Those that are
# of a CPU, and pictures that need fonts for their labels, stand below as comments. With the packages of the other
# formats: pip install -e ".[baselines]".
#
#   bash benchmarks/renew_mini.sh training/work
#
# What each run says goes to a file in WORK/log. An interruption ends all of them.
set -uo pipefail

work=${1:?usage: bash benchmarks/renew_mini.sh WORK}
mkdir -p "$work/log"
# By these names in the commands that the results record.
ln -sfn "$work/original" ORIGINAL
ln -sfn "$work/classifier.safetensors" CLASSIFIER
rm -rf WORK # or repositories of earlier weights would be measured
mkdir WORK
cp -r "$work/nf4" WORK/calibrated
second=$(nvidia-smi --list-gpus 2> /dev/null | sed -n '2s/.*/1/p' || true) # where there are two, the formats are on this one
source "$(dirname "$0")/side_by_side.sh" "$work/log"

start 0 evaluate -m training.evaluate "$work" --model . --output training/report.json
evaluate=$!
start "${second:-0}" nf4_mini benchmarks/nf4_mini.py ORIGINAL --work WORK --output benchmarks/nf4_mini.json --device cuda \
  --dtype float32 --batch 50 --classifier CLASSIFIER --peers sdnq-uint4 quanto-int4 gguf-q4_0
formats=$!
start 0 blemishes -m training.blemishes "$work" --model . --output training/corners.png --card training/first_command.png
finish $!
start 0 products_mini benchmarks/products_mini.py --output benchmarks/products_mini.json --device cuda --batch 50 \
  --classifier CLASSIFIER
finish $! "$formats" # the next one takes the repositories that it made
start "${second:-0}" nf4_mini_bfloat16 benchmarks/nf4_mini.py ORIGINAL --work WORK \
  --output benchmarks/nf4_mini_bfloat16.json --device cuda --batch 50 --classifier CLASSIFIER \
  --peers sdnq-uint4 torchao-int4 torchao-float8 quanto-int4 gguf-q4_0
formats=$!
start 0 skipping_mini benchmarks/skipping_mini.py --output benchmarks/skipping_mini.json --device cuda --captions 200 \
  --batch 50 --classifier CLASSIFIER --no-times
skipping=$!
start "${second:-0}" nf4_sensitivity benchmarks/nf4_sensitivity.py ORIGINAL --output benchmarks/nf4_sensitivity.json \
  --device cuda --size 128 --captions 24 --batch 24 --scales scale_search
finish $! "$formats" "$skipping" "$evaluate"
# Alone, for its seconds. Takes the font of stage 0, or its picture from $work/teach/camel.npz.
start 0 lora_teach -m benchmarks.lora_teach --work "$work/teach" --output benchmarks/lora_teach.json \
  --grid docs/lora-teach.jpg
finish $!
# On a CPU, then:
#   python -m training.samples --model . --output training/samples.png
#   python benchmarks/rounding.py --widths 512 1024 --size 128 --output benchmarks/rounding_cpu.json
#   python benchmarks/quantize_cpu.py --work /tmp/quantize-cpu --output benchmarks/quantize_cpu.json --weights ORIGINAL
#   python benchmarks/skipping_mini.py --output benchmarks/skipping_cpu.json --grid benchmarks/skipping_cpu.jpg \
#     --captions 20 --batch 4
#   python -m benchmarks.serve load --output benchmarks/serve_cpu.json
#   python -m benchmarks.summary
