"""The Lightning data modules: which images, in which order, with which augmentation.

Order and augmentation depend on ``(seed, epoch, index)`` alone: not on the number of workers or processes,
and not on what was drawn before. So a run can start again in the middle of an epoch and go on exactly.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from freqfusion._cores import available_cores
from freqfusion._settings import check_settings
from freqfusion._text import readable
from freqfusion.data import BadSampleError, Kind, create_dataset, list_datasets
from freqfusion.data.base import FileDataset, SampleFiles
from freqfusion.data.cache import SampleCache, decode_all
from freqfusion.data.normalisation import IMAGENET, Normalisation
from freqfusion.data.object_transforms import group_by_aspect
from freqfusion.data.transforms import eval_transform, train_transform
from freqfusion.models.base import normalisation_of
from freqfusion.tasks.rng import cpu_seed, derive_seed

Sample = dict[str, Any]

_log = logging.getLogger(__name__)
CACHE_VARIABLE = "FREQFUSION_CACHE"
"""The environment variable that names the folder of decoded data sets that the runs of a race share."""
_LOOKING_SECONDS = 30.0
"""How long the truth of a split is searched for its classes."""
_TRUTH: dict[Kind, str] = {
    "semantic": "a class for every pixel, as the task semantic needs it",
    "objects": "boxes, masks or segments, as the tasks detection and masks need them",
    "images": "no truth, as the task features needs none",
}


class _Samples(Dataset[Sample]):
    """Samples by ``(epoch, index)``: read and transformed, with randomness from ``(seed, epoch, index)``."""

    def __init__(self, dataset: Any, transform: Callable[[Sample], Sample], seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        with cpu_seed(derive_seed(self.seed, epoch, index)):
            return self.transform(self.dataset[index])


def collate(samples: list[Sample]) -> Sample:
    """Stack samples of one size; an empty list becomes a batch without images."""
    sizes = {tuple(sample["image"].shape[-2:]) for sample in samples}
    if len(sizes) > 1:
        listed = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise ValueError(
            f"a batch holds images of several sizes ({listed}): "
            "set eval_batch_size to 1, or resize, which gives all one size"
        )
    batch: Sample = {"name": [sample["name"] for sample in samples]}
    if samples:
        batch["image"] = torch.stack([sample["image"] for sample in samples])
        batch["mask"] = torch.stack([sample["mask"] for sample in samples])
    return batch


class TrainOrder(Sampler[list[tuple[int, int]]]):
    """This process's share of the batches of one epoch, from any batch on.

    All processes shuffle alike, cut the same whole batches and take their own slice of each, so that
    together they see what a single process would. The last, incomplete batch is left out.

    Args:
        length: How many images there are.
        batch_size: Images a batch, over all processes together.
        seed: Decides the order.
        rank: Which process this is.
        world_size: How many there are.
        sizes: Height and width of every image, to make batches of landscape and of portrait images.

    Attributes:
        epoch: Which pass over the data.
        first: The first batch of the pass to give out.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"batch_size {batch_size} cannot be shared by {world_size} processes: use a multiple of "
                f"{world_size} (batch_size counts the images of all processes together)"
            )
        if length < batch_size:
            raise ValueError(
                f"the training set has {length} images, fewer than one batch of {batch_size}: "
                f"set batch_size to {length} or less"
            )
        self.length, self.batch_size, self.seed, self.sizes = length, batch_size, seed, sizes
        self.rank, self.share = rank, batch_size // world_size
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        if self.sizes is None:
            cuts = range(0, len(self) * self.batch_size, self.batch_size)
            batches = [order[start : start + self.batch_size] for start in cuts]
        else:
            batches = group_by_aspect(self.sizes, order, self.batch_size)
        start = self.rank * self.share
        for batch in batches[self.first :]:
            yield [(self.epoch, index) for index in batch[start : start + self.share]]


class EvalOrder(Sampler[list[tuple[int, int]]]):
    """This process's share of the images in their own order, each exactly once over all processes.

    Every process gives out the same number of batches (they meet once per batch); where the images run out
    the batch is empty.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(0, index) for index in range(start, min(start + self.batch_size, self.length))]


class _TrainBatches:
    """The training batches from the trainer's own position on, looked up when the first one is asked for.

    Lightning makes iterators before it has restored its counters and never tells them how far the epoch had
    come; its total count of batches is the single thing both sides agree on.
    """

    def __init__(self, loader: DataLoader[Sample], order: TrainOrder, trainer: L.Trainer) -> None:
        self.loader, self.order, self.trainer = loader, order, trainer

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Sample]:
        done = self.trainer.fit_loop.total_batch_idx + 1
        self.order.epoch, self.order.first = divmod(done, int(self.trainer.num_training_batches))
        yield from self.loader

    # Tells Lightning, which would warn otherwise, that this loader can go on in mid-epoch.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore: the trainer knows the position."""


class _EvalBatches:
    """A loader that Lightning takes as it is (it would replace the sampler of a plain one)."""

    def __init__(self, loader: DataLoader[Sample]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.loader)


def default_workers(cores: int) -> int:
    """Loading processes for a run on so many cores: none on up to two, where they would only take turns."""
    return 0 if cores <= 2 else min(8, cores // 2)


def check_classes(dataset: SampleFiles[Any], trained_on: bool) -> None:
    """Say which classes never occur in the truth of a split; pictures are not read.

    Truths are looked at in a random order until each class has occurred, or for half a minute.

    Args:
        dataset: of the split.
        trained_on: whether a network is to be trained on it.

    Raises:
        BadSampleError: for a truth that cannot be read, unless the data set leaves bad ones out.
        ValueError: if there is nothing to be trained on: no class at all, or one class beside 255.
    """
    classes: tuple[str, ...] = dataset.classes  # type: ignore[attr-defined]
    known, occurring = set(range(len(classes))), set[int]()

    def look(index: int) -> set[int]:
        try:
            return set(dataset.labels(dataset.entries[index]))
        except BadSampleError:
            if not dataset.skip_bad:
                raise
            return set()  # it is left out, and that is said, when the sample is read

    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    looked, until = 0, time.monotonic() + _LOOKING_SECONDS
    pool = ThreadPoolExecutor(min(available_cores(), 16))
    try:
        for labels in pool.map(look, order):
            occurring |= labels
            looked += 1
            if known <= occurring or time.monotonic() > until:
                break
    finally:
        pool.shutdown(cancel_futures=True)
    absent = [classes[label] for label in sorted(known - occurring)]
    if not absent:
        return
    split = f"{dataset.root}, split {dataset.split!r}"
    named = ", ".join(repr(readable(name)) for name in absent[:10])
    more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
    among = f"all {looked}" if looked == len(dataset) else f"{looked} of {len(dataset)}"
    text = f"{split}: {len(absent)} of {len(classes)} classes never occur in the truth ({among} samples looked at)"
    text = f"{text}: {named}{more}."
    hides = isinstance(dataset, FileDataset) and dataset.values.get(255) == 255 and 255 in occurring
    if hides:
        text += (
            " The value 255 does occur, which means no truth; if it is an object, as in masks of 0 and "
            "255, store the index of its class instead."
        )
    found = len(known & occurring)
    if trained_on and looked == len(dataset) and (not found or (found == 1 and hides)):
        raise ValueError(f"{text} There is nothing to learn from such truth.")
    _log.warning("%s", text)


class ImageData(L.LightningDataModule):
    """What the data modules have in common; a subclass adds ``dataset`` and says how samples are transformed.

    Args:
        root: The data set's folder.
        dataset_options: Further arguments of `freqfusion.data.create_dataset`.
        train_split: The part to train on.
        val_split: The part to judge on during training.
        test_split: The part that the command ``test`` judges on (most sets keep the truth of ``test`` secret).
        flip: Chance of a mirrored training image.
        batch_size: Images per optimiser step, over all processes together, before accumulation.
        eval_batch_size: Images judged at once per process; for the task semantic of one size.
        workers: Loading processes per training process; chosen by the number of cores if not given.
        cache: In training, decode every image once, before the first step, and keep all in memory: `ram`; or on the
            accelerator, `device`, where augmentation then runs too, without loading processes.
        seed: Decides order and augmentation.
        skip_bad: Leave out unreadable samples with a warning where the default is an error.

    Raises:
        ValueError: for a number out of bounds, or numbers that do not fit together.
    """

    def __init__(
        self,
        root: str | None = None,
        dataset_options: dict[str, Any] | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        flip: float = 0.5,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        workers: int | None = None,
        cache: Literal["ram", "device"] | None = None,
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # with those of the subclass
        self.hparams.update(check_settings("data", self.hparams))
        self.transform("train")  # it knows which options go together
        self._datasets: dict[str, Any] = {}
        self._checked: set[str] = set()
        self._caches: dict[str, SampleCache] = {}

    def open(self, split: str) -> Any:
        """Open the data set of one split.

        Raises:
            ValueError: for a name of no data set, or of one with another kind of truth.
        """
        options = self.hparams
        name, fitting = options["dataset"], list_datasets(self.kind)
        if name not in fitting:
            wrong = next(
                (f"dataset {name!r} has {_TRUTH[kind]}" for kind in _TRUTH if name in list_datasets(kind)),
                None,
            )
            raise ValueError(
                f"{wrong or f'unknown dataset {name!r}'}; for this task use {', '.join(fitting)}"
            )
        given = dict(options["dataset_options"] or {})
        if split == options["train_split"]:
            given |= options.get("train_options") or {}
        return create_dataset(name, options["root"], split, skip_bad=options["skip_bad"], **given)

    def transform(self, stage: str) -> Callable[[Sample], Sample]:
        """What is done to a sample, and drawn at random, for ``"train"`` or ``"eval"``."""
        raise NotImplementedError

    def prepare(self, sample: Sample) -> Sample:
        """What is done to every sample alike, before it is cached; :meth:`transform` does it to others."""
        return sample

    kind: Kind | None
    """The kind of truth that its data sets have; None for any, which is then not used."""
    collate: Callable[[list[Sample]], Sample]
    """Makes a batch of samples. A static method."""

    def sizes(self, split: str) -> Sequence[tuple[int, int]] | None:
        """Height and width of each image by which training batches are grouped; None for no grouping."""
        return None

    def dataset(self, split: str) -> Any:
        """The data set of one split, opened once."""
        if split not in self._datasets:
            self._datasets[split] = self.open(split)
        return self._datasets[split]

    @property
    def normalisation(self) -> Normalisation:
        """That of the network which is trained or judged on the data; ImageNet's where there is none."""
        module = None if self.trainer is None else self.trainer.lightning_module
        network = getattr(module, "network", None)
        return IMAGENET if network is None else normalisation_of(network)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(self.dataset(self.hparams["val_split"]).classes)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour per class."""
        return tuple(self.dataset(self.hparams["val_split"]).palette)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def setup(self, stage: str) -> None:
        """Open the data sets that the stage needs, so that what is missing is said before the work begins."""
        options = self.hparams
        judged = options["test_split" if stage == "test" else "val_split"]
        for split in (options["train_split"], judged) if stage == "fit" else (judged,):
            dataset = self.dataset(split)
            first = self.trainer is None or self.trainer.is_global_zero
            if self.kind and first and split not in self._checked and isinstance(dataset, SampleFiles):
                check_classes(dataset, stage == "fit" and split == options["train_split"])
            self._checked.add(split)

    def train_dataloader(self) -> _TrainBatches:
        split = self.hparams["train_split"]
        trainer = self._require_trainer()
        order = TrainOrder(
            len(self.dataset(split)),
            self.hparams["batch_size"],
            self.hparams["seed"],
            trainer.global_rank,
            trainer.world_size,
            self.sizes(split),
        )
        return _TrainBatches(self._loader(split, "train", order), order, trainer)

    def val_dataloader(self) -> _EvalBatches:
        return self._eval_batches(self.hparams["val_split"])

    def test_dataloader(self) -> _EvalBatches:
        return self._eval_batches(self.hparams["test_split"])

    def _eval_batches(self, split: str) -> _EvalBatches:
        trainer = self._require_trainer()
        length, batch_size = len(self.dataset(split)), self.hparams["eval_batch_size"]
        order = EvalOrder(length, batch_size, trainer.global_rank, trainer.world_size)
        return _EvalBatches(self._loader(split, "eval", order))

    def _loader(self, split: str, stage: str, order: Sampler[list[tuple[int, int]]]) -> DataLoader[Sample]:
        workers, kept = self.hparams["workers"], self.hparams["cache"]
        workers = default_workers(available_cores()) if workers is None else workers
        dataset, on_device = self.dataset(split), False
        trains = self.trainer is not None and self.trainer.state.fn == "fit"
        if kept and trains:  # else each image is read once
            dataset, on_device = self.cached(split), kept == "device"
            if on_device:
                dataset, workers = dataset.to(self._require_trainer().strategy.root_device), 0
        return DataLoader(
            _Samples(dataset, self.transform(stage), self.hparams["seed"]),
            batch_sampler=order,
            collate_fn=self.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available() and not on_device,
            # without its own generator a loader draws from the global one whenever it is iterated
            generator=torch.Generator(),
        )

    def cached(self, split: str) -> SampleCache:
        """The decoded samples of one split, from the file that :meth:`share` wrote if there is one."""
        if split not in self._caches:
            path = Path(os.environ.get(CACHE_VARIABLE, "."), self._cache_name(split))
            if CACHE_VARIABLE in os.environ and path.exists():
                self._caches[split] = SampleCache.load(path)
            else:
                title = f"{self.hparams['dataset']}, split {split!r}"
                self._caches[split] = decode_all(
                    self.dataset(split), self.prepare, title, min(available_cores(), 16)
                )
        return self._caches[split]

    def share(self, folder: Path) -> None:
        """Write what ``fit`` would cache to a folder, which other processes find by :data:`CACHE_VARIABLE`."""
        for split in {self.hparams["train_split"], self.hparams["val_split"]}:
            self.cached(split).save(folder / self._cache_name(split))
            del self._caches[split]

    def _cache_name(self, split: str) -> str:
        """A file's name by all that the decoded samples depend on."""
        names = ("dataset", "root", "dataset_options", "train_options", "resize", "skip_bad")
        key = [split, split == self.hparams["train_split"], *(self.hparams.get(name) for name in names)]
        return hashlib.sha256(json.dumps(key, default=str, sort_keys=True).encode()).hexdigest()[:16]

    def _require_trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError(
                f"{type(self).__name__} makes its loaders for a Trainer: pass it to fit, validate or test"
            )
        return self.trainer


class SegmentationData(ImageData):
    """Images and masks for training, validation and test.

    Args:
        dataset: A name of `freqfusion.data.create_dataset`: ade20k, cityscapes, voc, camvid, folder, synthetic.
        resize: Height and width to which every image and mask is resized when read; as they are if not given.
        crop_size: Height and width of the training crops.
        base_size: Height and width that the random scale refers to; the image's own if not given.
        ratio_range: Smallest and largest random scale.
        cat_max_ratio: The largest share of a crop's labelled pixels that one class may have, where ten tries find
            such a crop; 1 takes any.
        short_sides: Lengths in pixels of a training image's shorter side; one is drawn, in place of
            base_size and ratio_range.
        max_size: Limit of the longer side then.
        photometric: Vary brightness, contrast, saturation and hue of training images.
        **options: Those of :class:`ImageData`.
    """

    def __init__(
        self,
        dataset: str = "synthetic",
        *,
        resize: tuple[int, int] | None = None,
        crop_size: tuple[int, int] = (512, 512),
        base_size: tuple[int, int] | None = None,
        ratio_range: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        short_sides: Sequence[int] | None = None,
        max_size: int = 2560,
        photometric: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)

    kind = "semantic"
    collate = staticmethod(collate)

    def sample(self, split: str, index: int) -> Sample:
        """One image and its mask at the size they are judged at, without augmentation or normalisation."""
        return self.prepare(self.dataset(split)[index])

    def prepare(self, sample: Sample) -> Sample:
        return _resized(sample, self.hparams["resize"])

    def transform(self, stage: str) -> Callable[[Sample], Sample]:
        options = self.hparams
        if stage == "eval":
            then = eval_transform(self.normalisation)
        else:
            then = train_transform(
                crop_size=options["crop_size"],
                ratio_range=options["ratio_range"],
                base_size=options["base_size"],
                flip=options["flip"],
                photometric=options["photometric"],
                cat_max_ratio=options["cat_max_ratio"],
                short_sides=options["short_sides"],
                max_size=options["max_size"],
                normalisation=self.normalisation,
            )
        return v2.Compose([partial(_resized, size=options["resize"]), then])


def _resized(sample: Sample, size: tuple[int, int] | None) -> Sample:
    # tv_tensors: images are interpolated, masks take the nearest label
    if size is None or tuple(sample["image"].shape[-2:]) == tuple(size):
        return sample
    return v2.Resize(size, antialias=True)(sample)
