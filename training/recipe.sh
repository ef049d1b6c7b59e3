#!/usr/bin/env bash
# All stages of README.md on one GPU or two, from the inputs of stages 0 and 1 to weights in this checkout, side by side
# where they don't wait for each other. What an earlier run left in WORK is removed first, unless GO_ON=1 goes on with it.
#
#   VAE_SECONDS=490 DIT_SECONDS=630 bash training/recipe.sh training/work
#
# What each stage says goes to a file in WORK/log. The first that fails ends the others, and so does an interruption.
set -euo pipefail

work=${1:?usage: bash training/recipe.sh WORK}
mkdir -p "$work/log"
vae=$work/original/vae transformer=$work/original/transformer classifier=$work/classifier.safetensors
# Else the transformer would take the earlier run's latents, or go on with its weights.
[ -n "${GO_ON:-}" ] || rm -rf "$vae" "$transformer" "$classifier" "$work/pools.pt" "$work/dit.pt"
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT # a stage that waits for one that failed would wait for ever
trap 'exit 130' INT
trap 'exit 143' TERM
# A second GPU takes all but the VAE.
second=$(nvidia-smi --list-gpus 2> /dev/null | sed -n '2s/.*/1/p' || true)

start() { # GPU NAME ARGUMENTS...: one stage in the background, its words in a file
  local gpu=$1 name=$2
  shift 2
  CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$gpu} python3 -m "training.$name" "$@" > "$work/log/$name" 2>&1 &
}

# The transformer compiles and prepares captions while the VAE is trained, then takes its latents.
[ -e "$transformer" ] || start "${second:-0}" dit "$work" --seconds "${DIT_SECONDS:-630}" --no-monitor --scenes 128000
[ -e "$classifier" ] || start "${second:-0}" classifier "$work" --seconds "${CLASSIFIER_SECONDS:-150}"
[ -e "$vae" ] || start 0 vae "$work" --seconds "${VAE_SECONDS:-490}"
for _ in $(jobs -p); do
  wait -n # for whichever ends next
done
start 0 export "$work" --enhancer . --install .
wait $!
