#!/usr/bin/env bash
# All benchmarks and checks that need a GPU, in one run of under 8 minutes and without a network:
#   bash benchmarks/gpu.sh [--cpu] WHEELS OUT
# WHEELS is the folder that wheels.sh has filled; of it, only packages are installed that Python does not have. OUT gets
# CSV files, written row by row, and log.txt. --cpu tries everything with small sizes on a CPU.
# PYTHON names the interpreter (python3), DEADLINE the seconds of the whole (460), STAGES those to run, TESTS files of
# tests.
set -uo pipefail
start=$SECONDS
device=(--device cuda)
if [ "${1:-}" = --cpu ]; then
    device=(--device cpu --small)
    shift
fi
if [ $# -ne 2 ]; then
    sed -n 2,7p "$0"
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=$1 python=${PYTHON:-python3} deadline=${DEADLINE:-460}
mkdir -p "$2"
out=$(cd "$2" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
exec 3>&1 >> "$out/log.txt" 2>&1 # no pipe: a process that a stage leaves behind would keep it open
say() {
    echo "== $*"
    echo "$*" >&3
}

# stage:limit in seconds, the most important first. Stages joined by + measure no time, and run side by side
plan=${STAGES:-env:40 exact:75+syncs:75 updates:90 overhead:150 billion:40 tests:90+precision:80 deploy:90 skinny:45 recipes:60 tuning:150}
# semi:40 says which way to a 2:4 product ends in an error

left() {
    echo $((deadline - (SECONDS - start)))
}

install() {
    local missing
    missing=$("$python" "$root/benchmarks/gpu_missing.py" "$wheels") || return
    if [ -n "$missing" ]; then
        # shellcheck disable=SC2086
        timeout 90 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
            --no-warn-script-location --disable-pip-version-check --find-links "$wheels" --target "$work/site" $missing
    fi
    if ! PYTHONPATH=$work/site "$python" -c 'import importlib.metadata as m; m.version("fastprune")' 2> "$work/err"; then
        (cd "$root" && "$python" setup.py -q egg_info --egg-base "$work/site") # its version
    fi
}

run() {
    local stage=${1%:*} limit=${1#*:}
    if [ "$limit" -gt "$(left)" ]; then
        limit=$(left)
    fi
    if [ "$limit" -lt 8 ]; then
        say "$stage: no time is left"
        return
    fi
    timeout --kill-after 5 "$limit" "$python" "$root/benchmarks/gpu.py" "$stage" "${device[@]}" --out "$out" \
        --limit "$((limit - 4))" 3>&-
    say "$stage: exit code $?, $((SECONDS - start)) s since the start"
}

mkdir -p "$work/site"
install || say "packages could not be installed: see log.txt"
export PYTHONPATH=$root:$work/site MPLBACKEND=agg PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
say "ready after $((SECONDS - start)) s"
for group in $plan; do
    pids=()
    for stage in ${group//+/ }; do
        run "$stage" &
        pids+=($!)
    done
    wait "${pids[@]}"
done
"$python" "$root/benchmarks/gpu.py" summary --out "$out" > "$work/summary"
cat "$work/summary"
cat "$work/summary" >&3
say "$((SECONDS - start)) s"
