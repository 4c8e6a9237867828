"""What ``upgrade_`` promises, held on every host that is installed."""

import copy
import functools
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from freqfusion import downgrade_, find_sites, from_pretrained, list_fusions, save_pretrained, upgrade_
from freqfusion.upgrade import FusionSlot, Upgraded
from freqfusion.zoo.spec import ModelSpec
from host_cases import HostCase, installed_cases

CASES = list(installed_cases())
pytestmark = pytest.mark.skipif(not CASES, reason="no host library is installed")


@pytest.fixture(
    params=[pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in CASES]
)
def case(request: pytest.FixtureRequest) -> HostCase:
    return request.param


def shake(model: nn.Module) -> nn.Module:
    """Weights of the fusions and gates as if trained, so that all of them matter."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if hasattr(module, "fusions"):
            for parameter in module.fusions.parameters():
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float = 0.0) -> None:
    assert one
    assert [x.shape for x in one] == [x.shape for x in other]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=False)


@torch.no_grad()
def test_an_upgraded_model_starts_as_the_original_and_can_go_back(case: HostCase) -> None:
    model, image = case.model(), case.image()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    expected = case.run(model, image)
    for method in list_fusions(case.spatial_dims):
        assert upgrade_(model, method) is model
        assert_equal(case.run(model, image), expected, 1e-5)
        assert set(keys) < set(model.state_dict())
        downgrade_(model)
        assert list(model.state_dict()) == keys
        assert [type(module) for module in model.modules()] == classes
        assert_equal(case.run(model, image), expected)


def test_sites(case: HostCase) -> None:
    model = case.model()
    sites = find_sites(model)
    used = [site for site in sites if not site.skipped]
    assert (len(used), len(sites) - len(used)) == (case.sites, case.skipped)
    upgrade_(model)
    assert find_sites(model) == sites
    for site in sites:
        slot = model.get_submodule(site.path)
        assert isinstance(slot, FusionSlot)
        assert (slot.fusion is None) == bool(site.skipped)
        if slot.fusion is not None:
            assert (slot.fusion.hr_channels, slot.fusion.lr_channels) == (
                site.hr_channels,
                site.lr_channels,
            )


@torch.no_grad()
def test_host_weights_load_before_or_after(case: HostCase) -> None:
    weights = {
        name: value + 0.01 for name, value in case.model().state_dict().items() if value.is_floating_point()
    }
    weights = case.model().state_dict() | weights
    plain = case.model()
    plain.load_state_dict(weights)
    upgraded = upgrade_(case.model())
    upgraded.load_state_dict(weights)  # strict
    assert_equal(case.run(upgraded, case.image()), case.run(plain, case.image()), 1e-5)


def test_training_reaches_every_fusion(case: HostCase) -> None:
    model = upgrade_(case.model(), init="paper").train()
    outputs = [x for x in case.run(model, case.image()) if x.requires_grad]
    sum(x.float().square().mean() for x in outputs).backward()
    fusions = {name: p for name, p in model.named_parameters() if ".fusions." in f".{name}"}
    assert fusions
    for name, parameter in fusions.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert any(parameter.grad.abs().max() > 0 for parameter in fusions.values())


def test_training_moves_the_gates_first(case: HostCase) -> None:
    model = upgrade_(case.model(), "bilinear", filter_fn=None).train()
    outputs = [x for x in case.run(model, case.image()) if x.requires_grad]
    sum(x.float().square().mean() for x in outputs).backward()
    gates = {name: p for name, p in model.named_parameters() if "gate" in name and ".fusions." in f".{name}"}
    assert gates
    for name, gate in gates.items():
        assert gate.grad is not None, name


@torch.no_grad()
def test_a_trained_upgrade_changes_the_outputs(case: HostCase) -> None:
    model, image = case.model(), case.image()
    before = case.run(model, image)
    after = case.run(shake(upgrade_(model)), image)
    same_shapes = [x.shape for x in before] == [x.shape for x in after]
    assert not same_shapes or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def test_odd_sizes(case: HostCase) -> None:
    if case.odd_size is None:
        with pytest.raises(Exception, match=case.limit):
            case.run(upgrade_(case.model()), case.image((19, 61, 87)[-case.spatial_dims :]))
        return
    model, image = case.model(), case.image(case.odd_size)
    if case.limit:  # the upgrade lifts it, and going back sets it again
        with pytest.raises(Exception, match=case.limit):
            case.run(downgrade_(upgrade_(model)), image)
        upgrade_(model)
    else:
        expected = case.run(model, image)
        assert_equal(case.run(upgrade_(model), image), expected, 1e-5)
    assert all(torch.isfinite(x).all() for x in case.run(shake(model), image) if x.is_floating_point())


@torch.no_grad()
def test_autocast(case: HostCase) -> None:
    model, image = case.model(), case.image()
    with torch.autocast("cpu", torch.bfloat16):
        expected = case.run(model, image)
        assert_equal(case.run(upgrade_(model), image), expected, 1e-5)
        changed = case.run(shake(model), image)
    assert all(torch.isfinite(x).all() for x in changed if x.is_floating_point())


@torch.no_grad()
def test_compile(case: HostCase) -> None:
    model, image = shake(upgrade_(case.model())), case.image()
    expected = case.run(model, image)
    torch._dynamo.reset()
    try:
        model.get_submodule(case.compiles).compile(backend="eager", fullgraph=True)
        found = case.run(model, image)
    except TorchDynamoException:  # some releases of a host cannot be compiled in one graph
        host = case.model()
        host.get_submodule(case.compiles).compile(backend="eager", fullgraph=True)
        with pytest.raises(TorchDynamoException):
            case.run(host, image)
        torch._dynamo.reset()
        model.get_submodule(case.compiles).compile(backend="eager")
        found = case.run(model, image)
    for a, b in zip(found, expected, strict=True):  # compiled sums round otherwise: 8e-5 of 48 with torch 2.8
        largest = max(1.0, float(b[b.isfinite()].abs().max())) if b.isfinite().any() else 1.0
        assert_equal([a], [b], 1e-5 * largest)


@torch.no_grad()
def test_copies_and_files(case: HostCase) -> None:
    model, image = shake(upgrade_(case.model())), case.image()
    # before it runs: transformers then hangs hooks on its modules that do not pickle
    pickled = pickle.dumps(model) if case.pickles else None
    expected = case.run(model, image)
    assert_equal(case.run(copy.deepcopy(model), image), expected)
    if pickled is not None:
        assert_equal(case.run(pickle.loads(pickled), image), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = upgrade_(case.model())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(case.run(other, image), expected)


@torch.no_grad()
def test_save_and_make_again(case: HostCase, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, image = case.model(), case.image()
    own = type(model).__module__.startswith(("transformers.", "segmentation_models_pytorch."))
    shake(upgrade_(model, "carafe"))
    expected = case.run(model, image)
    host = None if own else str(ModelSpec("host_cases:build", {"name": case.name}))
    save_pretrained(model, tmp_path, host=host)
    assert_equal(case.run(from_pretrained(tmp_path, host=host), image), expected)


def test_an_upgrade_takes_dtype_and_mode_of_its_place(case: HostCase) -> None:
    model = upgrade_(case.model().double(), verify=False)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float64}
    assert not any(module.training for module in model.modules())


def test_upgrading_twice_is_an_error(case: HostCase) -> None:
    model = upgrade_(case.model())
    with pytest.raises(ValueError, match="upgraded already"):
        upgrade_(model)


@torch.no_grad()
def test_a_forward_on_the_instance_is_refused_wherever_it_would_run(case: HostCase) -> None:
    model = upgrade_(case.model())
    changed = [path for path, module in model.named_modules() if isinstance(module, Upgraded)]
    assert changed
    for path in changed:
        model = case.model()
        module = model.get_submodule(path)
        module.forward = functools.partial(module.forward)
        with pytest.raises(ValueError, match="has a forward set on the instance"):
            upgrade_(model)
        assert not any(isinstance(module, Upgraded) for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(case: HostCase) -> None:
    model, image = upgrade_(case.model()).requires_grad_(False), case.image()
    with pytest.raises(RuntimeError, match=r"freqfusion\.export"):
        torch.jit.trace(lambda image: case.run(model, image), image)
    with pytest.raises(RuntimeError, match=r"freqfusion\.export"):
        torch.jit.script(model)
