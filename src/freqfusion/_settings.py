"""The bounds of every numeric setting, in one table, for the command line and for Python alike."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """The numbers that a setting may be. Infinity and NaN are never among them."""

    least: float
    most: float = math.inf
    whole: bool = False
    above: bool = False
    """Leave ``least`` itself out."""
    below: bool = False
    """Leave ``most`` itself out."""
    share: bool = False
    """Whole numbers count something; others are shares of at most 1."""
    also: float | None = None
    """A further number that is allowed."""
    counts: range | None = None
    """How many numbers a list may have; None where there is one number, and no list."""
    alone: bool = False
    """Besides a list there may be one number."""
    items: "Bound | None" = None
    """What the numbers of a list may be, where that differs."""
    other: bool = False
    """Text and truth values are allowed too, and checked where they are used."""
    unit: str = ""

    def checked(self, value: Any) -> Any:
        """``value`` with whole floats (48.0) as whole numbers where whole ones are expected.

        Raises:
            ValueError: if it is not within the bound.
        """
        if isinstance(value, list | tuple):
            if self.counts is None or len(value) not in self.counts:
                raise ValueError
            return type(value)((self.items or self)._number(entry) for entry in value)
        if self.counts is not None and not self.alone:
            raise ValueError
        return self._number(value)

    def _number(self, value: Any) -> Any:
        if self.other and isinstance(value, bool | str):
            if not isinstance(value, str) or not value.lstrip("-").isdecimal():
                return value
            self._number(int(value))
            return value
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            raise ValueError from None
        if number == self.also:
            return value
        fits = self.least <= number <= self.most and math.isfinite(number)
        if not fits or (self.above and number == self.least) or (self.below and number == self.most):
            raise ValueError
        if self.share and isinstance(value, float) and number > 1:
            raise ValueError
        if self.whole:
            if not number.is_integer():
                raise ValueError
            return value if isinstance(value, int) else int(number)
        return value

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        if self.counts is None:
            what = f"a {kind}"
        elif self.alone:
            what = f"a {kind}, or a list,"
        elif self.counts == PAIR:
            what = f"two {kind}s"
        else:
            what = f"{'any' if 0 in self.counts else 'one or more'} {kind}s"
        limits = f"{'above' if self.above else 'of at least'} {self.least:.10g}"
        if math.isfinite(self.most):
            limits += f" and {'below' if self.below else 'at most'} {self.most:.10g}"
        also = "" if self.also is None else f", or {self.also:g}"
        share = ", or a share of at most 1.0" if self.share else ""
        return f"{what} {limits}{f' ({self.unit})' if self.unit else ''}{also}{share}"


def _whole(least: int, most: float = math.inf, **options: Any) -> Bound:
    return Bound(least, most, whole=True, **options)


PAIR = range(2, 3)
SIDE = 16384
"""The longest side in pixels that a setting may ask for: a picture of that size takes 3 GiB as float32."""
_SEED = _whole(0, 2**32 - 1)
_SIDE = _whole(1, SIDE, unit="pixels")
_SIDES = _SIDE._replace(counts=range(1, 101))
_SIZE = _SIDE._replace(counts=PAIR)
_WINDOW = _SIZE._replace(alone=True)
_SCALES = Bound(0.01, 16, counts=range(1, 101))
_FACTORS = Bound(0, 100, above=True, counts=PAIR)
_MANY = range(101)
_LAYERS = _whole(-1000, 1000, counts=range(1, 101))

_MODEL = {
    "backbone_lr_factor": Bound(0, 1e6, above=True),
    "betas": Bound(0, 1, below=True, counts=PAIR),
    "boundary_width": Bound(0, SIDE, above=True, share=True),
    "class_weights": Bound(0, counts=range(1, 65537)),
    "encoder_layers": _LAYERS,
    "factors": Bound(1, 64, above=True, counts=range(1, 101)),
    "fusion_lr_factor": Bound(0, 1e6, above=True),
    "gamma": Bound(0, 1, above=True),
    "guide_size": _SIDE,
    "lr": Bound(0, 1e30, above=True),
    "lr_batch_size": _whole(1),
    "max_detections": _whole(1, 100_000),
    "milestones": Bound(0, 1, counts=_MANY, unit="shares of the run"),
    "momentum": Bound(0, 1, below=True),
    "poly_power": Bound(0, 100),
    "scales": _SCALES,
    "stride": _WINDOW,
    "test_max_size": _SIDE,
    "test_size": _SIDE,
    "warmup_ratio": Bound(0, 1),
    "warmup_steps": _whole(0),
    "weight_decay": Bound(0),
    "window": _WINDOW,
}
BOUNDS: dict[str, dict[str, Bound]] = {
    "fit": {
        "seed_everything": _SEED,
        "checkpoint_steps": _whole(1),
        "log_steps": _whole(1),
    },
    "trainer": {
        "accumulate_grad_batches": _whole(1),
        "check_val_every_n_epoch": _whole(1),
        "devices": _whole(1, 1024, also=-1, counts=range(1, 1025), alone=True, items=_whole(0), other=True),
        "fast_dev_run": _whole(0, other=True),
        "gradient_clip_val": Bound(0),
        "limit_predict_batches": Bound(0, share=True),
        "limit_test_batches": Bound(0, share=True),
        "limit_train_batches": Bound(0, above=True, share=True),
        "limit_val_batches": Bound(0, share=True),
        "log_every_n_steps": _whole(0),
        "max_epochs": _whole(1, also=-1),
        "max_steps": _whole(1, also=-1),
        "min_epochs": _whole(0),
        "min_steps": _whole(0),
        "num_nodes": _whole(1),
        "num_sanity_val_steps": _whole(0, also=-1),
        "overfit_batches": Bound(0, share=True),
        "reload_dataloaders_every_n_epochs": _whole(0),
        "val_check_interval": Bound(0, above=True, share=True, other=True),
    },
    "semantic": _MODEL,
    "detection": {**_MODEL, "test_size": _SIDES._replace(alone=True)},
    "masks": _MODEL,
    "features": _MODEL,
    "data": {
        "base_size": _SIZE,
        "batch_size": _whole(1),
        "cat_max_ratio": Bound(0, 1, above=True),
        "crop_size": _SIZE,
        "eval_batch_size": _whole(1),
        "flip": Bound(0, 1),
        "jitter": _FACTORS,
        "max_size": _SIDE,
        "ratio_range": _FACTORS,
        "resize": _SIZE,
        "seed": _SEED,
        "short_sides": _SIDES,
        "workers": _whole(0, 256),
    },
    "scenes": {
        "length": _whole(0, 10_000_000),
        "size": _SIZE,
        "seed": _SEED,
    },
    "analyze": {"limit": _whole(1), "pictures": _whole(1), "resize": _SIZE},
    "benchmark": {
        "chunk": _whole(1),
        "minutes": Bound(0, above=True),
        "rounds": _whole(1, 1_000_000),
        "shrink": _whole(1, 64),
        "sides": _SIDES,
        "threads": _whole(1, 1024),
    },
    "compare": {
        "jobs": _whole(1, 1024),
        "leaders": _whole(1),
        "minutes": Bound(0, above=True),
        "seeds": _whole(1, 1000),
    },
    "export": {"channels": _whole(1, 65536), "dynamic": _whole(0, SIDE), "size": _SIZE},
    "feature pictures": {
        "chunk": _whole(1),
        "layers": _LAYERS,
        "pictures": _whole(1),
        "resize": _SIZE,
        "size": _SIZE,
    },
    "predict": {
        "scales": _SCALES,
        "score": Bound(0, 1),
        "sizes": _SIDES,
        "stride": _SIDE,
        "window": _SIDE,
    },
    "quickstart": {"minutes": Bound(0, 1440, above=True), "seed": _SEED},
}
"""By command, or by part of a recipe (a model's by its task), then by name. What may be None may be left out."""


def _reaches(window: Any, stride: Any) -> bool:
    windows, strides = ((side, side) if isinstance(side, int) else side for side in (window, stride))
    return all(step <= side for step, side in zip(strides, windows, strict=True))


def _rising(name: str) -> tuple[tuple[str, ...], Callable[..., bool], str]:
    return (
        (name,),
        lambda factors: factors is None or factors[0] <= factors[1],
        f"{name} is {{0}}, expected the smaller factor first",
    )


_RELATIONS: dict[str, tuple[tuple[tuple[str, ...], Callable[..., bool], str], ...]] = {
    "semantic": (
        (
            ("stride", "window"),
            lambda stride, window: stride is None or window is not None,
            "stride is {0}, without a window: give both or neither",
        ),
        (
            ("stride", "window"),
            lambda stride, window: stride is None or window is None or _reaches(window, stride),
            "stride {0} is larger than the window {1}, which would leave gaps: lower it",
        ),
        (
            ("class_weights",),
            lambda weights: weights is None or any(weights),
            "class_weights is {0}, so nothing would be learnt: give at least one class a weight above 0",
        ),
    ),
    "data": (_rising("ratio_range"), _rising("jitter")),
}
"""By group: names, whether their values fit together, and what to say where they do not."""


def check_settings(
    group: str, values: Mapping[str, Any], shown: str = "{}", *, optional: bool = True
) -> dict[str, Any]:
    """Refuse what is out of bounds, before anything is built or written.

    Args:
        group: a key of :data:`BOUNDS`.
        values: settings by name; names that are not in the table are left alone.
        shown: how a name looks to the user, e.g. ``"--data.{}"``.
        optional: whether a setting may be None.

    Returns:
        The settings that the table has, with whole floats (48.0) as whole numbers.

    Raises:
        ValueError: says what came and what was expected.
    """
    checked: dict[str, Any] = {}
    for name, bound in BOUNDS[group].items():
        if name not in values:
            continue
        value = values[name]
        try:
            checked[name] = None if value is None and optional else bound.checked(value)
        except ValueError:
            raise ValueError(f"{shown.format(name)} is {value!r}, expected {bound}") from None
    for names, fits, message in _RELATIONS.get(group, ()):
        given = [checked.get(name) for name in names]
        if not fits(*given):
            raise ValueError(shown.format(message.format(*given)))
    return checked
