#!/usr/bin/env bash
# Every table of Section 3, one after the other; finished rows are skipped, an interrupted one continues.
#   bash sec3_benchmark/reproduce.sh                                  # demo
#   bash sec3_benchmark/reproduce.sh --preset small --data-path DIR --seeds 0 1
# Arguments go to every table. For several GPUs: LAUNCH="torchrun --nproc-per-node=8" bash sec3_benchmark/reproduce.sh ...
# Outside the demo Table 4 needs its own data: TRANSFER="--dataset-path ROOT --datasets NAME ..." bash sec3_benchmark/...
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python} sec3_benchmark/table1_pretraining_methods.py "$@"
${LAUNCH:-python} sec3_benchmark/table4_transfer.py "$@" ${TRANSFER:-}
