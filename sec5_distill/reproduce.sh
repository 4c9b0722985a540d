#!/usr/bin/env bash
# Section 5's figures and table, one after the other; finished runs are reused, an interrupted one continues.
#   bash sec5_distill/reproduce.sh                                                         # demo
#   TRANSFER="--dataset-path ROOT --datasets NAME" bash sec5_distill/reproduce.sh --preset small --data-path DIR
# Arguments go to every script. More, for some alone:
#   SEEDS="--seeds 0 1 2"                               Figure 7 and Table 5, which train
#   IMAGES="--num-images 500"                           Figure 6, where val/ has fewer than 1,024 images
#   TRANSFER="--dataset-path ROOT --datasets NAME ..."  Table 5; outside the demo it is left out without
#   LAUNCH="torchrun --nproc-per-node=8"                several GPUs
[[ " $* " == *" --help "* || " $* " == *" -h "* ]] && sed -n '2,/^\[/s/^#//p' "$0" && exit
set -euo pipefail
cd "$(dirname "$0")/.."
run=${LAUNCH:-python}
[[ " $*" == *" --data-path"* || " $*" == *" --preset"[\ =][lsp]* ]] && demo="" || demo=yes
$run sec5_distill/fig6_distilled_similarity.py "$@" ${IMAGES:-}
$run sec5_distill/fig7_distilled_layer.py "$@" ${SEEDS:-}
if [[ -n $demo || -n ${TRANSFER:-} ]]; then
    $run sec5_distill/table5_distillation.py "$@" ${SEEDS:-} ${TRANSFER:-}
else
    echo "Table 5 is left out: name its data sets in TRANSFER" >&2
fi
