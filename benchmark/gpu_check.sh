#!/usr/bin/env bash
# What only a GPU can show (how long it takes is not measured yet; meant for 9 minutes): that the fast path computes what the plain one does, how fast each
# script is on three games, what each part of the fast path is worth, and the ratio to a plain loop.
# Run it in the repository, with all requirements installed. The table is the last thing that it prints.
set -uo pipefail
cd "$(dirname "$0")/.."
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "there is no CUDA device"; exit 2; }
log=${1:-gpu_check.log}
: >"$log"
bench() {
    timeout 200 python benchmark/throughput.py "$@" 2>&1 | grep --line-buffered -v 'step/s' | tee -a "$log"
    [ "${PIPESTATUS[0]}" = 0 ] || echo "FAILED: $*" | tee -a "$log"
}

timeout 200 python -m pytest -q tests/test_fast_path.py -k "cuda or graph" -rs 2>&1 | tee -a "$log"
bench ppo_procgen --games bigfish --reference --warmup 2 --iterations 3
bench ppo_procgen --games starpilot bossfight --no-test --warmup 2
bench mdpo_procgen --games bigfish starpilot bossfight --warmup 2 --iterations 3
for switch in --no-compile --no-cudagraphs --no-bf16 "--no-compile --no-cudagraphs --no-bf16"; do
    # shellcheck disable=SC2086 # several switches are several words
    bench ppo_procgen --no-test --no-limits --warmup 2 --iterations 3 $switch
done

echo
echo "| script, game, flags | steps a second | ratio to the plain loop |"
echo "| --- | --- | --- |"
awk '/^[a-z]+_procgen, /{name=$0} /^steps a second/{speed=$0; sub(/.*: /, "", speed); print "| " name " | " speed " | |"}
     /^plain loop/{ratio=$0; sub(/.*ratio /, "", ratio); print "| " name " | | " ratio " |"}' "$log"
grep -E "passed|failed|FAILED" "$log"
! grep -qE "failed|FAILED" "$log"
