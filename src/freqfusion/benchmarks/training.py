"""What a user feels: images per second and peak memory of whole training steps."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from freqfusion.benchmarks.cases import NUM_CLASSES
from freqfusion.benchmarks.memory import Meter
from freqfusion.benchmarks.runner import Settings, Step, median_ratio, prefixed, take_turns
from freqfusion.zoo import create_model

METHODS = ("freqfusion", "carafe", "dysample+")
"""Compared with the network's plain upsampling."""
LAYOUTS = {False: "NCHW", True: "NHWC"}
"""By whether images and weights are ``channels_last``."""


@dataclass(frozen=True)
class Network:
    """A network and the batch that it is trained with."""

    name: str
    batch: int
    size: tuple[int, int]
    """Height and width of the images."""
    plain: str
    """The fusion that the network has without a method."""
    create: Callable[[str], Any]
    """The network for the name of a fusion."""


NETWORKS = {
    network.name: network
    for network in (
        Network("segnext_t", 16, (512, 512), "bilinear", partial(create_model, "segnext_t", NUM_CLASSES)),
        Network(
            "fpn_resnet50",
            2,
            (800, 1344),
            "nearest",
            partial(create_model, "fpn_resnet50", NUM_CLASSES, channels=256),
        ),
        Network(
            "unet_tf_efficientnet_lite0",
            16,
            (360, 480),
            "nearest",
            partial(create_model, "unet_tf_efficientnet_lite0", NUM_CLASSES),
        ),
        Network(
            "mask2former_r50",
            8,
            (512, 512),
            "bilinear",
            partial(create_model, "mask2former_r50", NUM_CLASSES),
        ),
    )
}


@dataclass(frozen=True)
class Throughput:
    """Training steps of a network with one method in one layout; without samples ``note`` says why not."""

    network: Network
    method: str
    channels_last: bool
    samples: tuple[float, ...] = ()
    """Seconds of one step, a round each."""
    cost: float | None = None
    """Time of a step in times that of the plain network in the same layout: the median over the rounds."""
    peak_bytes: int | None = None
    """Memory of a step on a CUDA device, beyond weights and optimizer; None elsewhere."""
    note: str = ""

    @property
    def images_per_second(self) -> float:
        return self.network.batch / statistics.median(self.samples)


class _Training:
    """Steps of one network: autocast to bfloat16 on CUDA, float32 elsewhere."""

    def __init__(self, network: Network, method: str, channels_last: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.module = network.create(method).to(device).train()
        self.images = torch.rand(network.batch, 3, *network.size, device=device)
        self.mask = torch.randint(NUM_CLASSES, (network.batch, *network.size), device=device)
        if channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), 1e-5, fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.module.loss(self.images, self.mask, F.cross_entropy)
        loss.backward()
        self.optimizer.step()

    def peak(self) -> int | None:
        """Bytes of one step."""
        if self.device.type != "cuda":
            return None
        meter = Meter(self.device)
        self.step()
        return meter.peak()


def measure_training(
    network: Network, channels_last: bool, settings: Settings, step: Step = lambda what: None
) -> list[Throughput]:
    """Training steps of a network in one layout, its plain form first; the methods take turns.

    Args:
        network: of :data:`NETWORKS`, or one of another size.
        channels_last: layout of images and weights.
        settings: device, rounds and threads; the dtype is that of autocast.
        step: told before each step.
    """
    methods = (network.plain, *METHODS)
    runs: dict[str, _Training] = {}
    peaks: dict[str, int | None] = {}
    notes: dict[str, str] = {}
    place = f"{network.name}, {LAYOUTS[channels_last]}: "
    for method in methods:
        step(f"{place}{method}, first step")
        try:  # whatever one method raises must not cost the others' figures
            runs[method] = _Training(network, method, channels_last, settings.device)
            runs[method].step()
            peaks[method] = runs[method].peak()
        except Exception as error:
            runs.pop(method, None)
            notes[method] = str(error).strip().partition("\n")[0] or type(error).__name__

    def wait() -> None:
        if settings.device.type != "cpu":
            torch.accelerator.synchronize(settings.device)

    calls = {method: run.step for method, run in runs.items()}
    samples, failures = take_turns(calls, settings.rounds, {}, wait, prefixed(step, place))
    notes |= failures
    return [
        Throughput(
            network,
            method,
            channels_last,
            tuple(samples.get(method, ())),
            median_ratio(samples.get(method, []), samples.get(network.plain, [])),
            peaks.get(method),
            notes.get(method, ""),
        )
        for method in methods
    ]


def shrunk(network: Network, divisor: int) -> Network:
    """The same with one image a ``divisor``-th as high and wide, where the full size would take too long."""
    height, width = (max(1, side // divisor) for side in network.size)
    return Network(network.name, 1, (height, width), network.plain, network.create)


def find_networks(names: Sequence[str]) -> list[Network]:
    """The networks of these names; all if none is given.

    Raises:
        ValueError: for an unknown name.
    """
    for name in names:
        if name not in NETWORKS:
            raise ValueError(f"there is no network {name!r} here; choose among {', '.join(NETWORKS)}")
    return [NETWORKS[name] for name in names or NETWORKS]
