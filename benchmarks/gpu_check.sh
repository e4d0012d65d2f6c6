#!/usr/bin/env bash
# Does this code work on your GPU, and how fast? One command, at most 30 minutes; each part takes at most nine.
#
#   benchmarks/gpu_check.sh                   # all parts: tests, speed, train
#   benchmarks/gpu_check.sh tests             # one part
#   benchmarks/gpu_check.sh all --cpu         # rehearsal at tiny sizes on a machine without a GPU
#   benchmarks/gpu_check.sh wheels            # here, for a machine without a network: packages into .whl/ (23 MB)
#
# Ends in $OUT/gpu_check.json and a table, $OUT/gpu_check.txt (OUT is ./gpu_check unless it is set). A part that fails
# does not stop the others; the table names it, and the exit code is 1. PYTHON names the interpreter (python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT=${OUT:-$PWD/gpu_check}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # runs side by side
export PYTHONUNBUFFERED=1
if [[ ${1:-} == wheels ]]; then # for Python 3.12 with torch, h5py, matplotlib, tensorboard, requests, pytest-xdist, tqdm
  names="mujoco mujoco-core glfw gymnasium farama-notifications gymnasium-robotics tyro docstring-parser typeguard
    platformdirs pooch"
  rm -rf .whl && mkdir .whl
  for name in $names; do
    version=$(sed -nE "s/^${name%-core}==([0-9.]+).*/\1/p" requirements.txt) # mujoco-core is as new as mujoco
    "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
      --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
      -d .whl "$name${version:+==$version}"
  done
  zip -qd .whl/gymnasium_robotics-*.whl '*/assets/adroit_hand/*' '*/assets/hand/*' '*/assets/fetch/*' '*/assets/stls/*'
  du -sh .whl
  exit
fi
if [[ -d .whl ]]; then # packages for a machine without a network
  "${PYTHON:-python3}" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "${TMPDIR:-/tmp}/gpu_check_site" .whl/*.whl
  export PYTHONPATH=${TMPDIR:-/tmp}/gpu_check_site${PYTHONPATH:+:$PYTHONPATH}
fi
exec "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
