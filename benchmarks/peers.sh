#!/usr/bin/env bash
# Virtual environments of the engines that inference_peers.py compares with, one for each:
#   bash benchmarks/peers.sh [FOLDER]
# FOLDER is ~/.cache/fastprune/peers, where inference_peers.py looks by default; it takes 1 GB. PYTHON names the
# interpreter (python3), PYTHON311 one of version 3.11 (python3.11): DeepSparse ended in 2025, and has no newer wheels.
set -euo pipefail
if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
    sed -n 2,5p "$0"
    exit 2
fi
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/fastprune/peers}
python=${PYTHON:-python3} python311=${PYTHON311:-python3.11}
mkdir -p "$folder"

make() { # NAME PYTHON PACKAGE...
    local name=$1 python=$2
    shift 2
    "$python" -m venv --clear "$folder/$name"
    "$folder/$name/bin/python" -m pip install -q --disable-pip-version-check "$@"
    "$folder/$name/bin/python" -m pip freeze > "$folder/$name.txt"
}

make deepsparse "$python311" 'deepsparse==1.8.0' 'numpy<2' 'onnx<1.16'
make openvino "$python" openvino numpy
make onnxruntime "$python" onnxruntime numpy
grep -hiE '^(deepsparse|openvino|onnxruntime)==' "$folder"/*.txt
du -sh "$folder"
