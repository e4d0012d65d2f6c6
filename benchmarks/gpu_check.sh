#!/usr/bin/env bash
# Does this code work on your GPU, and how fast? Three commands in a row, each of at most nine minutes.
#
#   benchmarks/gpu_check.sh                   # tests, speed, train
#   benchmarks/gpu_check.sh speed             # only this part
#   CPU=1 benchmarks/gpu_check.sh             # rehearsal at tiny sizes on a machine without a GPU
#   benchmarks/gpu_check.sh wheels            # here, for a machine without a network: packages into .whl/
#
# tests: replayed CUDA graphs = eager, no waits in updates, resume, memory (tests/test_cuda.py)
# speed: updates, planner and acting of all files, eager and as CUDA graphs (speed.py)
# train: skimo.py in the maze, from the published model
#
# What they print is in $OUT/PART.log (OUT is ./gpu_check unless it is set). A part that fails does not stop the others;
# then the exit code is 1. PYTHON names the interpreter (python3).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
OUT=${OUT:-$PWD/gpu_check}
python=${PYTHON:-python3}
parts=${*:-tests speed train}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ $parts == wheels ]]; then # for Python 3.12 with torch, h5py, matplotlib, tensorboard, requests, pytest-xdist, tqdm
  names="mujoco mujoco-core glfw gymnasium farama-notifications gymnasium-robotics tyro docstring-parser typeguard
    platformdirs pooch"
  platforms=$(printf -- '--platform %s ' manylinux{_2_28,_2_27,_2_24,_2_17,2014,1}_x86_64)
  rm -rf .whl && mkdir .whl
  for name in $names; do
    version=$(sed -nE "s/^${name%-core}==([0-9.]+).*/\1/p" requirements.txt) # mujoco-core is as new as mujoco
    # shellcheck disable=SC2086
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
      -d .whl "$name${version:+==$version}" || exit
  done
  zip -qd .whl/gymnasium_robotics-*.whl '*/assets/adroit_hand/*' '*/assets/hand/*' '*/assets/fetch/*' '*/assets/stls/*'
  du -sh .whl
  exit
fi
if [[ -d .whl ]]; then
  site=${TMPDIR:-/tmp}/gpu_check_site
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

mkdir -p "$OUT"
device=cuda
if [[ -n ${CPU:-} ]]; then device=cpu; fi
export GPU_CHECK_DEVICE=$device GPU_CHECK_FACTS=$OUT/facts.jsonl
failed=

tests() { # those that play a GPU on the CPU are left out
  local chosen="cuda and not second_device and not one_device and not overwrote" cores
  cores=$(nproc)
  "$python" -m pytest -v -rA --tb=short -p no:cacheprovider -n $((cores < 12 ? cores : 12)) \
    --maxschedchunk 1 tests/test_cuda.py tests/test_dataset.py -k "$chosen"
}

speed() {
  local algos
  algos=$(basename -s .py algos/*.py)
  local flags=(--sizes kitchen --modes eager graphs --min-seconds 0.2)
  if [[ $device == cpu ]]; then flags=(--sizes maze --modes eager --quick); fi
  # shellcheck disable=SC2086
  "$python" benchmarks/speed.py --algos $algos --only pretrain update plan act --plan-envs 1 8 --device $device \
    "${flags[@]}" --out "$OUT/speed.json"
}

train() {
  local flags=(--total-timesteps 100000)
  if [[ $device == cpu ]]; then flags=(--total-timesteps 5000 --warmup-steps 4000 --num-envs 2 --eval-episodes 1); fi
  "$python" algos/skimo.py --env-id maze --pretrained published --device $device --run-dir "$OUT/runs" "${flags[@]}"
}

rm -f "$GPU_CHECK_FACTS"
for part in $parts; do
  echo "$(date +%T) $part: see $OUT/$part.log"
  (export -f "$part"; export python device OUT; timeout -s INT -k 30 540 bash -c "$part") >"$OUT/$part.log" 2>&1 ||
    failed="$failed $part"
  tail -n 40 "$OUT/$part.log"
done
if [[ -n $failed ]]; then echo "error:$failed failed" && exit 1; fi
