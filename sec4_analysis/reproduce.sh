#!/usr/bin/env bash
# Every figure of Section 4, one after the other; finished runs are reused, an interrupted one continues.
#   bash sec4_analysis/reproduce.sh                                                        # demo
#   TRANSFER="--dataset-path ROOT --datasets A B" bash sec4_analysis/reproduce.sh --preset small --data-path DIR
# Arguments go to every figure. More, for some alone:
#   SEEDS="--seeds 0 1 2"                               Figures 2 and 4, which train
#   IMAGES="--num-images 500"                           the others, where val/ has fewer than 1,024 images
#   TRANSFER="--dataset-path ROOT --datasets NAME ..."  Figure 4; outside the demo it is left out without
#   LAUNCH="torchrun --nproc-per-node=8"                several GPUs
[[ " $* " == *" --help "* || " $* " == *" -h "* ]] && sed -n '2,/^\[/s/^#//p' "$0" && exit
set -euo pipefail
cd "$(dirname "$0")/.."
run=${LAUNCH:-python}
[[ " $*" == *" --data-path"* || " $*" == *" --preset"[\ =][lsp]* ]] && demo="" || demo=yes
for figure in fig1_layer_similarity fig3_fourier fig5_attention attention_maps; do
    $run "sec4_analysis/$figure.py" "$@" ${IMAGES:-}
done
$run sec4_analysis/fig2_leading_blocks.py "$@" ${SEEDS:-}
if [[ -n $demo || -n ${TRANSFER:-} ]]; then
    $run sec4_analysis/fig4_leading_blocks_small_data.py "$@" ${SEEDS:-} ${TRANSFER:-}
else
    echo "Figure 4 is left out: name its data sets in TRANSFER" >&2
fi
