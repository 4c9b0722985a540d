#!/usr/bin/env bash
# Every accuracy table of the appendix, one after the other; finished rows are skipped, an interrupted one continues.
#   bash appendix/reproduce.sh                                  # demo
#   bash appendix/reproduce.sh --preset small --data-path DIR --seeds 0 1
# Arguments go to every table. For several GPUs: LAUNCH="torchrun --nproc-per-node=8" bash appendix/reproduce.sh ...
set -euo pipefail
cd "$(dirname "$0")/.."
for table in a1_recipes a2_mae_settings a3_mocov3_settings b5_dino_simmim; do
    ${LAUNCH:-python} "appendix/$table.py" "$@"
done
