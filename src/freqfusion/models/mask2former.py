"""transformers' Mask2Former as the original is trained and judged: its targets, loss, inference and initial weights.

transformers has the network and the parts of the loss. What is here is what stands around them in the original, which
its image processor and its ``forward(mask_labels=...)`` do otherwise:

- targets are made, padded and, where there is none, left empty as by the original's dataset mappers;
- the pixel decoder runs in float32 under autocast too, with float32 positions and sampling coordinates, and so do
  matching, losses and inference; backbone and transformer decoder follow autocast;
- the losses are divided by the number of masks an image batch has on average over all processes;
- masks are enlarged to the padded image and cropped before they are judged, not made at a fixed size.

Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022, and its
code, facebookresearch/Mask2Former (``maskformer_model.py``, ``modeling/criterion.py``, ``data/dataset_mappers``,
``modeling/pixel_decoder/msdeformattn.py``).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerPixelDecoderEncoderLayer,
)

from freqfusion.data.normalisation import Normalisation
from freqfusion.models.base import Criterion, ObjectModel, PixelModel, pixel_cross_entropy
from freqfusion.models.inference import AS_SET, ObjectInference, fitting_size
from freqfusion.models.library import LibraryModel, check_images
from freqfusion.ops.resize import resize

Size = tuple[int, int]
Images = Tensor | Sequence[Tensor]
"""``(B, 3, H, W)``, or B images ``(3, H, W)`` that may differ in size; floating point and normalised."""

MULTIPLE = 32
"""The sides of padded images are multiples of this."""


class Targets(NamedTuple):
    """What the network has to find in B images."""

    mask_labels: list[Tensor]
    """Masks of each image ``(N, H, W)``, float32 of 0 and 1; N may be 0."""
    class_labels: list[Tensor]
    """Labels of each image ``(N,)``, int64, from 0."""


class LayerPrediction(NamedTuple):
    """What the queries say after one layer of the transformer decoder."""

    class_logits: Tensor
    """``(B, Q, K + 1)``; the last class is "no object"."""
    mask_logits: Tensor
    """``(B, Q, h, w)``, a quarter of the image's size."""


def semantic_targets(mask: Tensor, ignore_index: int = 255) -> Targets:
    """One mask for each class in each image, in the order of the classes.

    Args:
        mask: ``(B, H, W)``, integers: class indices.
        ignore_index: where there is no truth; such pixels belong to no mask.
    """
    targets = Targets([], [])
    for labels in mask:
        classes = labels.unique()
        classes = classes[classes != ignore_index]
        targets.mask_labels.append((labels == classes[:, None, None]).float())
        targets.class_labels.append(classes.long())
    return targets


def object_targets(samples: Sequence[Mapping[str, Any]]) -> Targets:
    """The objects, or the segments of things and stuff, of each sample; crowds are left out.

    A segment without a pixel left in the crop stays, with an empty mask, as in the original.

    Args:
        samples: of an object data set, as :class:`freqfusion.data.objects.ObjectDataset` has them, transformed:
            ``labels`` ``(N,)``, ``iscrowd`` ``(N,)`` and ``segments`` ``(H, W)`` (j on the j-th segment) or ``masks``
            ``(N, H, W)``.

    Raises:
        ValueError: for a sample with neither segments nor masks.
    """
    targets = Targets([], [])
    for sample in samples:
        single = ~sample["iscrowd"]
        if "segments" in sample:
            masks = sample["segments"] == single.nonzero()[:, :, None] + 1
        elif "masks" in sample:
            masks = sample["masks"][single]
        else:
            raise ValueError(
                f"a sample has {', '.join(sample)}, but neither segments nor masks, which Mask2Former needs: "
                "use data with masks or panoptic data"
            )
        targets.mask_labels.append(masks.float())
        targets.class_labels.append(sample["labels"][single].long())
    return targets


def predict_layers(host: Mask2FormerForUniversalSegmentation, images: Tensor) -> list[LayerPrediction]:
    """Run the network.

    Args:
        host: plain or upgraded.
        images: ``(B, 3, H, W)``, normalised; the sides are multiples of 32.

    Returns:
        The predictions of the untouched queries and after every layer, the final ones last.
    """
    pixel_level = host.model.pixel_level_module
    features = pixel_level.encoder(images).feature_maps
    dtype = pixel_level.decoder.level_embed.dtype
    with _without_autocast(images):
        decoded = pixel_level.decoder([feature.to(dtype) for feature in features])
    queries = host.model.transformer_module(
        multi_scale_features=decoded.multi_scale_features,
        mask_features=decoded.mask_features,
        output_hidden_states=True,
    )
    return [
        LayerPrediction(host.class_predictor(hidden.transpose(0, 1)), masks)
        for hidden, masks in zip(
            queries.intermediate_hidden_states, queries.masks_queries_logits, strict=True
        )
    ]


def set_losses(
    host: Mask2FormerForUniversalSegmentation,
    images: Images,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The losses of the original; their sum is to be minimised.

    Masks and queries are matched, and the losses computed, at random points, for every layer's predictions alike
    (deep supervision). Weights, number of points and so on are the configuration's, whose defaults are the published
    ones: 2 for the class, 5 for each mask loss, a tenth for "no object", 12,544 points.

    The sums over masks are divided by the number of masks that a process has on average, 1 at least. With a process
    group every process must call this. transformers' own loss divides by the number of the process alone, or, where
    accelerate is set up, by the average divided once more by the number of processes.

    Args:
        host: plain or upgraded.
        images: normalised; padded here.
        mask_labels: see :class:`Targets`.
        class_labels: see :class:`Targets`.

    Returns:
        ``class``, ``mask`` (cross entropy) and ``dice``: weighted and summed over the layers; float32 scalars.

    Raises:
        ValueError: for targets that do not fit the images or the classes.
    """
    config: Any = host.config
    padded, sizes = _pad_images(images)
    _check_targets(sizes, mask_labels, class_labels, config.num_labels)
    layers = predict_layers(host, padded)
    if not config.use_auxiliary_loss:
        layers = layers[-1:]
    criterion: Any = host.criterion
    weights = host.weight_dict
    criterion.matcher.cost_class = weights["loss_cross_entropy"]  # 1 in older versions of transformers
    total: dict[str, list[Tensor]] = {"class": [], "mask": [], "dice": []}
    with _without_autocast(padded):
        labels = [label.to(padded.device) for label in class_labels]
        masks = [_pad(mask.to(padded.device, torch.float32), padded.shape[-2:]) for mask in mask_labels]
        count = _mean_count(labels, padded.device)
        for layer in (layers[-1], *layers[:-1]):  # the original's order, for the same random points
            class_logits, mask_logits = (logits.float() for logits in layer)
            matched = criterion.matcher(mask_logits, class_logits, masks, labels)
            of_classes = criterion.loss_labels(class_logits, labels, matched)
            of_masks = criterion.loss_masks(mask_logits, masks, matched, count)
            total["class"].append(weights["loss_cross_entropy"] * of_classes["loss_cross_entropy"])
            total["mask"].append(weights["loss_mask"] * of_masks["loss_mask"])
            total["dice"].append(weights["loss_dice"] * of_masks["loss_dice"])
    return {name: torch.stack(values).sum() for name, values in total.items()}


@dataclass(frozen=True)
class QueryResult:
    """What the queries found in one image; the methods say it in the forms of the three tasks, in float32."""

    class_logits: Tensor
    """``(Q, K + 1)``; the last class is "no object"."""
    mask_logits: Tensor
    """``(Q, h, w)``, over the padded image."""
    padded_size: Size
    image_size: Size
    """Size of the image without its padding, at the top left."""
    output_size: Size
    """Size of the results."""

    def masks(self, queries: Tensor | slice = slice(None)) -> Tensor:
        """Logits ``(Q, H, W)`` of the queries' masks at the output size, bilinear from the padded to the image's."""
        enlarged = resize(self.mask_logits[None, queries].float(), self.padded_size, "bilinear")
        return self._fit(enlarged[0])

    def semantic(self, *, resize_first: bool = False) -> Tensor:
        """The queries' votes: the sum of class probability times mask probability.

        Args:
            resize_first: resize the masks to the output size, not the sums, as the original does for networks that
                are judged by panoptic or instance segmentation too.

        Returns:
            ``(K, H, W)``, not negative; they do not add up to 1.
        """
        with _without_autocast(self.mask_logits):
            classes = self.class_logits.float().softmax(dim=-1)[:, :-1]
            if resize_first:
                return torch.einsum("qk,qhw->khw", classes, self.masks().sigmoid())
            masks = resize(self.mask_logits[None].float(), self.padded_size, "bilinear")[0]
            return self._fit(torch.einsum("qk,qhw->khw", classes, masks.sigmoid()))

    def panoptic(
        self, things: Sequence[bool], *, mask_threshold: float = 0.8, overlap_threshold: float = 0.8
    ) -> dict[str, Tensor]:
        """Segments that do not overlap.

        Each pixel goes to the surest query; a query is left out if too little of its mask remains. Segments of a
        class of stuff are one.

        Args:
            things: for each class whether it is a thing.
            mask_threshold: queries with a smaller class probability are not used.
            overlap_threshold: smallest remaining share of a query's mask.

        Returns:
            ``segments`` ``(H, W)`` int64, 0 where there is none and j on the j-th segment; ``segment_labels``
            ``(S,)`` int64; ``segment_scores`` ``(S,)``, class probabilities (of merged segments the largest).
        """
        scores, labels = self.class_logits.float().softmax(dim=-1).max(dim=-1)
        sure = ((labels < self.class_logits.shape[-1] - 1) & (scores > mask_threshold)).nonzero()[:, 0]
        scores, labels = scores[sure], labels[sure]
        segments = torch.zeros(self.output_size, dtype=torch.int64, device=labels.device)
        segment_labels: list[int] = []
        segment_scores: list[float] = []
        if len(sure):
            masks = self.masks(sure).sigmoid()
            owner = (scores[:, None, None] * masks).argmax(dim=0)
        of_stuff: dict[int, int] = {}
        for query, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
            own, whole = owner == query, masks[query] >= 0.5
            visible = own & whole
            if not visible.any() or int(own.sum()) / int(whole.sum()) < overlap_threshold:
                continue
            if label in of_stuff:
                number = of_stuff[label]
                segment_scores[number - 1] = max(segment_scores[number - 1], score)
            else:
                segment_labels.append(label)
                segment_scores.append(score)
                number = len(segment_labels)
                if not things[label]:
                    of_stuff[label] = number
            segments[visible] = number
        return {
            "segments": segments,
            "segment_labels": torch.tensor(segment_labels, dtype=torch.int64, device=labels.device),
            "segment_scores": torch.tensor(segment_scores, dtype=torch.float32, device=labels.device),
        }

    def instances(self, *, top_k: int = 100, things: Sequence[bool] | None = None) -> dict[str, Tensor]:
        """Objects, the surest first.

        Args:
            top_k: how many pairs of a query and a class are taken.
            things: for each class whether it is kept, as the original keeps things alone in panoptic networks.

        Returns:
            Of N objects ``boxes`` ``(N, 4)`` around the masks, XYXY in pixels (0 without a pixel), ``labels``
            ``(N,)`` from 0, ``scores`` ``(N,)`` (class probability times mean mask probability) and ``masks``
            ``(N, 1, H, W)`` bool.
        """
        probabilities = self.class_logits.float().softmax(dim=-1)[:, :-1]
        num_classes = probabilities.shape[1]
        scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
        if things is not None:
            kept = torch.tensor(things, dtype=torch.bool, device=pairs.device)[pairs % num_classes]
            scores, pairs = scores[kept], pairs[kept]
        logits = self.masks(pairs // num_classes)
        masks = logits > 0
        inside = (logits.sigmoid() * masks).sum(dim=(1, 2)) / (masks.sum(dim=(1, 2)) + 1e-6)
        scores, order = (scores * inside).sort(descending=True, stable=True)
        masks = masks[order]
        return {
            "boxes": _boxes(masks),
            "labels": (pairs % num_classes)[order],
            "scores": scores,
            "masks": masks[:, None],
        }

    def _fit(self, maps: Tensor) -> Tensor:
        """``(C, H, W)`` over the padded image, at the output size."""
        height, width = self.image_size
        return resize(maps[None, :, :height, :width], self.output_size, "bilinear")[0]


def predict_queries(
    host: Mask2FormerForUniversalSegmentation, images: Images, output_sizes: Sequence[Size] | None = None
) -> list[QueryResult]:
    """What the queries find in each image.

    Args:
        host: plain or upgraded; its mode is left alone.
        images: normalised, of any sizes from one pixel on; padded here with zeros, at the right and at the bottom, to
            the size of the largest and to multiples of 32.
        output_sizes: heights and widths of the results, by default the images'.

    Raises:
        ValueError: for another number of output sizes than of images.
    """
    padded, sizes = _pad_images(images)
    final = predict_layers(host, padded)[-1]
    outputs = sizes if output_sizes is None else output_sizes
    padded_size = (padded.shape[-2], padded.shape[-1])
    if len(outputs) != len(sizes):
        raise ValueError(f"got {len(outputs)} output sizes for {len(sizes)} images; give one for each")
    return [
        QueryResult(class_logits, mask_logits, padded_size, size, output)
        for class_logits, mask_logits, size, output in zip(*final, sizes, outputs, strict=True)
    ]


class MaskClassifier(LibraryModel, PixelModel, ObjectModel):
    """transformers' Mask2Former: gives scores for every pixel, and finds instances or panoptic segments.

    Args:
        host: the network, plain or upgraded.
        num_classes: number of classes K.
        things: for each class whether it is a thing; all by default.
        output: what :meth:`find` gives, instances or panoptic segments.
        frozen_norm: see :class:`~freqfusion.models.library.LibraryModel`.
    """

    has_own_loss = True
    host: Mask2FormerForUniversalSegmentation

    def __init__(
        self,
        host: Mask2FormerForUniversalSegmentation,
        num_classes: int,
        things: Sequence[bool] | None = None,
        output: Literal["instance", "panoptic"] = "instance",
        frozen_norm: bool = False,
    ) -> None:
        super().__init__(host, num_classes, frozen_norm)
        if output not in ("instance", "panoptic"):
            raise ValueError(f"output must be instance or panoptic, got {output!r}")
        self.things = [True] * num_classes if things is None else [bool(thing) for thing in things]
        self.finds = "segments" if output == "panoptic" else "instances"
        self.bypassed = (host, *map(host.get_submodule, ("model", "model.pixel_level_module")))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores for every pixel.

        Args:
            images: ``(B, 3, H, W)``, floating point, normalised, any ``H, W >= 1``.

        Returns:
            ``(B, K, H, W)``: the logarithm of what the queries vote for each class (see
            :meth:`QueryResult.semantic`). That has the same largest class, and its softmax is each class's share of
            the votes, so that scores of several passes are averaged as those of other networks are.

        Raises:
            TypeError: for integer images.
            ValueError: for another shape.
        """
        check_images(images)
        votes = torch.stack([result.semantic() for result in predict_queries(self.host, images)])
        return votes.clamp_min(torch.finfo(votes.dtype).tiny).log()

    def find(self, images: Sequence[Tensor], inference: ObjectInference = AS_SET) -> list[dict[str, Tensor]]:
        """See :meth:`freqfusion.models.base.ObjectModel.find`.

        Raises:
            ValueError: for several passes, whose results cannot be merged.
        """
        if inference.flip or len(inference.sizes or ()) > 1:
            raise ValueError(
                "a mask classifier finds objects in one pass: give one size and no mirrored pass"
            )
        size = inference.sizes[0] if inference.sizes else None
        resized = [
            _normalise(_at_size(image, size, inference.max_size), self.normalisation) for image in images
        ]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        with torch.no_grad():
            results = predict_queries(self.host, resized, sizes)
        if self.finds == "segments":
            return [result.panoptic(self.things) for result in results]
        limit = inference.max_detections
        return [result.instances(top_k=limit, things=self.things) for result in results]

    def loss(
        self,
        images: Images,
        target: Tensor | Sequence[Mapping[str, Any]],
        criterion: Criterion = pixel_cross_entropy,
    ) -> Tensor:
        """The published loss, under both contracts.

        Args:
            images: normalised ``(B, 3, H, W)`` with a mask; with samples ``(3, H, W)`` each, in [0, 1].
            target: a mask ``(B, H, W)`` int64 of class indices, 255 where there is no truth, or the images' samples.
                Where instances are found, stuff counts as a crowd.
            criterion: not used.

        Returns:
            A scalar.
        """
        if isinstance(target, Tensor):
            targets = semantic_targets(target)
        else:
            images = [_normalise(image, self.normalisation) for image in images]
            samples = target if self.finds == "segments" else [self._things_of(x) for x in target]
            targets = object_targets(samples)
        return torch.stack(list(set_losses(self.host, images, *targets).values())).sum()

    def _things_of(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """A sample whose stuff is left out: it is no more to be found than a crowd."""
        thing = torch.tensor(self.things, device=sample["labels"].device)[sample["labels"]]
        return {**sample, "iscrowd": sample["iscrowd"] | ~thing}


def _at_size(image: Tensor, size: int | None, max_size: int | None) -> Tensor:
    """An image ``(3, H, W)`` whose shorter side is ``size``, unless the longer were above ``max_size``."""
    if size is None:
        return image
    limit = max(image.shape) * size if max_size is None else max_size
    fitting = fitting_size(image.shape[-2], image.shape[-1], size, limit)
    return F.interpolate(image[None], fitting, mode="bilinear", antialias=True)[0]


def _normalise(image: Tensor, normalisation: Normalisation) -> Tensor:
    mean, deviation = (image.new_tensor(x)[:, None, None] for x in normalisation)
    return (image - mean) / deviation


@torch.no_grad()
def reset_parameters_(host: Mask2FormerForUniversalSegmentation) -> None:
    """Give a plain network the random initial weights of the original, its backbone excepted. In place.

    transformers draws the convolutions of the pixel decoder, its feed-forward layers and the class predictor from a
    narrower distribution, which batch statistics do not make up for where no normalisation follows.
    """
    decoder = host.model.pixel_level_module.decoder
    transformer = host.model.transformer_module
    for projection in decoder.input_projections:
        nn.init.xavier_uniform_(projection[0].weight)
        nn.init.zeros_(projection[0].bias)
    convolutions = [*decoder.lateral_convolutions, *decoder.output_convolutions, [decoder.mask_projection]]
    convolutions += [[layer] for layer in transformer.input_projections]
    for convolution, *_ in convolutions:
        if isinstance(convolution, nn.Conv2d):  # else the transformer takes the maps as they are
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
    nn.init.normal_(decoder.level_embed)
    for layer in (*decoder.encoder.layers, *transformer.decoder.layers):
        for linear in (layer.fc1, layer.fc2):
            linear.reset_parameters()
            nn.init.xavier_uniform_(linear.weight)
        if isinstance(layer, Mask2FormerPixelDecoderEncoderLayer):
            _reset_deformable_attention_(layer.self_attn)
        else:
            _reset_attention_(layer)
    for embedding in (transformer.queries_embedder, transformer.queries_features, transformer.level_embed):
        nn.init.normal_(embedding.weight)
    for module in (*transformer.decoder.mask_predictor.modules(), host.class_predictor):
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def _reset_deformable_attention_(attention: Any) -> None:
    for linear in (attention.sampling_offsets, attention.attention_weights):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    for linear in (attention.value_proj, attention.output_proj):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    # each head looks in a direction of its own, each point one step further
    heads, points = attention.n_heads, attention.n_points
    angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    steps = torch.arange(1, points + 1, dtype=torch.float32)
    offsets = directions[:, None, None] * steps[:, None]  # (heads, 1, points, 2)
    attention.sampling_offsets.bias.copy_(offsets.expand(-1, attention.n_levels, -1, -1).flatten())


def _reset_attention_(layer: Any) -> None:
    own, cross = layer.self_attn, layer.cross_attn
    for linear in (own.q_proj, own.k_proj, own.v_proj):
        # the original draws the three as one matrix
        nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))
        nn.init.zeros_(linear.bias)
    nn.init.xavier_uniform_(cross.in_proj_weight)
    nn.init.zeros_(cross.in_proj_bias)
    for linear in (own.out_proj, cross.out_proj):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)


@contextmanager
def _without_autocast(like: Tensor) -> Iterator[None]:
    with torch.autocast(like.device.type, enabled=False):
        yield


def _pad_images(images: Images) -> tuple[Tensor, list[Size]]:
    """``(B, 3, H, W)`` with sides that are multiples of :data:`MULTIPLE`, and the sizes before."""
    shapes = [tuple(image.shape) for image in images]
    if not shapes or any(len(shape) != 3 or shape[0] != 3 or 0 in shape for shape in shapes):
        raise ValueError(
            f"expected images (3, H, W), at least one, got {', '.join(map(str, shapes)) or 'none'}"
        )
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    height, width = (-(-max(sides) // MULTIPLE) * MULTIPLE for sides in zip(*sizes, strict=True))
    if isinstance(images, Tensor):
        return _pad(images, (height, width)), sizes
    return torch.stack([_pad(image, (height, width)) for image in images]), sizes


def _pad(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Zeros at the right and at the bottom."""
    return F.pad(maps, (0, size[1] - maps.shape[-1], 0, size[0] - maps.shape[-2]))


def _check_targets(
    sizes: Sequence[Size], mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor], num_classes: int
) -> None:
    if not len(sizes) == len(mask_labels) == len(class_labels):
        raise ValueError(
            f"got {len(mask_labels)} sets of masks and {len(class_labels)} of labels for {len(sizes)} images"
        )
    for index, (size, masks, labels) in enumerate(zip(sizes, mask_labels, class_labels, strict=True)):
        if masks.shape != (len(labels), *size):
            raise ValueError(
                f"image {index}: the masks have the shape {tuple(masks.shape)}, expected {(len(labels), *size)} for "
                f"{len(labels)} labels and an image of {size[0]} x {size[1]} pixels"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"image {index}: holds labels from {int(labels.min())} to {int(labels.max())}, but the network has "
                f"{num_classes} classes, counted from 0; pixels without truth are marked 255"
            )


def _mean_count(class_labels: Sequence[Tensor], device: torch.device) -> Tensor:
    count = torch.tensor(float(sum(map(len, class_labels))), device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count /= distributed.get_world_size()
    return count.clamp(min=1)


def _boxes(masks: Tensor) -> Tensor:
    """``(N, 4)`` float32 around masks ``(N, H, W)``; zeros where a mask is empty."""
    sides = []
    for filled in (masks.any(dim=1), masks.any(dim=2)):
        places = torch.arange(filled.shape[1], device=masks.device)
        first = torch.where(filled, places, filled.shape[1]).amin(dim=1)
        last = torch.where(filled, places + 1, 0).amax(dim=1)
        sides.append((first.minimum(last), last))
    (left, right), (top, bottom) = sides
    return torch.stack((left, top, right, bottom), dim=1).float()
