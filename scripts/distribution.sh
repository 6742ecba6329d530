#!/usr/bin/env bash
# Build the sdist and the wheel into a new folder, check both, install the wheel into a clean environment and run it
# there: `bash scripts/distribution.sh dist`
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bash scripts/distribution.sh FOLDER}")
if [ -n "$(ls -A "$out" 2> /dev/null)" ]; then
  echo "$out is not empty: use a new folder, since all that is in it is checked and installed" >&2
  exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/build"
"$work/build/bin/pip" install -q build twine
"$work/build/bin/python" -m build -q --outdir "$out" . # the wheel is built from the sdist
"$work/build/bin/twine" check --strict "$out"/*
python3 -m venv "$work/clean"
"$work/clean/bin/pip" install -q "$out"/*.whl
cd "$work"
clean/bin/fastprune --out "$work/out" > log
tail -n 5 log
