#!/usr/bin/env bash
# Section 5's figures and table, one after the other; finished runs are reused, an interrupted one continues.
#   bash sec5_distill/reproduce.sh                                              # demo
#   bash sec5_distill/reproduce.sh --preset small --data-path DIR
#   TRANSFER="--dataset-path ROOT --datasets NAME" bash sec5_distill/reproduce.sh --preset small --data-path DIR
# Arguments go to every script, those in TRANSFER to Table 5 alone (which the small preset needs: it has no data sets of its
# own). For several GPUs: LAUNCH="torchrun --nproc-per-node=8" bash sec5_distill/reproduce.sh ...
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python} sec5_distill/fig6_distilled_similarity.py "$@"
${LAUNCH:-python} sec5_distill/fig7_distilled_layer.py "$@"
${LAUNCH:-python} sec5_distill/table5_distillation.py "$@" ${TRANSFER:-}
