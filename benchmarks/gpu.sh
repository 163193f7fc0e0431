#!/usr/bin/env bash
# What needs a GPU, within ten minutes: the tests marked gpu, the kernels, the whole command, and a sweep of tile sizes.
#
#   benchmarks/gpu.sh [--dry] [FOLDER]
#
# FOLDER (build/gpu by default) receives tests.txt and CASE.json, each with the device and the versions, and steps.txt,
# which says how every step ended. --dry interprets the kernels at tiny sizes, to see without a GPU that all of it runs.
# PYTHON names the interpreter whose torch sees the GPU, GPU_SECONDS another limit. What that one lacks is installed into
# an environment on top of it, from the package index or, where there is none, from the folder that PIP_FIND_LINKS names.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

dry=
if [ "${1:-}" = --dry ]; then
  dry=1
  shift
fi
case "${1:-}" in -*) echo "gpu.sh: expected --dry or a folder, found $1" >&2; exit 2 ;; esac
mkdir -p "${1:-build/gpu}" || exit 1
out=$(cd "${1:-build/gpu}" && pwd)
python=${PYTHON:-python3}
ends=$((SECONDS + ${GPU_SECONDS:-600}))

# A package, and what it is imported as where that differs. torch is the image's: another build may not see its GPU.
missing=$("$python" - <<'PY'
import importlib.util

packages = ("blake3", "click", "hypothesis", "msgspec", "numpy", "pytest", "rich", "safetensors", "triton")
print(*(name for name in packages if importlib.util.find_spec(name) is None))
PY
) || exit 1
if [ -n "$missing" ]; then
  echo "installing what $python lacks: $missing"
  "$python" -m venv --system-site-packages "$out/venv" || exit 1
  python=$out/venv/bin/python
  # shellcheck disable=SC2086 # a list of names
  "$python" -m pip install -q -c <(grep -v '^torch==' constraints.txt) $missing || exit 1
fi
if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch of $python sees no GPU; --dry tries everything without one" >&2
  exit 1
fi

export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
tiny=()
if [ -n "$dry" ]; then
  export TRITON_INTERPRET=1
  tiny=(--tiny --runs 1)
fi

: >"$out/steps.txt"
failed=0
step() {
  local name=$1 started=$SECONDS code
  shift
  echo "== $name"
  timeout $((ends > SECONDS ? ends - SECONDS : 1)) "$@"
  code=$?
  [ "$code" = 0 ] || failed=1
  echo "$name: exit code $code after $((SECONDS - started)) s$([ "$code" = 124 ] && echo ', out of time')" |
    tee -a "$out/steps.txt"
}

tests() {
  "$python" -c 'import torch; from benchmarks.machine import gpu; print(gpu() or "no GPU", "torch", torch.__version__)'
  local files=(tests/kernels)
  # A search needs packages that an image with a GPU may lack.
  "$python" -c 'import accelerate, optuna, peft, transformers' 2>/dev/null && files+=(tests/test_search.py)
  "$python" -m pytest -q -rs -p no:cacheprovider -m gpu "${files[@]}"
}
export -f tests
export python
step tests bash -o pipefail -c "tests 2>&1 | tee '$out/tests.txt'"
for name in kernels-gpu command-gpu sweep-gpu; do
  step "$name" "$python" -m benchmarks "$name" "${tiny[@]}" --json "$out" --work "$out/work"
done
rm -rf "$out/work"
exit "$failed"
