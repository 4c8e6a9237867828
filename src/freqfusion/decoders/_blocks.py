"""Parts that the decoders share."""

from collections.abc import Sequence

from torch import Tensor, nn


def build_laterals(in_channels: Sequence[int], channels: int) -> nn.ModuleList:
    """A 1x1 convolution to ``channels`` for each map."""
    if len(in_channels) < 2:
        raise ValueError(f"in_channels must name at least two maps, got {tuple(in_channels)}")
    return nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)


def apply_laterals(laterals: nn.ModuleList, features: Sequence[Tensor]) -> list[Tensor]:
    """Each map through its own convolution."""
    if len(features) != len(laterals):
        raise ValueError(f"got {len(features)} maps, this decoder was built for {len(laterals)}")
    return [lateral(x) for lateral, x in zip(laterals, features, strict=True)]


def init_xavier(*convolutions: nn.Module) -> None:
    """Xavier-uniform weights and zero biases."""
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)  # type: ignore[arg-type]
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]


def halving_stages(widths: Sequence[int]) -> nn.ModuleList:
    """Stages of two 3x3 convolutions from an image to maps of these channels, each halving the size, rounded up."""
    return nn.ModuleList(
        nn.Sequential(conv_norm_relu(previous, width, stride=2), conv_norm_relu(width, width))
        for previous, width in zip((3, *widths), widths, strict=False)
    )


def conv_norm_relu(in_channels: int, channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, batch norm and ReLU; sides are divided by ``stride`` and rounded up."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )
