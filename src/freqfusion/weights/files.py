"""Files of weights, read without running code."""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from freqfusion._optional import require

WRAPPERS = ("state_dict", "model", "jafar")
"""Names under which checkpoints hold the state dict, beside an optimizer's and notes."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU.

    Understood layouts: a plain state dict; one wrapped as ``{"state_dict": ...}`` (mmcv, Lightning),
    ``{"model": ...}`` (detectron2) or ``{"jafar": ...}`` (JAFAR). A prefix ``module.`` of all names, which
    ``DataParallel`` adds, is taken off. Files are read with ``weights_only=True``, or with safetensors where the
    name ends in ``.safetensors``: none can run code.

    Args:
        path: the file, or an ``http(s)://`` address, which is downloaded once into
            ``torch.hub.get_dir()/checkpoints``.

    Raises:
        ImportError: for a safetensors file where that package is absent.
        FileNotFoundError: if there is no such file.
        OSError: if the download fails.
        ValueError: if the file is not a readable set of weights.
    """
    address = str(path)
    path = _download(address) if address.startswith(("http://", "https://")) else Path(path)
    content = _read(path)
    if isinstance(content, Mapping):
        wrapped = (content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping))
        content = next(wrapped, content)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds {type(content).__name__!r}, expected a state dict: names and tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} is not a state dict: entry {key!r} is a {type(value).__name__}, expected a tensor and its "
                "name"
            )
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def _download(url: str) -> Path:
    """The local copy of ``url``; part of the address's hash keeps equal file names of two sites apart."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{digest}-{Path(urlparse(url).path).name}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise OSError(
                f"could not download {url}: {error}; download it by other means and give its path"
            ) from error
    return path


def load_plain(path: Path, mapped: bool = False) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors and plain values. No file can run code.

    Notes of other libraries beside the weights, such as mmengine's history of the training, become empty objects.

    Args:
        path: an existing file.
        mapped: leave tensors in the file until they are used.

    Raises:
        ValueError: for a file that is damaged, or holds anything else.
    """
    try:
        return _load_pickle(path, mapped)
    except pickle.UnpicklingError as error:  # torch's own words advise to run what is in it
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise ValueError("its pickle is damaged or of another kind") from error
        raise ValueError(
            f"it holds {found[1]}, which could run code, so it was not loaded. If you trust whoever made it, keep "
            "its weights alone, once, where the library that wrote it is installed, and take the file it writes:"
            f"\n{_rewrite_command(path)}\n"
        ) from error
    except Exception as error:  # a foreign file makes the unpickler fail in almost any way
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} cannot be read as weights: a .pkl of detectron2 is a plain pickle of NumPy arrays, which can "
            "run code when it is opened. If you trust whoever made it, turn it into tensors once, and take the "
            f"file that this writes:\n{_rewrite_command(path)}"
        )
    try:
        if path.suffix == ".safetensors":
            return require("safetensors.torch", "hub").load_file(path)
        return load_plain(path, mapped=zipfile.is_zipfile(path))  # so that an optimizer's state is not read
    except ImportError:
        raise
    except Exception as error:  # of safetensors too
        raise ValueError(
            f"{path} cannot be read as weights ({error}). Expected a state dict saved with torch.save or "
            "safetensors; was the file downloaded completely?"
        ) from error


class _Note:
    """Stands for an object that a library notes beside the weights; it keeps nothing of what it is made of."""

    def __new__(cls, *args: Any) -> "_Note":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_NOTED = ("argparse.Namespace", "mmcv.", "mmengine.", "numpy.")
"""Beginnings of the names of such objects."""
_NUMPY_NUMBER = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
"""What a NumPy number is made of, in NumPy 1 and 2; mmcv notes the best score as one."""


def _load_pickle(path: Path, mapped: bool) -> Any:
    noted: Sequence[str] = _NUMPY_NUMBER
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise ValueError("it is compressed, which torch.save does not do")
            damaged = parts.testzip()
            if damaged is not None:
                part = damaged.partition("/")[2]
                raise ValueError(f"it is damaged: {part} in it does not fit its checksum; copy it again")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        noted = [name for name in names if name.startswith(_NOTED)]
    with torch.serialization.safe_globals([(_Note, name) for name in noted]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _rewrite_command(path: Path) -> str:
    code = (
        "import pickle, torch; "
        f"arrays = pickle.load(open({str(path)!r}, 'rb'), encoding='latin1')['model']; "
        "tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}; "
        f"torch.save(tensors, {str(path.with_suffix('.pth'))!r})"
    )
    if path.suffix != ".pkl":
        code = (
            f"import torch; content = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
            f"torch.save(content.get('state_dict', content), {str(path.with_suffix('.state_dict.pth'))!r})"
        )
    return f'python -c "{code}"'
