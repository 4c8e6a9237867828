"""Trainers that nnU-Net v2 finds here by its variable ``nnUNet_extTrainer``; nothing else belongs in this folder."""
