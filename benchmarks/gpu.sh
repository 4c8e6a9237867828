#!/usr/bin/env bash
# All that a machine with a GPU can tell, in at most eight minutes; nothing is installed or downloaded.
#
#   benchmarks/gpu.sh [FOLDER]             results as JSON, logs and one page, performance-gpu.md [runs/gpu]
#   benchmarks/gpu.sh --dry-run [FOLDER]   the same steps at tiny sizes on a CPU, kernels in Triton's interpreter
#
# A step that cannot run is reported and the rest goes on; whatever is measured is printed and written at once.
# PYTHON names the interpreter [python3]; it needs torch, numpy, pytest with pytest-xdist, hypothesis, rich,
# matplotlib, timm and transformers.
set -u
cd "$(dirname "$0")/.." || exit 2
dry=""
[ "${1:-}" = --dry-run ] && { dry=1; shift; }
out=${1:-runs/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH="src:tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=120
if [ -n "$dry" ]; then
  export TRITON_INTERPRET=1
  workers=2
  tables=(--device cpu --shapes one-pixel --rounds 1)
  training=(--device cpu --training segnext_t --shrink 8 --rounds 1)
else
  workers=$(($(nproc) > 16 ? 16 : $(nproc))) # most of their time is compiling
  tables=(--device cuda --shapes coco --rounds 5)
  training=(--device cuda --training --rounds 5)
fi
benchmark=("$python" -m freqfusion benchmark)

# step NAME SECONDS COMMAND...: at most so long; what it prints goes to the screen and to NAME.log
step() {
  local name=$1 seconds=$2 code
  shift 2
  printf '\n== %s (at most %s s, begun %s)\n' "$name" "$seconds" "$(date +%T)"
  timeout -k 5 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) echo "$name: done" ;;
    124 | 137) echo "$name: the time was up" ;;
    *) echo "$name: failed with code $code" ;;
  esac | tee -a "$out/steps.txt"
}

: >"$out/steps.txt"
step tests 100 "$python" -m pytest -m gpu -n "$workers" -vv -p no:cacheprovider tests/ops tests/fusion tests/analysis
if [ -n "$dry" ]; then
  step kernels 100 "$python" benchmarks/gpu_steps.py kernels
elif command -v compute-sanitizer >/dev/null; then
  step memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool memcheck --target-processes all --error-exitcode 9 "$python" benchmarks/gpu_steps.py kernels
else
  echo "memcheck: compute-sanitizer is not installed" | tee -a "$out/steps.txt"
fi
step profile 75 "$python" benchmarks/gpu_steps.py profile "$out"
tables=("${benchmark[@]}" --ops carafe local_similarity resample normalize freqfusion "${tables[@]}")
step bfloat16 100 "${tables[@]}" --dtype bfloat16 --compile --minutes 1.3 --out "$out/bfloat16"
step float32 40 "${tables[@]}" --dtype float32 --minutes 0.4 --out "$out/float32"
step training 85 "${benchmark[@]}" "${training[@]}" --minutes 1.1 --out "$out/training"
step page 15 "$python" benchmarks/gpu_steps.py page "$out"
