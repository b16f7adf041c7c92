#!/usr/bin/env bash
# Train the demo model: run_on_gpu.sh OUT SECONDS [options of train_all]
#
# Ends SECONDS after it began, compilation included. OUT/w holds the weights (five files, 54 MB) and
# training.json; both are renewed every 45 seconds, so a run that is cut off loses little. To go on
# from weights or from an exported model, add
#     --restart FOLDER --tokenizer-seconds 0 --span 0.4 1
# Run from the repository root after stages 1 and 2; see README.md.
set -uo pipefail
out=${1:?where to write} seconds=${2:?how long to train}
shift 2
mkdir -p "$out/w"
export PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.93}
export XLA_FLAGS=${XLA_FLAGS:---xla_gpu_enable_triton_gemm=false}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/sparvar_jax/training}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=8
export TF_CPP_MIN_LOG_LEVEL=2
# The training stops by itself; the signal is for a step that hangs.
timeout --kill-after=5 $((seconds + 15)) \
  python3 -m examples.train_demo.train_all --seconds "$seconds" --out "$out/w" "$@" 2>&1 |
  tee "$out/train.log"
