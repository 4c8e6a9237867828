"""Run a data set through one or two trained models and record what their fusions get and give."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqfusion.analysis.measure import AFTER, BEFORE, Internals, Observation
from freqfusion.analysis.record import Recorded, fusion_sites, record_features
from freqfusion.analysis.spectra import fusion_internals, kernel_spectrum
from freqfusion.data.transforms import eval_transform
from freqfusion.fusion import FreqFusion
from freqfusion.models.base import normalisation_of
from freqfusion.ops.resize import resize
from freqfusion.tasks.image_data import SegmentationData
from freqfusion.tasks.rng import fixed_randomness
from freqfusion.training.checkpoints import BEST, LAST, load_checkpoint
from freqfusion.upgrade import FusionSlot
from freqfusion.zoo import from_pretrained


@dataclass(frozen=True)
class Subject:
    """A model to look into."""

    name: str
    network: nn.Module
    """In evaluation mode."""
    sites: Sequence[str]
    """Paths of the fusions to record."""
    data: Mapping[str, Any] | None
    """Arguments of :class:`SegmentationData` that it was trained with; None for a model without a run."""


def load_subject(path: Path, sites: Sequence[str] | None = None) -> Subject:
    """A model from a ``.ckpt`` file of ``freqfusion fit`` or a folder of ``freqfusion.save_pretrained``.

    Args:
        path: the file or folder.
        sites: paths of the fusions to record; by default all.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: for a file that cannot be read, or a model without such sites.
    """
    if path.is_dir():
        network, data = from_pretrained(path).float(), None
        name = path.name
    else:
        module, _, _ = load_checkpoint(path)
        network, data = module.network, module.data_options
        name = path.resolve().parent.name if path.name in (BEST, LAST) else path.stem
    with record_features(network):  # in here a host that is not upgraded has sites too
        known = fusion_sites(network)
    for site in sites or ():
        if site not in known:
            raise ValueError(f"{name} has no fusion site {site!r}; it has {', '.join(known)}")
    return Subject(name, network, known if sites is None else list(sites), data)


def tell_apart(subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects with names that differ."""
    names = [subject.name for subject in subjects]
    if len(set(names)) == len(names):
        return list(subjects)
    return [
        replace(subject, name=f"{subject.name} {letter}")
        for subject, letter in zip(subjects, "ABCDEFGHIJ", strict=False)
    ]


def open_data(
    subject: Subject, root: Path | None, dataset: str | None, size: tuple[int, int] | None
) -> SegmentationData:
    """The data to run: what the model was trained on, as far as nothing else is said.

    Args:
        subject: the model.
        root: folder of the data. For a model that was trained on none, a plain folder data set.
        dataset: a name of :func:`freqfusion.data.list_datasets`.
        size: height and width that all images are brought to.

    Raises:
        ValueError: where it remains unknown which data to take.
    """
    if subject.data is None and root is None and dataset is None:
        raise ValueError(f"{subject.name} does not know its data: give a folder with --data.root")
    options = dict(subject.data or {})
    trained = options.get("dataset")
    if root is not None:
        options["root"] = str(root)
        if trained in (None, "synthetic"):
            options["dataset"] = "folder"
    if dataset is not None:
        options["dataset"] = dataset
    if options.get("dataset") != trained:
        options["dataset_options"] = None
    if size is not None:
        options["resize"] = size
    return SegmentationData(**options)


def observe(
    subjects: Sequence[Subject],
    data: SegmentationData,
    split: str,
    indices: Sequence[int],
    device: torch.device,
) -> Iterator[Observation]:
    """Images with labels, the models' features at their fusion sites, predictions, and what FreqFusion modules do.

    Every image goes through each network once and whole. Sites of two models meet in their order; before
    fusion is the coarse map enlarged bilinearly, after fusion what the decoder gets instead of it.

    Args:
        subjects: the models, one or several with as many sites each.
        data: of the images.
        split: the part to take.
        indices: which of its images.
        device: where the networks run.

    Raises:
        ValueError: for models that differ in their number of sites, that refuse an image or that predict
            another number of classes.
    """
    counts = {subject.name: len(subject.sites) for subject in subjects}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"the models must have as many fusion sites each to be compared, got {counts}; choose with --sites"
        )
    for subject in subjects:
        subject.network.to(device)
    for index in indices:
        sample = data.sample(split, index)
        labels = sample["mask"].as_subclass(Tensor).long()
        maps: dict[str, dict[str, Tensor]] = {site: {} for site in subjects[0].sites}
        internals: dict[str, dict[str, Internals | None]] = {site: {} for site in subjects[0].sites}
        predictions = {}
        for subject in subjects:
            prefix = f"{subject.name} " if len(subjects) > 1 else ""
            transform = eval_transform(normalisation_of(subject.network))
            images = transform(sample)["image"].as_subclass(Tensor)[None].to(device)
            with record_features(subject.network, subject.sites) as recorded:
                output = _run(subject, images, sample["name"])
                modules = [subject.network.get_submodule(site) for site in subject.sites]
            for level, site, module in zip(maps, subject.sites, modules, strict=True):
                if site not in recorded:
                    raise ValueError(
                        f"{subject.name}: the fusion {site} did not run; leave it out with --sites"
                    )
                (fine, coarse), (_, fused) = recorded[site].inputs, recorded[site].outputs
                maps[level][prefix + BEFORE] = resize(coarse, fine.shape[-2:], "bilinear")[0]
                maps[level][prefix + AFTER] = fused[0]
                try:
                    internals[level][subject.name] = _internals(module, recorded[site])
                except ValueError as error:  # values that are not finite
                    raise ValueError(f"{subject.name}, {sample['name']}, {site}: {error}") from error
            scores = _scores(output)
            if scores is not None:
                if scores.shape[1] != len(data.classes):
                    raise ValueError(
                        f"{subject.name} predicts {scores.shape[1]} classes, the data has {len(data.classes)}: "
                        "use data with the classes that the model was made for"
                    )
                scores = F.interpolate(
                    scores.float(), size=labels.shape, mode="bilinear", align_corners=False
                )
                predictions[subject.name] = scores.argmax(1)[0].cpu()
        yield Observation(
            name=sample["name"],
            maps=maps,
            labels=labels,
            image=sample["image"].as_subclass(Tensor),
            predictions=predictions,
            internals=internals,
        )


def _internals(site: nn.Module, recorded: Recorded) -> Internals | None:
    """What a site's FreqFusion did to the one image it was given; None for another method."""
    fusion = site.fusion if isinstance(site, FusionSlot) else site
    if not isinstance(fusion, FreqFusion):
        return None
    fine, coarse = recorded.inputs
    found = fusion_internals(fusion, fine, coarse)
    kernels = {"low-pass": kernel_spectrum(found.lowpass_kernels, fusion.lowpass_kernel)}
    offsets = detail = None
    if found.highpass_kernels is not None:
        kernels["high-pass"] = kernel_spectrum(found.highpass_kernels, fusion.highpass_kernel, highpass=True)
        # by what came out of the site, so that its gates count
        detail = (recorded.outputs[0] - fine)[0].float().square().mean(0).sqrt().cpu()
    if found.offsets is not None:
        offsets = found.offsets[0].float().unflatten(0, (2, -1)).mean(1).cpu()
    return Internals(kernels, offsets, (coarse.shape[-2], coarse.shape[-1]), detail)


@torch.no_grad()
def _run(subject: Subject, images: Tensor, name: str) -> Any:
    try:
        with fixed_randomness(images.device):
            return subject.network(images)
    except RuntimeError as error:
        height, width = images.shape[-2:]
        raise ValueError(
            f"{subject.name} cannot run the image {name} of {width}x{height} pixels ({error}); --data.resize brings "
            "all images to another size"
        ) from error


def _scores(output: Any) -> Tensor | None:
    """Class scores ``(B, K, h, w)`` in what a segmentation network returns, if they are there."""
    if isinstance(output, Mapping):  # the model outputs of transformers are mappings too
        output = output.get("out", output.get("logits"))
    return output if isinstance(output, Tensor) and output.ndim == 4 else None
