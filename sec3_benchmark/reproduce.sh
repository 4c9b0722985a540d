#!/usr/bin/env bash
# Every table of Section 3, one after the other; finished rows are skipped, an interrupted one continues.
#   bash sec3_benchmark/reproduce.sh                                  # demo
#   bash sec3_benchmark/reproduce.sh --preset small --data-path DIR --seeds 0 1
# Arguments go to every table that trains. Further ones, and all those of Table 2, which does not train:
#   TABLE2="--preset paper --imagenet DIR" TABLE3="--in21k DIR" TRANSFER="--dataset-path ROOT --datasets NAME ..." bash ...
#   DETECT="--dataset-path COCO --init FILE" for detect.py alone, which reads no other argument either
# Outside the demo Table 4 needs its own data (TRANSFER). For several GPUs: LAUNCH="torchrun --nproc-per-node=8" bash ...
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python} sec3_benchmark/table1_pretraining_methods.py "$@"
python sec3_benchmark/table2_sota_networks.py ${TABLE2:-}
${LAUNCH:-python} sec3_benchmark/table3_pretraining_data.py "$@" ${TABLE3:-}
${LAUNCH:-python} sec3_benchmark/table4_transfer.py "$@" ${TRANSFER:-}
${LAUNCH:-python} sec3_benchmark/detect.py ${DETECT:-}
