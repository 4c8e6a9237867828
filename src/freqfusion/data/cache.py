"""Decoded samples of a whole data set in memory, shared by the processes that read them."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from freqfusion._files import write_atomically
from freqfusion.data.base import Sample
from freqfusion.data.images import free_memory

_log = logging.getLogger(__name__)
_PROBES = 16
"""Samples by whose size that of all is estimated."""
_ALIGNMENT = 16
"""Every tensor begins at a multiple of so many bytes, whatever its dtype."""


class SampleCache(Dataset[Sample]):
    """The samples of a data set out of one tensor of bytes; each is a copy, that may be changed.

    One tensor, so that loading processes share it, however they are started: forked ones see the memory of this
    process, others get it by handle, or map the file that it is in.

    Args:
        data: all tensors of all samples, ``(bytes,)`` uint8, on any device; what is read is on the same.
        entries: for each sample its entries by name: a plain value, or where a tensor begins and what it is.
        path: of the file that the tensor is mapped from, if it is.
    """

    def __init__(self, data: Tensor, entries: Sequence[dict[str, Any]], path: Path | None = None) -> None:
        self.data, self.entries, self.path = data, entries, path

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.path is None else (SampleCache.load, (self.path,))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        return {name: self._value(entry) for name, entry in self.entries[index].items()}

    def to(self, device: torch.device) -> "SampleCache":
        """The same samples on a device."""
        return SampleCache(self.data.to(device), self.entries)

    def save(self, path: Path) -> None:
        """Write a file that :meth:`load` maps into memory, and what is in it to ``path`` with ``.json`` behind.

        Raises:
            OSError: if there is not enough room.
        """
        free = shutil.disk_usage(path.parent).free
        if len(self.data) > free:
            raise OSError(
                f"{path.parent} has {free / 2**30:.2f} GiB free, and the decoded data set takes "
                f"{len(self.data) / 2**30:.2f} GiB: make room, or leave out --data.cache"
            )
        self.data.numpy().tofile(path)
        write_atomically(path.with_name(f"{path.name}.json"), json.dumps(self.entries).encode())

    @classmethod
    def load(cls, path: Path) -> "SampleCache":
        """Map what :meth:`save` wrote: processes that do so share its memory."""
        entries = json.loads(path.with_name(f"{path.name}.json").read_bytes())
        size = path.stat().st_size
        return cls(torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8), entries, path)

    def _value(self, entry: dict[str, Any]) -> Any:
        if "kind" not in entry:
            return entry["value"]
        part = self.data[entry["at"] : entry["at"] + entry["bytes"]].clone()
        value = part.view(getattr(torch, entry["dtype"])).reshape(entry["shape"])
        if entry["kind"] == "BoundingBoxes":
            form = tv_tensors.BoundingBoxFormat[entry["format"]]
            return tv_tensors.BoundingBoxes(value, format=form, canvas_size=tuple(entry["canvas"]))
        return _KINDS[entry["kind"]](value)


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Image": tv_tensors.Image,
    "Mask": tv_tensors.Mask,
    "Tensor": lambda value: value,
}


def decode_all(dataset: Any, prepare: Callable[[Sample], Sample], title: str, threads: int) -> SampleCache:
    """Read every sample of a data set into memory.

    Args:
        dataset: with a length, whose samples hold tensors and plain values; reading one draws no random numbers.
        prepare: what is done to each, such as resizing all to one size.
        title: of the data set, for messages.
        threads: that decode.

    Raises:
        BadSampleError: for a sample that cannot be read.
        TypeError: for a sample that holds something else.
        ValueError: if the samples would take more memory than is free.
    """
    count, free = len(dataset), free_memory()

    def read(index: int) -> _Packed:
        return probed.pop(index, None) or list(_packed(prepare(dataset[index])))

    def check(size: float, how: str) -> None:
        if size > free:
            raise ValueError(
                f"{title}: its {count} decoded samples take {how} {size / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB "
                "of memory are free: leave out --data.cache, or make the images smaller with --data.resize"
            )

    probed: dict[int, _Packed] = {}
    for index in sorted({i * count // _PROBES for i in range(min(_PROBES, count))}):
        probed[index] = list(_packed(prepare(dataset[index])))
    size = sum(entry.get("bytes", 0) for packed in probed.values() for _, entry, _ in packed)
    check(size / max(1, len(probed)) * count, "about")
    entries: list[dict[str, Any]] = []
    pieces: list[Tensor] = []
    end = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for packed in pool.map(read, range(count)):
                entries.append({})
                for name, entry, value in packed:
                    if value is not None:
                        entry["at"] = end
                        pieces.append(value)
                        end += -(-entry["bytes"] // _ALIGNMENT) * _ALIGNMENT
                    entries[-1][name] = entry
                check(end, "more than")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    data = torch.empty(end, dtype=torch.uint8)
    at = 0
    pieces.reverse()
    while pieces:  # each is freed when its copy is made, so that memory holds them once
        piece = pieces.pop()
        data[at : at + len(piece)] = piece
        at += -(-len(piece) // _ALIGNMENT) * _ALIGNMENT
    _log.info("%s: %d decoded samples, %.0f MiB, are kept in memory", title, count, end / 2**20)
    return SampleCache(data, entries)


_Packed = list[tuple[str, dict[str, Any], Tensor | None]]
"""The entries of a sample, see :func:`_packed`."""


def _packed(sample: Sample) -> Iterator[tuple[str, dict[str, Any], Tensor | None]]:
    """The entries of a sample: name, what is noted of it, and its bytes."""
    for name, value in sample.items():
        if isinstance(value, Tensor):
            plain = value.as_subclass(Tensor).contiguous()
            entry = {
                "kind": type(value).__name__,
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": list(value.shape),
                "bytes": plain.nbytes,
            }
            if isinstance(value, tv_tensors.BoundingBoxes):
                entry |= {"format": value.format.name, "canvas": list(value.canvas_size)}
            elif entry["kind"] not in _KINDS:
                raise TypeError(f"a sample's {name} is a {type(value).__name__}, which the cache cannot keep")
            yield name, entry, plain.view(-1).view(torch.uint8)
        elif isinstance(value, str | int | float):
            yield name, {"value": value}, None
        else:
            raise TypeError(f"a sample's {name} is a {type(value).__name__}, which the cache cannot keep")
