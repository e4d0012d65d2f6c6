#!/usr/bin/env bash
# Does this code work on your GPU, and how fast? One command, at most 30 minutes; each part takes at most nine.
#
#   benchmarks/gpu_check.sh                   # all parts: tests, speed, train
#   benchmarks/gpu_check.sh tests             # one part
#   benchmarks/gpu_check.sh all --cpu         # rehearsal at tiny sizes on a machine without a GPU
#
# Ends in $OUT/gpu_check.json and a table, $OUT/gpu_check.txt (OUT is ./gpu_check unless it is set). A part that fails
# does not stop the others; the table names it, and the exit code is 1. PYTHON names the interpreter (python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT=${OUT:-$PWD/gpu_check}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # runs side by side
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-2}
export PYTHONUNBUFFERED=1
if [[ -d .whl ]]; then # packages for a machine without a network
  "${PYTHON:-python3}" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "${TMPDIR:-/tmp}/gpu_check_site" .whl/*.whl
  export PYTHONPATH=${TMPDIR:-/tmp}/gpu_check_site${PYTHONPATH:+:$PYTHONPATH}
fi
exec "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
