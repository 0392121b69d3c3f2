#!/bin/bash
# Ten minutes of one GPU, in the order of what they teach: rates, correctness, steps by kernel, ops, training, races.
#
# usage: benchmarks/gpu_session.sh [PART ...]
#
#   rates      the extension loads, doctor, clocks, copy and matmul rates
#   check      every op's fast backends against its reference, at the shape that is timed
#   images     steps of guided images by kernel, 32 and 64 spans, layers fused and plain
#   decoding   a decoding step of 64 rows by kernel
#   attention  attention by itself: blocks of other sizes, cuDNN, flash attention and FlexAttention
#   ops        every other op on every backend
#   loss       linear_logprob against Liger and Cut Cross-Entropy where they are installed, V 58,624 without bias
#   train      a Pair-DPO step by kernel
#   races      compute-sanitizer's racecheck and memcheck on tests/csrc/sanitize_main.cu
#   suspects   the tests of ops whose results were wrong
#   e2e, drop-in   whole tasks against the published algorithm; not among the default parts, each needs a LIMIT of its own
#
# Needs a python3 with torch (CUDA), triton and this package's dependencies, and nvcc; installs nothing, needs no network.
# The extension is compiled at its first use, which takes minutes, unless it lies in kernels/, built beforehand by
#   CUDA_HOME=/usr/local/cuda TORCH_CUDA_ARCH_LIST=9.0a python3.12 setup.py build_ext --inplace
# with the Python and torch of the GPU's machine (as kernels/_C.cpython-312-x86_64-linux-gnu.so, which git ignores).
#
# Environment:
#   OUT      folder of session.log, lines.jsonl, tables.md and traces.tar, which are written anew    [runs/gpu-session]
#   WHEELS   folder of wheels of peers to use                                   [none]
#   PYTHON   interpreter                                                        [python3]
#   DEVICE   cuda, or cpu to rehearse                                           [cuda]
#   SHAPE    sizes of the benchmarks                                            [showo-1.3b; tiny on the cpu]
#   DTYPE    of models                                                          [bfloat16; float32 on the cpu]
#   LIMIT    seconds for everything                                             [590]
#
# Each step is a process of its own with a time limit, so that a fault in one leaves the others alone. The exit code is 1 if
# one failed, was cut or was left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} LIMIT=${LIMIT:-590}
if [ "$DEVICE" = cuda ]; then
    SHAPE=${SHAPE:-showo-1.3b} DTYPE=${DTYPE:-bfloat16} PADDED=padded MISSING=cuda_missing
else
    SHAPE=${SHAPE:-tiny} DTYPE=${DTYPE:-float32} PADDED=tiny-padded MISSING=cpu_missing
    export TORCHDYNAMO_DISABLE=1 # a rehearsal does not wait for inductor
fi
OUT=${OUT:-runs/gpu-session}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
: >"$OUT/session.log"
: >"$OUT/lines.jsonl"

# The package as this checkout has it, without an install.
mkdir -p "$WORK/site/hermesflow" "$WORK/traces"
ln -s "$PWD"/hermesflow/* "$PWD"/{kernels,engine,benchmarks,csrc} "$WORK/site/hermesflow/"
export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PYTHONSAFEPATH=1 # the folder kernels/ must not shadow the package of that name

part_end=$LIMIT

# step NAME SECONDS COMMAND...: runs it within its, its part's and the session's time; keeps what it printed and measured.
step() {
    local name=$1 limit=$2 code=0 begin=$SECONDS left result
    shift 2
    left=$(((part_end < LIMIT ? part_end : LIMIT) - SECONDS))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        result="left out: no time" code=1
    else
        timeout --kill-after=5 "$limit" "$@" >"$WORK/$name.log" 2>&1 || code=$?
        case $code in
        0) result=ok ;;
        124 | 137) result="cut after $limit s" ;;
        *) result="failed, exit code $code" ;;
        esac
    fi
    (
        flock 9 # steps of a part may run side by side
        printf '%4s s  %-24s %4s s  %s\n' "$begin" "$name" $((SECONDS - begin)) "$result" | tee -a "$WORK/summary"
        { echo "== $name: $result: $*" && cat "$WORK/$name.log" 2>/dev/null; } >>"$OUT/session.log" || true
        if [ -e "$WORK/$name.jsonl" ]; then cat "$WORK/$name.jsonl" >>"$OUT/lines.jsonl"; fi
        if [ "$code" -ne 0 ]; then
            touch "$WORK/failed" "$WORK/failed-$name"
            if [ -e "$WORK/$name.log" ]; then tail -n 12 "$WORK/$name.log" | cut -c 1-200 | sed 's/^/      /'; fi
        fi
    ) 9>"$WORK/lock"
}

# part SECONDS: the time of the steps to come.
part() { part_end=$((SECONDS + $1)); }

bench_ops() { # bench_ops NAME SECONDS OPTION...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$PYTHON" -m hermesflow bench ops --device "$DEVICE" --no-test --out "$WORK/$name.jsonl" "$@"
}

steps() { # steps NAME SECONDS CASE OPTION...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$PYTHON" -m hermesflow.benchmarks.steps "$@" --device "$DEVICE" --shape "$SHAPE" \
        --dtype "$DTYPE" --out "$WORK/$name.jsonl" --profile "$WORK/traces"
}

task() { # task BENCH OPTION...
    local name=$1
    shift
    step "$name" "$LIMIT" "$PYTHON" -m hermesflow bench "$name" --device "$DEVICE" --shape "$SHAPE" --dtype "$DTYPE" \
        --out "$WORK/$name.jsonl" "$@"
}

rates() {
    local wheel
    part 300
    for wheel in ${WHEELS:+"$WHEELS"/*.whl}; do # each by itself: one that does not fit must not keep the others out
        step "wheel-$(basename "$wheel" | cut -d- -f1)" 20 \
            "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" "$wheel"
    done
    step extension 240 "$PYTHON" -c "import sys; from hermesflow.kernels import checks; sys.exit(checks.$MISSING())"
    step doctor 30 "$PYTHON" -m hermesflow doctor
    steps roof 30 roof
    if [ "$DEVICE" = cuda ]; then
        step clocks 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv
    fi
}

OPS="guided_sample linear_sample token_logprob linear_logprob token_sample mask_topk pair_dpo"

check() {
    local op
    part 60
    for op in $OPS span_attention; do
        step "check-$op" 60 "$PYTHON" -m hermesflow.benchmarks.every_op --device "$DEVICE" --shape "$SHAPE" --op "$op" \
            --backend cuda --backend triton --backend cpu &
    done
    wait
}

images() {
    part 100
    steps images-fused 60 images
    steps images-plain 45 images --plain
}

decoding() {
    part 60
    steps decoding 60 decoding
}

attention() {
    part 75
    steps attention-blocks 40 attention
    local of_attention=(--shape "$SHAPE" --op span_attention --backend triton --backend cpu)
    bench_ops attention-peers 40 "${of_attention[@]}" --baseline cudnn --baseline flash
    bench_ops attention-flex 40 "${of_attention[@]}" --baseline flex
}

ops() {
    local op
    part 80
    for op in $OPS; do bench_ops "ops-$op" 40 --shape "$SHAPE" --op "$op" --baseline none; done
}

loss() {
    part 40
    bench_ops loss 40 --shape "$PADDED" --op linear_logprob --baseline liger --baseline cut_cross_entropy
}

train() {
    part 60
    task train --no-naive --profile "$WORK/traces"
}

races() {
    local program=$WORK/sanitize sanitizer tool
    part 80
    if [ "$DEVICE" != cuda ]; then # the emulator shows that the program runs
        step sanitize-build 30 c++ -std=c++20 -O1 -Itests/csrc/emulator -x c++ tests/csrc/sanitize_main.cu -o "$program"
        step sanitize-run 30 "$program"
        return
    fi
    sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    step sanitize-build 30 nvcc -std=c++20 -O3 -ftz=true -lineinfo -arch=native tests/csrc/sanitize_main.cu -o "$program"
    for tool in racecheck memcheck; do
        step "$tool" 30 "$sanitizer" --tool "$tool" --error-exitcode 1 "$program"
    done
}

suspects() {
    local op
    part "$LIMIT"
    for op in $OPS span_attention; do
        [ -e "$WORK/failed-check-$op" ] || continue
        step "tests-$op" 90 "$PYTHON" -m pytest -q -rs --import-mode=importlib -p no:cacheprovider "tests/kernels/test_$op.py"
    done
}

e2e() {
    part "$LIMIT"
    task e2e --profile "$WORK/traces"
}

drop_in() {
    part "$LIMIT"
    task drop-in
}

[ $# -gt 0 ] || set -- rates check images decoding attention ops loss train races suspects
for name in "$@"; do
    case $name in
    rates | check | images | decoding | attention | ops | loss | train | races | suspects | e2e) "$name" ;;
    drop-in) drop_in ;;
    *)
        sed -n '2,16p' "$0" | sed 's/^# \{0,1\}//' >&2
        exit 2
        ;;
    esac
done

tar -C "$WORK" -cf "$OUT/traces.tar" traces
"$PYTHON" -m hermesflow bench table "$OUT/lines.jsonl" >"$OUT/tables.md" 2>>"$OUT/session.log" || touch "$WORK/failed"
cat "$OUT/tables.md" "$WORK/summary"
echo "$SECONDS s in all; $OUT has session.log, lines.jsonl, tables.md and traces.tar"
[ ! -e "$WORK/failed" ]
