#!/usr/bin/env bash
# The whole chain as a shell script: data, a teacher, masked image modelling from it, CLIP from that tower, a student,
# an export and its evaluation. Stop it whenever you like and start it again: finished stages answer at once, and an
# interrupted one goes on from its last checkpoint.
#
#     bash docs/examples/chain.sh          # recipes demo/..., minutes
#     RECIPES=debug bash docs/examples/chain.sh   # the same commands in seconds, at a size that learns nothing
set -euo pipefail
recipes=${RECIPES:-demo}

stage() { # stage COMMAND RECIPE: run it, or go on with it where its run folder exists
  local resume=()
  if [ -e "runs/$2/status.json" ]; then resume=(--resume); fi
  evatool "$1" "$2" "${resume[@]}"
}

stage data-prepare "$recipes/data-prepare"
stage train-clip "$recipes/train-clip"
stage pretrain-mim "$recipes/pretrain-mim"
stage train-clip "$recipes/train-clip-mim"
stage distill "$recipes/distill"
stage export "$recipes/export"
stage eval "$recipes/eval"

# One object on standard output, for scripts that read on.
evatool eval "$recipes/eval" --resume --json > eval.json
python3 -c 'import json; print(json.load(open("eval.json"))["metrics"])'
