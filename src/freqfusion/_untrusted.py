"""Files of other people's: bounded before anything is built from them, and kept from reaching out.

What a file says of a model is a constructor's name and plain arguments. Its weights are in the file, so no argument
has a reason to name further weights, an address, a path or a repository: such ones are refused by name, and while a
model is built no connection is opened.
"""

import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

START_WEIGHTS = ("backbone_weights", "encoder_weights", "pretrained", "weights", "weights_backbone")
"""Arguments of networks that say what weights they start from."""
MAX_JSON_BYTES = 2**24
MAX_DEPTH = 32
"""Depth to which lists and dicts may be nested."""
MAX_VALUES = 2**20
MAX_CLASSES = 2**14
"""More than any data set names."""
MAX_NUMBER = 2**21
"""Largest argument, or sum of a list of them: more than any width, depth or size that a network has."""
ROOM = 2**26
"""Parameters that building may make beside those in the file: a classifier that is thrown away, say."""
MODULES = 20_000
"""Parts that a network may have: ten times as many as the largest published ones."""

_PLACES = re.compile(r"(^|_)(weights?|checkpoint|paths?|url|dir|files?|repo|hub|revision)(_|$)")
_ASKS = ("auto_map", "quantization_config", "trust_remote_code")
_ATTENTION = ("attn_implementation", "experts_implementation")
_OWN_ATTENTION = ("eager", "flex_attention", "sdpa")
"""Implementations that need no other package and are fetched from nowhere."""
_LABELS = ("architectures", "classes", "id2label", "label2id", "name_or_path")
"""Keys of text for people, which nothing opens; any value may stand there."""
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def read_json(path: Path) -> Any:
    """The content of a JSON file whose size and depth are bounded.

    Raises:
        ValueError: for a file that is too large, nested too deeply, or no JSON.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, expected at most {MAX_JSON_BYTES:,}: it is another file"
        )
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(
            f"{path} nests lists in lists, expected at most {MAX_DEPTH}: it is damaged"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy it again") from error
    check_plain(content, path)
    return content


def check_plain(content: Any, source: str | Path) -> None:
    """Refuse lists and dicts that are nested too deeply, or in themselves, or hold too many values."""
    level, count = [content], 1
    for _ in range(MAX_DEPTH):
        found: list[Any] = []
        for value in level:
            inner = _inner(value)
            count += len(inner)
            if count > MAX_VALUES:
                raise ValueError(
                    f"{source} holds more than {MAX_VALUES:,} values beside its weights: it is damaged"
                )
            found += inner
        level = found
        if not level:
            return
    raise ValueError(f"{source} nests lists in lists, expected at most {MAX_DEPTH}: it is damaged")


def check_arguments(arguments: Any, source: str | Path, library: str = "") -> None:
    """Refuse arguments that would let a constructor reach out, or that are of absurd size.

    Args:
        arguments: plain values.
        source: where they are from, for messages.
        library: whose constructor gets them.

    Raises:
        ValueError: naming the argument.
    """
    for name, value, siblings in _entries(arguments):
        if _reaches_out(name, value, siblings, library):
            raise ValueError(
                f"{source} sets {name}={_short(value)}, which would fetch or open something outside; its weights are "
                "in the file, so that is not needed, and it was not loaded"
            )
        if name in ("num_classes", "num_labels") and type(value) is int and value > MAX_CLASSES:
            raise ValueError(f"{source} sets {name}={value}, expected at most {MAX_CLASSES:,}")
        numbers = [x for x in (value if isinstance(value, (list, tuple)) else [value]) if type(x) is int]
        if sum(map(abs, numbers)) > MAX_NUMBER:
            raise ValueError(f"{source} sets {name}={_short(value)}, expected at most {MAX_NUMBER:,} in all")


def without_outside(arguments: Any, library: str = "") -> Any:
    """The same arguments without those that :func:`check_arguments` refuses because of their names."""
    if isinstance(arguments, Mapping):
        return {
            key: without_outside(value, library)
            for key, value in arguments.items()
            if not _names_outside(str(key), value, arguments, library)
        }
    if isinstance(arguments, (list, tuple)):
        return [without_outside(value, library) for value in arguments]
    return arguments


def check_name(name: Any, source: str | Path) -> None:
    """Refuse the name of a model that is a path or an address."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise ValueError(f"{source} names the model {_short(name)}, expected the plain name of a constructor")


@contextmanager
def building(size: int, problem: str) -> Iterator[None]:
    """Bound what is built inside, and let nothing inside it open a connection.

    Args:
        size: bytes of the weights that belong to it, as many as their numbers at least.
        problem: how the error begins if that fails; it names the file.

    Raises:
        ImportError: if a library is absent.
        ValueError: for more parameters or modules than the file has weights for, and for whatever goes wrong.
    """
    thread = threading.get_ident()
    left = {"parameters": ROOM + size, "modules": MODULES}

    def spend(kind: str, amount: int) -> None:
        if threading.get_ident() != thread:
            return
        left[kind] -= amount
        if left[kind] < 0:
            raise ValueError(f"it would have more {kind} than there can be for {size:,} bytes of weights")

    def count_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        spend("parameters", 0 if tensor is None else tensor.numel())

    def count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        spend("modules", 1)

    hooks = [
        register_module_parameter_registration_hook(count_tensor),
        register_module_buffer_registration_hook(count_tensor),
        register_module_module_registration_hook(count_module),
    ]
    try:
        with _offline():
            yield
    except ImportError:
        raise
    except Exception as error:  # what somebody else says can go wrong in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ValueError):  # those of constructors can be long
            reason = reason[:300]
        raise ValueError(f"{problem}{reason}") from error
    finally:
        for hook in hooks:
            hook.remove()


class _State(threading.local):
    depth = 0


_state = _State()
_watch: list[bool] = []


@contextmanager
def _offline() -> Iterator[None]:
    """Let this thread open no connection; what tries to gets an error."""
    if not _watch:
        _watch.append(True)
        sys.addaudithook(
            _refuse_network
        )  # stays for good, as Python has it, and looks at nothing outside of this
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    if event in _NETWORK and _state.depth:
        raise RuntimeError("it asks for the network, which a model that is in a file does not need")


def _inner(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple, set)) else []


def _entries(arguments: Any) -> Iterator[tuple[str, Any, Mapping[Any, Any]]]:
    """Every key with its value and the dict that holds it, at any depth; in lists the key has [] after it."""
    left: list[tuple[str, Any, Mapping[Any, Any]]] = [("", arguments, {})]
    while left:
        name, value, siblings = left.pop()
        if name.lstrip("_") in _LABELS:
            continue
        yield name, value, siblings
        if isinstance(value, Mapping):
            left += [(str(key), x, value) for key, x in value.items()]
        elif isinstance(value, (list, tuple, set)):
            left += [(f"{name}[]", x, siblings) for x in value]


def _reaches_out(name: str, value: Any, siblings: Mapping[Any, Any], library: str) -> bool:
    place = isinstance(value, str) and (re.search(r"[/\\:]", value) or value.startswith((".", "~")))
    return bool(place) or _names_outside(name, value, siblings, library)


def _names_outside(name: str, value: Any, siblings: Mapping[Any, Any], library: str) -> bool:
    """Whether an argument of this name and value makes a constructor fetch or open something."""
    alone = not name.endswith("[]")
    bare = name.lower().rstrip("[]").lstrip("_").removesuffix("_internal")
    if bare in _ATTENTION:
        kinds = value.values() if isinstance(value, Mapping) else [value]
        return any(kind is not None and kind not in _OWN_ATTENTION for kind in kinds)
    if not value:
        return False
    if bare in START_WEIGHTS or re.fullmatch(r"(use_)?pretrained(_backbone)?", bare):
        return isinstance(value, (str, Mapping)) or (alone and not isinstance(value, (list, tuple)))
    if bare in _ASKS or "pretrained" in bare:
        return isinstance(value, (str, Mapping)) or value is True
    if library == "transformers" and bare == "backbone" and isinstance(value, str):
        return siblings.get("model_type") != "timm_backbone" and not siblings.get("use_timm_backbone")
    return isinstance(value, str) and _PLACES.search(bare) is not None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
