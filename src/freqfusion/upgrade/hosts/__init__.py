"""Which class replaces which host class."""

import importlib

from torch import nn

from freqfusion.upgrade.base import Upgraded

SUPPORTED = {
    "dynamic_network_architectures": "the U-Nets of nnU-Net v2 (PlainConvUNet, ResidualEncoderUNet), in 2D and 3D",
    "monai": (
        "BasicUNet, BasicUNetPlusPlus, FlexibleUNet, UNet, DynUNet, UNETR, SwinUNETR, SegResNet, in 2D and 3D"
    ),
    "segmentation_models_pytorch": (
        "Unet, UnetPlusPlus, MAnet, Linknet, FPN, PAN, UPerNet, Segformer, DeepLabV3Plus (whole models)"
    ),
    "torchvision": "FeaturePyramidNetwork (Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS, own FPNs)",
    "transformers": (
        "UperNet, BEiT and Data2Vec segmentation, SegFormer, DPT, ZoeDepth, Depth Anything, "
        "Prompt Depth Anything, RT-DETR, RT-DETRv2, D-FINE, Mask2Former, OneFormer, MaskFormer"
    ),
    "ultralytics": "YOLO (v3, v5, v8 to v12, v26) and RT-DETR, not the wrapper but its attribute model",
}
"""What is supported of each library, for messages."""

# Our file for each file of a host that has classes we know. It is imported when such a class is met, so that
# nothing imports a host that the user has not imported.
_FILES = {
    "dynamic_network_architectures.building_blocks.unet_decoder": "nnunet",
    "dynamic_network_architectures.building_blocks.unet_residual_decoder": "nnunet",
    "monai.networks.blocks.dynunet_block": "monai",
    "monai.networks.blocks.unetr_block": "monai",
    "monai.networks.layers.simplelayers": "monai",
    "monai.networks.nets.basic_unet": "monai",
    "monai.networks.nets.segresnet": "monai",
    "ultralytics.nn.modules.conv": "ultralytics",
    "segmentation_models_pytorch.decoders.deeplabv3.decoder": "smp",
    "segmentation_models_pytorch.decoders.deeplabv3.model": "smp",
    "segmentation_models_pytorch.decoders.fpn.decoder": "smp",
    "segmentation_models_pytorch.decoders.fpn.model": "smp",
    "segmentation_models_pytorch.decoders.linknet.decoder": "smp",
    "segmentation_models_pytorch.decoders.linknet.model": "smp",
    "segmentation_models_pytorch.decoders.manet.decoder": "smp",
    "segmentation_models_pytorch.decoders.manet.model": "smp",
    "segmentation_models_pytorch.decoders.pan.decoder": "smp",
    "segmentation_models_pytorch.decoders.pan.model": "smp",
    "segmentation_models_pytorch.decoders.segformer.decoder": "smp",
    "segmentation_models_pytorch.decoders.segformer.model": "smp",
    "segmentation_models_pytorch.decoders.unet.decoder": "smp",
    "segmentation_models_pytorch.decoders.unetplusplus.decoder": "smp",
    "segmentation_models_pytorch.decoders.unetplusplus.model": "smp",
    "segmentation_models_pytorch.decoders.upernet.decoder": "smp",
    "segmentation_models_pytorch.decoders.upernet.model": "smp",
    "torchvision.ops.feature_pyramid_network": "torchvision",
    "transformers.models.beit.modeling_beit": "transformers.upernet",
    "transformers.models.data2vec.modeling_data2vec_vision": "transformers.upernet",
    "transformers.models.d_fine.modeling_d_fine": "transformers.d_fine",
    "transformers.models.depth_anything.modeling_depth_anything": "transformers.dpt",
    "transformers.models.dpt.modeling_dpt": "transformers.dpt",
    "transformers.models.mask2former.modeling_mask2former": "transformers.mask2former",
    "transformers.models.maskformer.modeling_maskformer": "transformers.maskformer",
    "transformers.models.oneformer.modeling_oneformer": "transformers.oneformer",
    "transformers.models.prompt_depth_anything.modeling_prompt_depth_anything": "transformers.dpt",
    "transformers.models.rt_detr.modeling_rt_detr": "transformers.rt_detr",
    "transformers.models.rt_detr_v2.modeling_rt_detr_v2": "transformers.rt_detr",
    "transformers.models.segformer.modeling_segformer": "transformers.segformer",
    "transformers.models.upernet.modeling_upernet": "transformers.upernet",
    "transformers.models.zoedepth.modeling_zoedepth": "transformers.dpt",
}
_UPGRADED: dict[type[nn.Module], type[Upgraded]] = {}


def register_host(upgraded: type[Upgraded]) -> type[Upgraded]:
    """Teach :func:`freqfusion.upgrade_` a class of your own; a class decorator.

    Args:
        upgraded: a subclass of :class:`~freqfusion.upgrade.Upgraded`, or of a subclass of that, and,
            second, of your class. Modules of exactly your class are upgraded to it.

    Returns:
        The class as it came.

    Raises:
        TypeError: if the bases are others, or a class with points has no example.
        ValueError: if the host class is registered already.
    """
    bases = upgraded.__bases__
    if len(bases) != 2 or not issubclass(bases[0], Upgraded) or not issubclass(bases[1], nn.Module):
        raise TypeError(
            f"{upgraded.__name__} must have the bases (Upgraded, <class of the host's module>), "
            f"got {tuple(base.__name__ for base in bases)}"
        )
    if upgraded.points is not Upgraded.points and upgraded.example is Upgraded.example:
        raise TypeError(
            f"{upgraded.__name__} has points but no example, by which upgrade_ compares it with its host"
        )
    host = upgraded.host_class()
    if host in _UPGRADED:
        raise ValueError(f"{host.__name__} is registered already, as {_UPGRADED[host].__name__}")
    _UPGRADED[host] = upgraded
    return upgraded


def upgraded_class(module: nn.Module) -> type[Upgraded] | None:
    """The class for ``module`` (its own one if it is upgraded), or None if there is none."""
    if isinstance(module, Upgraded):
        return type(module)
    host = type(module)
    file = _FILES.get(host.__module__)
    if file is not None:
        importlib.import_module(f"freqfusion.upgrade.hosts.{file}")
    return _UPGRADED.get(host)
