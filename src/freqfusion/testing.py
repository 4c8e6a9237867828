"""The contract of a fusion method as checks that any method can be put through."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from freqfusion.fusion import FusedFeatures, Fusion

SIZES = (
    ((8, 10), (4, 5)),
    ((27, 33), (14, 17)),
    ((27, 33), (13, 16)),
    ((12, 8), (3, 2)),
    ((4, 5), (4, 5)),
    ((2, 3), (1, 1)),
)
"""Sizes of fine and coarse map: x2, odd sides of either parity, x4, x1, a single pixel."""
VOLUMES = (
    ((4, 6, 8), (2, 3, 4)),
    ((3, 7, 9), (3, 4, 5)),
    ((5, 7, 6), (2, 3, 3)),
    ((1, 8, 4), (1, 2, 1)),
    ((2, 3, 4), (2, 3, 4)),
    ((2, 1, 3), (1, 1, 1)),
)
"""The same of volumes: x2, no stride in depth, odd sides, one voxel thick and x4, x1, a single voxel."""


def check_fusion(build: Callable[[int, int], Fusion], hr_channels: int = 32, lr_channels: int = 32) -> None:
    """Put a fusion method through the contract that every method of this package keeps.

    Shapes, finite values and gradients at awkward sizes; channels_last; an empty batch; bfloat16 autocast;
    ``torch.compile(fullgraph=True)``; ``torch.export`` to torch's own operators; state dicts.

    Args:
        build: called as ``build(hr_channels, lr_channels)``; a :class:`~freqfusion.fusion.base.Fusion` subclass.
        hr_channels: channels of the fine map.
        lr_channels: channels of the coarse map.

    Raises:
        AssertionError: for the first promise that does not hold; the message names it.
    """
    fusion = _shaken(build(hr_channels, lr_channels))
    volumes = fusion.spatial_dims == 3
    for hr_size, lr_size in VOLUMES if volumes else SIZES:
        _check_size(fusion, hr_size, lr_size)
    fusion.eval()
    hr, lr = _maps(fusion, (3, 9, 11), (3, 5, 6)) if volumes else _maps(fusion, (9, 11), (5, 6))
    expected = fusion(hr_feat=hr, lr_feat=lr)
    if not fusion.refines_hr:
        _expect(
            torch.equal(expected.hr_feat, hr),
            "hr_feat is changed, which the class must say: refines_hr = True",
        )

    innermost = torch.channels_last_3d if volumes else torch.channels_last
    last = fusion(*(x.contiguous(memory_format=innermost) for x in (hr, lr)))
    _expect_close("channels_last", last, expected, 1e-4)
    empty = fusion(hr[:0], lr[:0])
    _expect(empty.lr_feat.shape[0] == 0, f"an empty batch gave shape {tuple(empty.lr_feat.shape)}")

    torch._dynamo.reset()
    compiled = torch.compile(fusion, fullgraph=True, backend="eager")(hr, lr)
    _expect_close("torch.compile(fullgraph=True)", compiled, expected, 1e-5)
    exported = torch.export.export(fusion, (hr, lr))
    foreign = [str(node.target) for node in exported.graph.nodes if str(node.target).startswith("freqfusion")]
    _expect(not foreign, f"torch.export kept operators that exporters do not know: {foreign}")
    _expect_close("torch.export", FusedFeatures(*exported.module()(hr, lr)), expected, 1e-5)

    other = build(hr_channels, lr_channels).eval()
    other.load_state_dict(fusion.state_dict())
    _expect_close("load_state_dict", other(hr, lr), expected, 0)

    fresh = build(hr_channels, lr_channels).eval()  # half precision is judged at the weights of a start
    with torch.autocast("cpu", torch.bfloat16):
        half = fresh(hr, lr)
    _expect_close("bfloat16 autocast", half, fresh(hr, lr), 2e-2)


def _check_size(fusion: Fusion, hr_size: Sequence[int], lr_size: Sequence[int]) -> None:
    hr, lr = (x.requires_grad_() for x in _maps(fusion, hr_size, lr_size))
    fused = fusion(hr_feat=hr, lr_feat=lr)
    case = f"{hr_size} from {lr_size}"
    _expect(isinstance(fused, FusedFeatures), f"{case}: returned {type(fused).__name__}, not FusedFeatures")
    for name, x, channels in (
        ("hr_feat", fused.hr_feat, fusion.hr_channels),
        ("lr_feat", fused.lr_feat, fusion.lr_channels),
    ):
        shape = (2, channels, *hr_size)
        _expect(x.shape == shape, f"{case}: {name} has shape {tuple(x.shape)}, expected {shape}")
    fusion.zero_grad()
    (fused.hr_feat.square().sum() + fused.lr_feat.square().sum()).backward()
    named = {"lr_feat": fused.lr_feat, "hr_feat": fused.hr_feat, "the gradient of lr_feat": lr.grad}
    named |= {f"the gradient of {name}": parameter.grad for name, parameter in fusion.named_parameters()}
    for name, value in named.items():
        _expect(value is not None, f"{case}: {name} is missing")
        if value is not None:
            _expect(bool(torch.isfinite(value).all()), f"{case}: {name} is not finite")


def _shaken(fusion: Fusion) -> Fusion:
    """The module with weights large enough that every branch matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return fusion


def _maps(fusion: Fusion, hr_size: Sequence[int], lr_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hr = torch.randn(2, fusion.hr_channels, *hr_size, generator=generator)
    return hr, torch.randn(2, fusion.lr_channels, *lr_size, generator=generator)


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _expect_close(name: str, actual: FusedFeatures, expected: FusedFeatures, tolerance: float) -> None:
    for field in ("hr_feat", "lr_feat"):
        value, reference = (getattr(fused, field).detach().float() for fused in (actual, expected))
        error = float((value - reference).abs().max() / reference.abs().max().clamp_min(1e-30))
        _expect(
            error <= tolerance, f"{name}: {field} differs by {error:.1e} (relative), allowed {tolerance:.0e}"
        )
