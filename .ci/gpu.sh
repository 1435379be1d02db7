#!/bin/sh
# Everything that needs a GPU: tests, self-check, sanitizer, accuracy, benchmarks.
#
#   OUT=folder LIMIT=540 .ci/gpu.sh [python]
#
# A call stops after LIMIT seconds; the next one goes on from there. Kernels compile in parallel,
# because the tests are dealt out to a few processes (gpu_shares.py), the longest first by the times
# of earlier calls. Every test's result is a line of JSON as soon as it is there, so that a call that
# is stopped loses at most the tests that were running. What has passed is not run again, as long as
# the sources are the same. Results are in build/gpu/SOURCES, and copied to OUT, if that is given.
#
# TESTS="tests/ops/test_bounds.py ..." runs some of the tests only.
#
# The python needs torch with CUDA, triton, pytest, hypothesis and numpy; nothing is downloaded. With
# REHEARSE=1 there is no GPU: the tests are run against a stub (tests/kernels/stub.py), to see how
# long kernels take to compile, and whether all of this works.
#
# Exit status: 0 if everything has passed, 1 if something failed, 3 if there is more to do.
set -u
cd "$(dirname "$0")/.."
PYTHON=${1:-python3}
LIMIT=${LIMIT:-540}
TESTS=${TESTS:-tests/ops tests/kernels/test_gpu.py}
REHEARSE=${REHEARSE:-0}
WORKERS=${WORKERS:-$(nproc)}
[ "$WORKERS" -le 14 ] || WORKERS=14
sources=$(find src tests benchmarks -name '*.py' -type f | LC_ALL=C sort | xargs cat | sha256sum | cut -c 1-12)
[ "$REHEARSE" = 0 ] || sources=rehearsal-$sources
state=build/gpu/$sources
mkdir -p "$state"
state=$(cd "$state" && pwd)
end=$(($(date +%s) + LIMIT))
export PYTHONPATH="$PWD/src:$PWD/.ci${PYTHONPATH:+:$PYTHONPATH}" FAD_LOSS_CACHE="$state/cache"
export OMP_NUM_THREADS=1 FAD_GPU_REHEARSE="$REHEARSE"
running=
unfinished=0

copy() {
    [ -z "${OUT:-}" ] || { mkdir -p "$OUT" && cp -r "$state/." "$OUT/"; }
}
stopped() {
    for id in $running; do kill "$id" 2>/dev/null; done
    copy
    exit 143
}
trap stopped TERM INT

left() { echo $((end - $(date +%s))); }

part() { # name, seconds at most, command...
    name=$1 seconds=$2
    shift 2
    grep -q "\"part\": \"$name\", \"exit\": 0" "$state/parts.jsonl" 2>/dev/null && return
    if [ "$(left)" -lt 20 ]; then unfinished=1; return; fi
    [ "$seconds" -le "$(left)" ] || seconds=$(left)
    began=$(date +%s)
    timeout "$seconds" "$@" >"$state/$name.log" 2>&1 &
    running=$!
    wait "$running"
    code=$?
    running=
    # Cut off by the end of this call, not by a limit of its own.
    [ "$code" -ne 124 ] || [ "$(left)" -gt 0 ] || unfinished=1
    printf '{"part": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" "$(($(date +%s) - began))" |
        tee -a "$state/parts.jsonl"
    [ "$code" -eq 0 ] || tail -n 5 "$state/$name.log"
    copy
}

[ "$REHEARSE" = 1 ] || $PYTHON -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    { echo "no CUDA device for $PYTHON: nothing was run" >&2; exit 2; }

# The options of pyproject.toml want plugins that a bare machine may lack.
tests() {
    share=0
    while [ "$share" -lt "$WORKERS" ]; do
        FAD_GPU_SHARE=$share/$WORKERS FAD_GPU_DEADLINE=$((end - 15)) \
            FAD_GPU_RESULTS=$state/tests-$share.jsonl \
            timeout -k 5 "$(left)" $PYTHON -m pytest -q -m gpu -p no:cacheprovider -p gpu_shares -o addopts= -W default \
            --tb=short $TESTS >"$state/tests-$share.log" 2>&1 &
        running="$running $!"
        share=$((share + 1))
    done
    for id in $running; do wait "$id"; done
    running=
}
tests
copy
$PYTHON .ci/gpu_shares.py "$state"
case $? in
    0) ;;
    3) unfinished=1 ;;
esac

# What a rehearsal finds of values is not heard.
heard=false run=$PYTHON
[ "$REHEARSE" = 0 ] || { run="$PYTHON .ci/pretend.py"; heard=true; }
part self-check 300 sh -c "$run -m fad_loss --json >'$state/self-check.json' || $heard"
if [ "$REHEARSE" = 1 ]; then
    part sanitized 120 $run tests/kernels/sanitized.py
elif command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            $run tests/kernels/sanitized.py
    done
else
    echo "no compute-sanitizer: left out"
fi
part accuracy 60 $run benchmarks/pairwise.py --device cuda --accuracy \
    --output "$state/accuracy.json"
# An interrupted benchmark goes on where it was, in this call or the next. In a rehearsal the peers
# would compute on the CPU.
peers=torch
[ "$REHEARSE" = 0 ] || peers=none
part benchmarks "$LIMIT" $run benchmarks/pairwise.py --device cuda --peers $peers --seconds 0.3 \
    --shapes 1,8192,8192,64 1,8192,8192,256 32,1024,1024,64 --resume --output "$state/pairwise.json"
copy
[ "$unfinished" = 0 ] || { echo "there is more to do: call this again"; exit 3; }
$PYTHON .ci/gpu_shares.py "$state" --quiet
