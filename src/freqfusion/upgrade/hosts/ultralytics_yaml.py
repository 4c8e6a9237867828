"""Fusion methods as layers of the YAML files by which ultralytics describes a network."""

import re
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER

from freqfusion.fusion import list_fusions
from freqfusion.fusion.catalog import create_fitting_fusion, is_guided
from freqfusion.fusion.single import SingleInput


class _Layer(nn.Module):
    """A layer after whose unpickling its YAML file can be read again, as training on from a checkpoint does."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register()


class FusionUp(_Layer):
    """``FreqFusionUp`` and its like: a coarse and a fine map come in, both concatenated at the fine size go out.

    Args:
        name: a method of :func:`freqfusion.list_fusions`.
        coarse_channels: channels of the first map.
        fine_channels: channels of the second map.
        options: further arguments of the method's constructor.
    """

    def __init__(self, name: str, coarse_channels: int, fine_channels: int, **options: Any) -> None:
        super().__init__()
        self.fusion = create_fitting_fusion(name, fine_channels, coarse_channels, options)

    def forward(self, x: list[Tensor]) -> Tensor:
        """``[(B, coarse_channels, h, w), (B, fine_channels, H, W)]`` to their concatenation at ``(H, W)``."""
        coarse, fine = x
        _, fine, coarse = self.fusion(hr_feat=fine, lr_feat=coarse)
        return torch.cat((coarse, fine), dim=1)


class UpsampleTwice(_Layer, SingleInput):
    """``CARAFE``, ``DySample`` and their like: a map of twice the sides; see :class:`SingleInput`."""


class Transferred(NamedTuple):
    """What :func:`transfer_weights` copied."""

    copied: int
    total: int
    """Tensors of the stock network."""
    left: tuple[str, ...]
    """Those of its tensors that have no place, or another shape."""

    def __str__(self) -> str:
        return f"{self.copied} of {self.total} tensors" + "".join(f"\n  left out: {key}" for key in self.left)


def register() -> None:
    """Make the fusion methods known to the YAML files of ultralytics, as ``FreqFusionUp``, ``CARAFE`` and so on.

    A method's name in any spelling (``lda_aqu``, ``LDA-AQU``) is a layer with one input, if the method needs no
    fine map; with ``Up`` after it, a layer in place of a ``Concat``, with the coarse map first. Either takes the
    method's options as a mapping::

        - [[-1, 6], 1, FreqFusionUp, [{compressed_channels: 32}]]
        - [-1, 1, DySample, []]

    The names of ultralytics itself come first. Calling this again changes nothing.
    """
    if not hasattr(tasks.parse_model, "takes_fusions"):  # another package may have wrapped it too
        tasks.parse_model = _with_our_layers(tasks.parse_model)


def _with_our_layers(parse: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(parse)
    def parse_model(d: dict[str, Any], ch: int, verbose: bool = True) -> tuple[nn.Sequential, list[int]]:
        rows = [*d["backbone"], *d["head"]]
        ours = {i: row for i, row in enumerate(rows) if not hasattr(tasks, row[2]) and _method(row[2])[0]}
        # A Concat stands in for each, whose channels are the sum of its inputs'. The word "ch" among its arguments
        # becomes the list of all layers' channels, as any name does that the parser has for a variable.
        for i, (sources, *_) in ours.items():
            rows[i] = [sources if isinstance(sources, list) else [sources], 1, "Concat", ["ch"]]
        model, save = parse({**d, "backbone": rows, "head": []}, ch, verbose and not ours)
        for i, row in ours.items():
            channels = model[i].d
            if not isinstance(channels, list):
                raise RuntimeError(
                    "this version of ultralytics does not tell the channels of layers; use freqfusion.upgrade_"
                )
            inputs = [channels[x if x >= 0 else i + x] for x in model[i].f]
            try:
                layer = _build(row, inputs)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {i}, {row[2]}: {error}") from error
            layer.np = sum(x.numel() for x in layer.parameters())
            layer.i, layer.f, layer.type = i, row[0], row[2]
            model[i] = layer
        if verbose and ours:
            for layer in model:
                LOGGER.info(f"{layer.i:>3}{layer.f!s:>20}{layer.np:>10}  {layer.type}")
        return model, save

    parse_model.takes_fusions = True  # type: ignore[attr-defined]
    return parse_model


def _method(word: str) -> tuple[str, bool]:
    """The method that a YAML file names, or ``""``, and whether ``Up`` follows."""
    methods = {_plain(name): name for name in list_fusions()}
    word = _plain(word)
    stem = word.removesuffix("up")
    return (methods[word], False) if word in methods else (methods.get(stem, ""), True)


def _plain(name: str) -> str:
    return re.sub("[-_ ]", "", name.lower())


def _build(row: list[Any], inputs: list[int]) -> Any:
    sources, repeats, word, arguments = row
    name, up = _method(word)
    options = arguments[0] if arguments else {}
    if repeats != 1 or len(arguments) > 1 or not isinstance(options, dict):
        raise ValueError(f"expected [from, 1, {word}, [{{option: value}}]] or no options, got {row}")
    if up:
        if len(inputs) != 2:
            raise ValueError(f"expected [[coarse, fine], 1, {word}, []], got {len(inputs)} inputs")
        return FusionUp(name, *inputs, **options)
    if is_guided(name):
        raise ValueError(f"needs a fine map: write [[coarse, fine], 1, {word}Up, []]")
    if isinstance(sources, list):
        raise ValueError(f"takes one input; write [-1, 1, {word}, []], or {word}Up for [coarse, fine]")
    return UpsampleTwice(name, inputs[0], **options)


def transfer_weights(model: Any, stock: Any) -> Transferred:
    """Copy the weights of a stock network into one with layers of ours. In place.

    Layers with weights are matched in their order by their class, whatever their numbers are; ours are passed over.
    Of a matched pair the tensors of equal shape are copied, so another number of classes keeps the rest of the head.

    Args:
        model: a ``YOLO`` or its network; training of the ``YOLO`` starts from these weights then.
        stock: another, such as ``YOLO("yolo11n.pt")``.

    Returns:
        The report, which prints as "n of m tensors".
    """
    own, theirs = (_layers_with_weights(x) for x in (model, stock))
    matcher = SequenceMatcher(None, [type(x) for x in theirs], [type(x) for x in own], autojunk=False)
    places = {
        theirs[block.a + i]: own[block.b + i].state_dict()
        for block in matcher.get_matching_blocks()
        for i in range(block.size)
    }
    copied, left = 0, []
    for layer in theirs:
        place = places.get(layer, {})
        for key, tensor in layer.state_dict().items():
            if key in place and place[key].shape == tensor.shape:
                place[key].copy_(tensor)
                copied += 1
            else:
                left.append(f"{layer.i}.{key}")
    if hasattr(model, "ckpt"):
        model.ckpt = model.ckpt or {
            "model": model.model
        }  # else train() builds the network anew from its YAML file
    return Transferred(copied, copied + len(left), tuple(left))


def _layers_with_weights(network: Any) -> list[Any]:
    while not isinstance(network, nn.Sequential):
        network = network.model
    layers: Iterable[nn.Module] = network
    return [layer for layer in layers if layer.state_dict() and not isinstance(layer, _Layer)]
