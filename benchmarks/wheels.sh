#!/usr/bin/env bash
# Wheels of fastprune and of what a machine for GPUs may lack, for a run of gpu.sh without a network:
#   bash benchmarks/wheels.sh FOLDER
# PYTHON_VERSION says for which Python they are (3.12). The machine is expected to have torch, torchvision, timm, pytest,
# scikit-learn, pandas and matplotlib; ALL=1 adds the last two, which makes 4 MB to 35. numba, which only the sparse kernel
# of CPUs needs, has 64 MB and is left out.
set -euo pipefail
if [ $# -ne 1 ]; then
    sed -n 2,6p "$0"
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
version=${PYTHON_VERSION:-3.12}

# fastai, and what only it needs
pure=(fastai fastcore fastdownload fastprogress fasttransform 'plum-dispatch<2.10' beartype python-fasthtml starlette
    python-multipart itsdangerous oauthlib beautifulsoup4 soupsieve httpx2 httpcore2 truststore cloudpickle)
# what fastprune needs, too
also=(pandas joblib matplotlib contourpy cycler fonttools kiwisolver pyparsing)

get() {
    pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$folder" "$@"
}

get "${pure[@]}"
if [ -n "${ALL:-}" ]; then
    get "${also[@]}"
fi
copy=$(mktemp -d) # setuptools would pack what an earlier build has left in the checkout
trap 'rm -rf "$copy"' EXIT
(cd "$root" && cp -r fastprune setup.py settings.ini pyproject.toml README.md LICENSE "$copy")
pip wheel -q --no-deps --wheel-dir "$folder" "$copy"
du -sh "$folder"
