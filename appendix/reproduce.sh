#!/usr/bin/env bash
# Every study of the appendix but A.5 (appendix/a5_detection_settings.py, long), one after the other; finished rows are skipped, an interrupted one continues.
#   bash appendix/reproduce.sh                                  # demo
#   bash appendix/reproduce.sh --preset small --data-path DIR
#   SEEDS="--seeds 0 1" TRANSFER="--dataset-path ROOT --dataset NAME" bash appendix/reproduce.sh --preset small --data-path DIR
# Arguments go to every script, SEEDS to the tables alone, TRANSFER to A.4, which outside the demo needs its own data. For several GPUs: LAUNCH="torchrun --nproc-per-node=8" bash appendix/reproduce.sh ...
set -euo pipefail
cd "$(dirname "$0")/.."
for table in a1_recipes a2_mae_settings a3_mocov3_settings b5_dino_simmim; do
    ${LAUNCH:-python} "appendix/$table.py" "$@" ${SEEDS:-}
done
for figure in a6_cka_settings b1_stronger_references; do
    ${LAUNCH:-python} "appendix/$figure.py" "$@"
done
${LAUNCH:-python} appendix/a4_transfer_sweep.py "$@" ${SEEDS:-} ${TRANSFER:-}
