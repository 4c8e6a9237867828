"""A U-Net of segmentation_models_pytorch with FreqFusion in its decoder: one step of training, and a folder."""

import segmentation_models_pytorch as smp
import torch

import freqfusion

model = smp.create_model("unet", encoder_name="resnet18", encoder_weights=None, classes=2)
freqfusion.upgrade_(model)  # weights and outputs stay as they are until you train
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
image, mask = torch.rand(2, 3, 65, 99), torch.randint(2, (2, 65, 99))
torch.nn.functional.cross_entropy(model(image), mask).backward()
optimizer.step()
freqfusion.save_pretrained(model, "smp_unet")
