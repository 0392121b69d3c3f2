#!/bin/bash
# One command for a bare CUDA machine: build, checks, tests and benchmark of every kernel, within 10 minutes.
#
# usage: benchmarks/gpu_session.sh [all|check|bench|e2e|train|drop-in]    default all: check and bench
#
#   check   build, doctor, every op at tiny shapes, the same under compute-sanitizer, the kernels' tests
#   bench   build if need be, benchmark of the ops
#   e2e     build if need be, whole tasks against the published algorithm, with profiles: ten minutes by itself
#   train   build if need be, a Pair-DPO step against the published algorithm, at 256 and 1,024 tokens an image
#   drop-in build if need be, the published class's methods before and after hermesflow.accelerate, on its stand-in
#
# Needs a python3 with torch (CUDA), triton, pytest and this package's dependencies, and nvcc; no network. Environment:
#   OUT      folder of logs and JSON lines               [benchmarks/results]
#   WHEELS   folder of wheels to install first           [none]
#   PYTHON   interpreter                                 [python3]
#   DEVICE   cuda, or cpu to rehearse the session        [cuda]
#   SHAPE    shape class of the benchmark                [showo-1.3b; tiny on the cpu]
#   DTYPE    of the model in e2e and train           [bfloat16; float32 on the cpu]
#   LIMIT    seconds for everything                      [590]
#   BENCH_SECONDS   of these, kept for the benchmark     [210]
#   BENCH_OPTIONS   further options of the benchmark     [none]
#
# A step that fails or runs out of time does not keep the next ones from running; the exit code is 1 if any did.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
if [ "$DEVICE" = cuda ]; then SHAPE=${SHAPE:-showo-1.3b}; else SHAPE=${SHAPE:-tiny}; fi
if [ "$DEVICE" = cuda ]; then DTYPE=${DTYPE:-bfloat16}; else DTYPE=${DTYPE:-float32}; fi
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LIMIT=${LIMIT:-590}
BENCH_SECONDS=${BENCH_SECONDS:-210}
LINES_FILE=$OUT/ops-$DEVICE-$SHAPE.jsonl
E2E_FILE=$OUT/e2e-$DEVICE-$SHAPE-$DTYPE.jsonl
export PYTHONSAFEPATH=1 # the folder kernels/ must not shadow the package of that name

if [ "$DEVICE" = cuda ]; then missing=cuda_missing; else missing=cpu_missing; fi
PROBE=("$PYTHON" -c "import sys; from hermesflow.kernels import checks; sys.exit(checks.$missing())")
green=() # options of the benchmark: after `check`, the ops whose tests passed
last_code=0

reserved=0 # seconds that the steps to come may count on
failed=0
summary=()

note() { # note STEP SECONDS RESULT LAST_WORDS
    summary+=("$(printf '%-24s %5s s  %-22s %s' "$1" "$2" "$3" "${4:-}")")
}

# step NAME SECONDS COMMAND...: runs it with a time limit, its output goes to OUT/NAME.log, and notes how it ended.
step() {
    local name=$1 limit=$2 code=0 begin=$SECONDS result left
    shift 2
    left=$((LIMIT - SECONDS - reserved))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        failed=1 last_code=1
        note "$name" 0 "left out: no time"
        return
    fi
    echo "== $name, at most $limit s: $*"
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    last_code=$code
    case $code in
    0) result=ok ;;
    124 | 137) result="cut after $limit s" ;;
    *) result="failed, exit code $code" ;;
    esac
    if [ "$code" -ne 0 ]; then
        failed=1
        tail -n 25 "$OUT/$name.log" | sed 's/^/   /'
    fi
    note "$name" $((SECONDS - begin)) "$result" "$(last_words "$OUT/$name.log")"
}

# What pytest, every_op or compute-sanitizer counted in the end.
last_words() {
    { grep -aE '[0-9]+ (passed|failed)|SUMMARY' "$1" || true; } | tail -n 1 | sed 's/^=* *//; s/ *=*$//' | cut -c 1-80
}

build() {
    local wheel
    if [ -n "${WHEELS:-}" ]; then
        for wheel in "$WHEELS"/*.whl; do # each by itself: one that does not fit must not keep the others out
            step "wheel-$(basename "$wheel" | cut -d- -f1)" 60 "$PYTHON" -m pip install --no-index --no-deps "$wheel"
        done
    fi
    if [ "$DEVICE" = cuda ] && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
        TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))') || true
        export TORCH_CUDA_ARCH_LIST
    fi
    step build 240 "$PYTHON" -m pip install -v --no-build-isolation --no-deps -e .
    step extension 60 "${PROBE[@]}" # the install succeeds without it
}

check() {
    local backend=() sanitizer tool file
    if [ "$DEVICE" = cuda ]; then backend=(--backend cuda); fi
    step check-triton 90 "$PYTHON" .ci/check-triton
    step doctor 60 "$PYTHON" -m hermesflow doctor
    step every-op 60 "$PYTHON" -m hermesflow.benchmarks.every_op --device "$DEVICE"
    sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    for tool in memcheck racecheck; do
        if [ "$DEVICE" != cuda ]; then
            note "$tool" 0 "left out: needs CUDA"
        elif [ ! -x "$sanitizer" ]; then
            note "$tool" 0 "left out: no $sanitizer"
        else
            # Without torch's cache of memory an access beyond a tensor is one beyond an allocation.
            step "$tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 1 \
                --kernel-name kns=hermesflow "$PYTHON" -m hermesflow.benchmarks.every_op --device cuda "${backend[@]}"
        fi
    done
    for file in tests/kernels/test_*.py; do
        case $file in *without_a_gpu.py) continue ;; esac
        step "$(basename "$file" .py)" 90 "$PYTHON" -m pytest -q -rs --import-mode=importlib -p no:cacheprovider "$file"
        if [ "$last_code" -eq 0 ] && grep -q '^OP = ' "$file"; then
            green+=(--op "$(basename "$file" .py | sed 's/^test_//')")
        fi
    done
}

bench() {
    local plot=()
    if "$PYTHON" -c 'import matplotlib' 2>/dev/null; then plot=(--plot "${LINES_FILE%.jsonl}.png"); fi
    # After `check` only what passed is timed; by itself the benchmark runs each op's tests first.
    if [ "${#green[@]}" -gt 0 ]; then green+=(--no-test); fi
    # shellcheck disable=SC2086 # BENCH_OPTIONS is a list of options
    step bench-ops 400 "$PYTHON" -m hermesflow bench ops --device "$DEVICE" --shape "$SHAPE" --out "$LINES_FILE" \
        "${green[@]}" "${plot[@]}" ${BENCH_OPTIONS:-}
    table "$LINES_FILE"
}

e2e() {
    # shellcheck disable=SC2086 # BENCH_OPTIONS is a list of options
    step bench-e2e 570 "$PYTHON" -m hermesflow bench e2e --device "$DEVICE" --shape "$SHAPE" --dtype "$DTYPE" \
        --out "$E2E_FILE" --profile "${E2E_FILE%.jsonl}" ${BENCH_OPTIONS:-}
    tail -n 3 "$OUT/bench-e2e.log" # the paper's protocol in hours
    table "$E2E_FILE"
}

train() {
    local shape shapes=("$SHAPE") lines_file
    if [ "$SHAPE" = showo-1.3b ]; then shapes=(showo-1.3b-256 showo-1.3b); fi
    for shape in "${shapes[@]}"; do
        lines_file=$OUT/train-$DEVICE-$shape-$DTYPE.jsonl
        # shellcheck disable=SC2086 # BENCH_OPTIONS is a list of options
        step "bench-train-$shape" 240 "$PYTHON" -m hermesflow bench train --device "$DEVICE" --shape "$shape" \
            --dtype "$DTYPE" --out "$lines_file" ${BENCH_OPTIONS:-}
        table "$lines_file"
    done
}

drop_in() {
    local lines_file=$OUT/drop-in-$DEVICE-$SHAPE-$DTYPE.jsonl
    # shellcheck disable=SC2086 # BENCH_OPTIONS is a list of options
    step bench-drop-in 560 "$PYTHON" -m hermesflow bench drop-in --device "$DEVICE" --shape "$SHAPE" --dtype "$DTYPE" \
        --out "$lines_file" ${BENCH_OPTIONS:-}
    table "$lines_file"
}

table() { # table LINES_FILE: what was measured, also of a benchmark that was cut
    if [ -s "$1" ]; then
        "$PYTHON" -m hermesflow bench table "$1" | tee "${1%.jsonl}.md" || failed=1
    fi
}

case ${1:-all} in
all)
    reserved=$BENCH_SECONDS
    build
    check
    reserved=0
    bench
    ;;
check)
    build
    check
    ;;
bench)
    "${PROBE[@]}" 2>/dev/null || build
    bench
    ;;
e2e)
    "${PROBE[@]}" 2>/dev/null || build
    e2e
    ;;
train)
    "${PROBE[@]}" 2>/dev/null || build
    train
    ;;
drop-in)
    "${PROBE[@]}" 2>/dev/null || build
    drop_in
    ;;
*)
    sed -n '4,10p' "$0" | sed 's/^# \{0,1\}//' >&2
    exit 2
    ;;
esac

echo
printf '%s\n' "${summary[@]}"
echo "$SECONDS s in all; logs and lines are in $OUT"
exit "$failed"
