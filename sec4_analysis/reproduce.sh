#!/usr/bin/env bash
# Every figure of Section 4, one after the other; finished runs are reused, an interrupted one continues.
#   bash sec4_analysis/reproduce.sh                                              # demo
#   bash sec4_analysis/reproduce.sh --preset small --data-path DIR               # Figure 4 then needs --datasets:
#   TRANSFER="--datasets A B --dataset-path ROOT" bash sec4_analysis/reproduce.sh --preset small --data-path DIR
# Arguments go to every figure. For several GPUs: LAUNCH="torchrun --nproc-per-node=8" bash sec4_analysis/reproduce.sh ...
set -euo pipefail
cd "$(dirname "$0")/.."
for figure in fig1_layer_similarity fig2_leading_blocks fig3_fourier fig5_attention attention_maps; do
    ${LAUNCH:-python} "sec4_analysis/$figure.py" "$@"
done
${LAUNCH:-python} sec4_analysis/fig4_leading_blocks_small_data.py ${TRANSFER:-} "$@"
