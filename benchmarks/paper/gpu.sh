#!/usr/bin/env bash
# Cyclical Pruning's table 2 at one sparsity with the paper's epochs, in one run of under 8 minutes on one GPU:
#   CIFAR10=FOLDER_OR_TAR bash benchmarks/paper/gpu.sh [--cpu] WHEELS OUT
# CIFAR10 has train/class/image and test/class/image. SPARSITY (0.99), SEEDS (3) and METHODS (table 2's; those of table 5
# are in gpu_tables.py; with commas) say what is trained, DEADLINE how many seconds there are (470), COMPILE=1 that
# networks are compiled. What there is no time for is left out, the last method first. WHEELS is as for ../gpu.sh, and
# OUT gets results.csv, which `python benchmarks/paper/gpu_tables.py OUT/results.csv` adds to the one beside this script.
#
# On an H100 a step of one training takes 1.9 ms, however many there are: three trainings of 100 epochs of 50,000 images
# took 134 s, so that the nine of table 2 need some 400 s with those they start from. In five minutes, DEADLINE=285, there
# is time for one method: METHODS=cyclical. Not tried there: COMPILE=1, which had not compiled after 90 s.
set -euo pipefail
deadline=${DEADLINE:-470}
STAGES=${STAGES:-paper:$deadline} DEADLINE=$deadline exec bash "$(dirname "$0")/../gpu.sh" "$@"
