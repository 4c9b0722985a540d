#!/usr/bin/env bash
# Every table of Section 3, one after the other; finished rows are skipped, an interrupted one continues.
#   bash sec3_benchmark/reproduce.sh                                                       # demo
#   TRANSFER="--dataset-path ROOT --datasets NAME" bash sec3_benchmark/reproduce.sh --preset small --data-path DIR
# Arguments go to every table that trains. More, for some alone:
#   SEEDS="--seeds 0 1 2"                               what trains
#   TRANSFER="--dataset-path ROOT --datasets NAME ..."  Table 4; outside the demo it is left out without
#   DETECT="--dataset-path COCO --init FILE"            detect.py, which reads no other argument; without, it is left out
#                                                       if there are any
#   TABLE2="--preset paper --imagenet DIR --checkpoints ROW=FILE"              Table 2, which does not train; TABLE3="--in21k DIR"
#   LAUNCH="torchrun --nproc-per-node=8"                several GPUs
[[ " $* " == *" --help "* || " $* " == *" -h "* ]] && sed -n '2,/^\[/s/^#//p' "$0" && exit
set -euo pipefail
cd "$(dirname "$0")/.."
run=${LAUNCH:-python}
[[ " $*" == *" --data-path"* || " $*" == *" --preset"[\ =][lsp]* ]] && demo="" || demo=yes
$run sec3_benchmark/table1_pretraining_methods.py "$@" ${SEEDS:-}
[[ " $*" == *" --dry-run"* ]] || python sec3_benchmark/table2_sota_networks.py ${TABLE2:-}  # trains nothing
$run sec3_benchmark/table3_pretraining_data.py "$@" ${SEEDS:-} ${TABLE3:-}
if [[ -n $demo || -n ${TRANSFER:-} ]]; then
    $run sec3_benchmark/table4_transfer.py "$@" ${SEEDS:-} ${TRANSFER:-}
else
    echo "Table 4 is left out: name its data sets in TRANSFER" >&2
fi
if [[ $# == 0 || -n ${DETECT:-} ]]; then
    $run sec3_benchmark/detect.py ${DETECT:-}
else
    echo "detect.py is left out: name its data in DETECT" >&2
fi
