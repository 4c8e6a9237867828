#!/usr/bin/env bash
# nnU-Net v2 with FreqFusion in its decoder, by nnU-Net's own commands:
#   examples/nnunet.sh DATASET CONFIGURATION FOLD IMAGES OUT
# such as: examples/nnunet.sh 4 3d_fullres 0 imagesTs predictions
# nnUNet_raw, nnUNet_preprocessed and nnUNet_results are set, and the data set is planned and preprocessed.
set -euo pipefail
dataset=$1 configuration=$2 fold=$3 images=$4 out=$5
trainer=${TRAINER:-nnUNetTrainerFreqFusion} # the plain network: TRAINER=nnUNetTrainer
device=${DEVICE:-cuda}

# where nnU-Net looks for trainers; several folders are separated by colons
nnUNet_extTrainer=$(python -m freqfusion.upgrade.hosts.nnunet)${nnUNet_extTrainer:+:$nnUNet_extTrainer}
export nnUNet_extTrainer

nnUNetv2_train "$dataset" "$configuration" "$fold" -tr "$trainer" -device "$device" --c
nnUNetv2_predict -d "$dataset" -c "$configuration" -f "$fold" -tr "$trainer" -device "$device" -i "$images" -o "$out"
