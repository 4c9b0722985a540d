#!/usr/bin/env bash
# A table or figure at the narrow scale, that of the results called narrow: 12 blocks of half the width, 48 px, patch 8,
# short trainings. For 7,000 images a row takes about 20 minutes on one CPU core.
#   bash appendix/narrow.sh sec3_benchmark/table3_pretraining_data.py --data-path DIR --rows mae-full mae-10
#   TEACHER=teacher48.pt bash appendix/narrow.sh sec5_distill/fig7_distilled_layer.py --data-path DIR
# More arguments go to the script; --set of yours comes after the settings below and wins.
set -euo pipefail
cd "$(dirname "$0")/.."
script=$1; shift
pretrain="pretrain_mae pretrain_mocov3 pretrain_dmae pretrain_dino pretrain_simmim"
own="pretrain_mae pretrain_mocov3"  # of Figures 2 and 4
words=" $* "
if [[ $words == *" --models "* ]]; then  # given weights take the place of pre-trainings
    own=""; pretrain=""
fi
case $script in
    */table1*)  stages="$pretrain finetune" ;;
    */table3*)  stages="pretrain_mae pretrain_mocov3 finetune" ;;
    */fig2*)    stages="$own finetune" ;;
    */fig4*)    stages="$own transfer" ;;
    */table5*)  stages="$pretrain transfer"
                [[ $words == *" --no-imagenet "* || $words != *" --data-path "* ]] || stages+=" finetune" ;;
    */fig7*)    stages="pretrain_mae pretrain_dmae finetune" ;;
    */a2_*)     stages="pretrain_mae finetune" ;;
    */b5_*)     stages="pretrain_mae pretrain_mocov3 pretrain_dino pretrain_simmim finetune" ;;
    *) echo "$script: the narrow scale is not written down for it" >&2; exit 2 ;;
esac
mae="epochs=30 warmup_epochs=3 batch_size=64 base_lr=4e-3"
moco="epochs=8 warmup_epochs=1 batch_size=128 base_lr=1e-3"
declare -A recipe=(
    [pretrain_mae]="model=vit_demo $mae"
    [pretrain_dmae]="model=vit_demo $mae ${TEACHER:+teacher=$TEACHER}"
    [pretrain_mocov3]="model=vit_demo $moco"
    [pretrain_dino]="model=vit_demo local_size=24 $moco"
    [pretrain_simmim]="model=vit_demo_simmim $mae"
    [finetune]="model=vit_demo epochs=15 warmup_epochs=1 batch_size=64 base_lr=4e-3 eval_every=0"
    [transfer]="model=vit_demo epochs=20 warmup_epochs=2 batch_size=64 eval_every=0")
# What is pre-trained says itself what it is, SimMIM's ViT too. (Its row of a table with trainings from scratch is run apart,
# by --rows simmim --set finetune.model=vit_demo_simmim.)
[[ $script == */b5_* ]] && recipe[finetune]=${recipe[finetune]#model=vit_demo }
settings=()
for stage in $stages; do
    for setting in img_size=48 ${recipe[$stage]}; do settings+=("$stage.$setting"); done
done
exec ${LAUNCH:-python} "$script" --preset small --set "${settings[@]}" "$@"
