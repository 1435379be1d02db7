#!/bin/sh
# Everything that needs a GPU, in under 9 minutes: tests, self-check, sanitizer, benchmarks.
#
#   OUT=folder .ci/gpu.sh [python]
#
# The JSON and the logs go to $OUT. The python needs torch with CUDA, triton and pytest, and the suite
# of the operations also hypothesis and numpy; nothing is downloaded. Each part has its own time limit and runs whatever became of those before; the
# exit status is 1 if any of them failed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${1:-python3}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" FAD_LOSS_CACHE="$OUT/cache"
status=0

part() { # name, seconds, command...
    name=$1 seconds=$2
    shift 2
    began=$(date +%s)
    timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    [ "$code" -eq 0 ] || status=1
    printf '{"part": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" "$(($(date +%s) - began))" |
        tee -a "$OUT/parts.jsonl"
    [ "$code" -eq 0 ] || tail -n 15 "$OUT/$name.log"
}

: >"$OUT/parts.jsonl"
$PYTHON -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    { echo "no CUDA device for $PYTHON: nothing was run" >&2; exit 2; }
# The options of pyproject.toml want plugins that a bare machine may lack.
pytest="$PYTHON -m pytest -q -m gpu -p no:cacheprovider -o addopts= -W default"

part self-check 60 sh -c "$PYTHON -m fad_loss --json >'$OUT/self-check.json'"
part kernels 170 $pytest --noconftest --junitxml="$OUT/kernels.xml" tests/kernels
part operations 110 $pytest --junitxml="$OUT/operations.xml" tests/ops
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            $PYTHON tests/kernels/sanitized.py
    done
else
    echo "compute-sanitizer is not installed: left out" | tee "$OUT/memcheck.log"
fi
part accuracy 30 $PYTHON benchmarks/pairwise.py --device cuda --accuracy --output "$OUT/accuracy.json"
part benchmarks 80 $PYTHON benchmarks/pairwise.py --device cuda --peers torch --seconds 0.3 \
    --shapes 1,8192,8192,64 1,8192,8192,256 32,1024,1024,64 --output "$OUT/pairwise.json"
exit $status
