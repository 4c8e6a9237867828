"""Let a trained plain nnU-Net go on with FreqFusion: add the fusions, which change nothing yet, to its checkpoint.

    python examples/nnunet_pretrained.py fold_0/checkpoint_final.pth upgraded.pth
    nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerFreqFusion -pretrained_weights upgraded.pth

nnU-Net's checkpoints are pickles: take one that you trust.
"""

import sys

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from freqfusion.upgrade.hosts.nnunet_trainers.nnUNetTrainerFreqFusion import nnUNetTrainerFreqFusion

checkpoint, target = sys.argv[1:]
saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
made_with = saved["init_args"]
plans, about = PlansManager(made_with["plans"]), made_with["dataset_json"]
configuration = plans.get_configuration(made_with["configuration"])
channels = determine_num_input_channels(plans, configuration, about)
heads = plans.get_label_manager(about).num_segmentation_heads
network = nnUNetTrainerFreqFusion.build_network_architecture(plans, configuration, channels, heads)
saved["network_weights"] = network.state_dict() | saved["network_weights"]
torch.save(saved, target)
