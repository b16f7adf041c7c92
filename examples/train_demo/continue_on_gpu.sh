#!/usr/bin/env bash
# Train the shipped demo model on: continue_on_gpu.sh OUT SECONDS [options of train_all]
#
# One course of COURSE seconds of training (1500 unless set), in as many calls of SECONDS as it
# takes: the same command again goes on where the last one ended, and once the course is over it
# says so and saves. In STATE (runs/onward unless set) lies the whole state, some 320 MB, which should
# outlast the call; OUT/w gets the averaged weights (five files, 54 MB) and training.json, renewed
# every 45 seconds. Where STATE is lost, a course goes on from an export of OUT/w with a fresh
# optimizer: FROM=runs/model continue_on_gpu.sh OUT SECONDS --used SECONDS_SO_FAR
# Run from the repository root after stages 1 and 2; see README.md.
set -uo pipefail
out=${1:?where to write} seconds=${2:?how long this call may take}
shift 2
exec "$(dirname "$0")/run_on_gpu.sh" "$out" "$seconds" \
  --restart "${FROM:-sparvar_jax/demo}" --state "${STATE:-runs/onward}" \
  --course-seconds "${COURSE:-1500}" --tokenizer-seconds 0 --distinct \
  --rate 1.5e-3 --constant 0.3 --final-rate 0 --memory 1500 \
  --last-weight 1.5 --text-until 0.5 --text-dropped 0.15 \
  --scenes 0.6 --variety 0.2 --plain-style noto --pool 65536 \
  --cycle 7 10 7 13 --batches 1280 256 80 32 "$@"
