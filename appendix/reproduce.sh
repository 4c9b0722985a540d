#!/usr/bin/env bash
# Every study of the appendix but A.5 (appendix/a5_detection_settings.py, long), one after the other; finished rows are
# skipped, an interrupted one continues.
#   bash appendix/reproduce.sh                                                             # demo
#   SWEEP="--dataset-path ROOT --dataset NAME" bash appendix/reproduce.sh --preset small --data-path DIR
# Arguments go to every script. More, for some alone:
#   SEEDS="--seeds 0 1 2"                               the tables, which train
#   IMAGES="--num-images 500"                           A.6 and B.1, where val/ has fewer than 1,024 images
#   SWEEP="--dataset-path ROOT --dataset NAME"          A.4; outside the demo it is left out without
#   LAUNCH="torchrun --nproc-per-node=8"                several GPUs
[[ " $* " == *" --help "* || " $* " == *" -h "* ]] && sed -n '2,/^\[/s/^#//p' "$0" && exit
set -euo pipefail
cd "$(dirname "$0")/.."
run=${LAUNCH:-python}
[[ " $*" == *" --data-path"* || " $*" == *" --preset"[\ =][lsp]* ]] && demo="" || demo=yes
for table in a1_recipes a2_mae_settings a3_mocov3_settings b5_dino_simmim; do
    $run "appendix/$table.py" "$@" ${SEEDS:-}
done
for figure in a6_cka_settings b1_stronger_references; do
    $run "appendix/$figure.py" "$@" ${IMAGES:-}
done
if [[ -n $demo || -n ${SWEEP:-} ]]; then
    $run appendix/a4_transfer_sweep.py "$@" ${SEEDS:-} ${SWEEP:-}
else
    echo "A.4 is left out: name its data set in SWEEP" >&2
fi
