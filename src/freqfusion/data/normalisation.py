"""Mean and deviation of images."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of the red, green and blue of ImageNet's images, in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviations of the same."""
