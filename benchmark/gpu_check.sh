#!/usr/bin/env bash
# What only a GPU can show: that the fast path computes what the plain one does, how fast each script is on
# three games, and what each part of the fast path is worth.
#
#     benchmark/gpu_check.sh [LOG [tests|bench]]
#
# Run it in the repository, with all requirements installed. The second argument runs only that half; each is
# meant for 10 minutes, which is not measured yet. At the end it prints the table and what failed, and the
# exit status is 0 only if all went well.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
log=${1:-gpu_check.log} half=${2:-both}
stop() {
    echo "gpu_check.sh: error: $1" >&2
    exit 2
}
[[ $half =~ ^(tests|bench|both)$ ]] || stop "the second argument must be tests or bench, not $half"
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || stop "there is no CUDA device"
: >"$log" || stop "the log, the first argument, cannot be written"
run() { # SECONDS COMMAND...
    timeout "$1" "${@:2}" 2>&1 | grep --line-buffered -v 'step/s' | tee -a "$log"
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || echo "FAILED: ${*:2} (status $status)" | tee -a "$log"
}
bench() {
    run 200 python3 benchmark/throughput.py "$@"
}

if [ "$half" != bench ]; then
    run 590 python3 -m pytest -o addopts= -q tests/test_fast_path.py -k "cuda or graph" -rs
    if ! grep -qE "^[1-9][0-9]* passed" "$log" || grep -q skipped "$log"; then
        echo "FAILED: not all tests have run" | tee -a "$log"
    fi
fi
if [ "$half" != tests ]; then
    bench ppo_procgen --games bigfish starpilot bossfight --warmup 2 --iterations 3
    bench mdpo_procgen --games bigfish starpilot bossfight --warmup 2 --iterations 3
    for switch in --no-compile --no-cudagraphs --no-bf16 "--no-compile --no-cudagraphs --no-bf16"; do
        # shellcheck disable=SC2086 # several switches are several words
        bench ppo_procgen --no-test --no-limits --warmup 2 --iterations 3 $switch
    done

    echo
    echo "| script, game, flags | steps a second |"
    echo "| --- | --- |"
    awk '/^[a-z]+_procgen, /{name=$0}
         /^steps a second/{speed=$0; sub(/.*: /, "", speed); print "| " name " | " speed " |"}' "$log"
fi
grep -E "passed|failed|FAILED" "$log"
! grep -qE "failed|FAILED" "$log"
