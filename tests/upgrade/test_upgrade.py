"""``upgrade_`` on a host of the user's own, which needs no library: choices, errors, and what a handler may do."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freqfusion import downgrade_, find_sites, register_host, upgrade_
from freqfusion.upgrade import FusionPoint, FusionSlot, Gate, Site, Upgraded


class Neck(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.channels = channels
        self.mix = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = nn.functional.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=True)
        return self.mix(torch.cat((fine, coarse), 1))


@register_host
class UpgradedNeck(Upgraded, Neck):
    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        skipped = "too few channels" if module.channels < 8 else ""
        return [FusionPoint("top", module.channels, module.channels, "bilinear", True, skipped)]

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        return torch.randn(1, module.channels, 9, 12), torch.randn(1, module.channels, 5, 6)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        fine, coarse = self.fusions["top"](fine, coarse)
        return self.mix(torch.cat((fine, coarse), 1))


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return self.scale * fine + nn.functional.interpolate(coarse, fine.shape[-2:], mode="nearest")


@register_host
class UpgradedWrong(Upgraded, Wrong):
    """Enlarges otherwise than its host, as after a change of the host's code."""

    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        return [FusionPoint("0", 8, 8, "bilinear")]

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        return torch.randn(1, 8, 8, 8), torch.randn(1, 8, 4, 4)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        fine, coarse = self.fusions["0"](fine, coarse)
        return self.scale * fine + coarse


LIBRARY = __name__.partition(".")[0]


class Net(nn.Module):
    def __init__(self, *necks: nn.Module) -> None:
        super().__init__()
        self.necks = nn.ModuleList(necks)

    def forward(self, fine: Tensor, coarse: Tensor) -> list[Tensor]:
        return [neck(fine, coarse) for neck in self.necks]


@pytest.fixture
def maps() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, 11, 14), torch.randn(2, 8, 6, 7)


def test_find_sites_tells_where_and_why_not() -> None:
    sites = find_sites(Net(Neck(), Neck(4), nn.Conv2d(1, 1, 1)))
    assert sites == [
        Site("necks.0.fusions.top", LIBRARY + " Neck", 8, 8, "bilinear", ""),
        Site("necks.1.fusions.top", LIBRARY + " Neck", 4, 4, "bilinear", "too few channels"),
    ]
    assert find_sites(nn.Conv2d(1, 1, 1)) == []


def test_filter_fn_chooses(maps: tuple[Tensor, Tensor]) -> None:
    model = Net(Neck(), Neck())
    before = model(*maps)
    upgrade_(model, "carafe", filter_fn=lambda site: site.path.startswith("necks.1"), init="paper")
    assert type(model.necks[0]) is Neck
    assert type(model.necks[1]) is UpgradedNeck
    assert model.freqfusion_upgrade.sites == ("necks.1.fusions.top",)
    after = model(*maps)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_options_reach_the_method() -> None:
    model = upgrade_(Net(Neck()), lowpass_kernel=7)
    assert model.get_submodule("necks.0.fusions.top").fusion.lowpass_kernel == 7
    assert model.freqfusion_upgrade.options == {"lowpass_kernel": 7}


def test_paper_has_no_gates() -> None:
    gated, published = upgrade_(Net(Neck())), upgrade_(Net(Neck()), init="paper")
    count = [sum(isinstance(module, Gate) for module in model.modules()) for model in (gated, published)]
    assert count == [2, 0]


def test_a_joint_that_was_not_chosen_works_as_before(maps: tuple[Tensor, Tensor]) -> None:
    neck = Neck()
    expected = neck(*maps)
    neck.__class__ = UpgradedNeck
    neck.fusions = nn.ModuleDict({"top": FusionSlot(UpgradedNeck.points(neck)[0], None, "identity")})
    assert torch.equal(neck(*maps), expected)


def test_a_training_step_changes_the_outputs(maps: tuple[Tensor, Tensor]) -> None:
    model = upgrade_(Net(Neck()))
    before = model(*maps)[0].detach()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "fusions" in name], lr=1.0)
    for _ in range(2):  # the first step moves the gates, the second what is behind them
        weights = {name: p.clone() for name, p in model.named_parameters() if ".fusion." in name}
        optimizer.zero_grad()
        model(*maps)[0].square().mean().backward()
        optimizer.step()
    assert not torch.equal(model(*maps)[0], before)
    assert any(not torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": "zero"}, 'init must be "identity" or "paper", got \'zero\''),
        ({"fusion": "nearset"}, "unknown fusion 'nearset'; choose one of"),
        ({"filter_fn": lambda site: False}, "filter_fn refused all 1 sites: necks.0.fusions.top"),
    ],
)
def test_wrong_arguments_change_nothing(change: dict[str, Any], message: str) -> None:
    model = Net(Neck())
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        upgrade_(model, **change)
    with pytest.raises(TypeError, match="unexpected keyword argument 'taps'"):
        upgrade_(model, taps=3)
    assert type(model.necks[0]) is Neck
    assert list(model.state_dict()) == keys


def test_a_failed_verification_names_the_place_and_restores_all(maps: tuple[Tensor, Tensor]) -> None:
    model = Net(Neck(), Wrong())
    expected = model(*maps)
    with pytest.raises(RuntimeError, match=r"necks\.1: with init='identity' .* results differ by"):
        upgrade_(model)
    assert [type(neck) for neck in model.necks] == [Neck, Wrong]
    assert not hasattr(model, "freqfusion_upgrade")
    assert all(torch.equal(a, b) for a, b in zip(model(*maps), expected, strict=True))
    upgrade_(model, verify=False)
    assert isinstance(model.necks[1], UpgradedWrong)


def test_verification_leaves_modes_and_randomness_alone() -> None:
    model = Net(Neck(), Neck()).train()
    model.necks[1].mix.eval()
    torch.manual_seed(3)
    upgrade_(model, "nearest", verify=False)
    expected = torch.rand(3)
    downgrade_(model)
    torch.manual_seed(3)
    upgrade_(model, "nearest", verify=True)
    assert torch.equal(torch.rand(3), expected)
    modes = [model.necks[0].training, model.necks[1].training, model.necks[1].mix.training]
    assert modes == [True, True, False]


def test_models_without_a_site_say_what_is_supported() -> None:
    with pytest.raises(
        ValueError, match=r"found no place in this Conv2d(.|\n)*torchvision: Feature(.|\n)*register_host"
    ):
        upgrade_(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"no site of this Neck can be used: fusions\.top: too few channels"):
        upgrade_(Neck(4))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        upgrade_("resnet18")


def test_wrapped_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inside a DataParallel, .* upgrade first"):
        upgrade_(nn.DataParallel(Neck()))
    with pytest.raises(ValueError, match="inside a OptimizedModule"):
        upgrade_(torch.compile(Neck()))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda net: torch.jit.trace(net, (torch.rand(1, 8, 4, 4), torch.rand(1, 8, 2, 2))),
            "inside a TopLevelTraced",
        ),
        (lambda net: Net(nn.DataParallel(net)), r"necks\.0 is a DataParallel"),
        (lambda net: torch.optim.swa_utils.AveragedModel(net), "inside a AveragedModel"),
        (lambda net: net.compile() or net, "inside a Net that is compiled; upgrade first"),
        (
            lambda net: vars(net).update(_is_accelerate_prepared=True) or net,
            "accelerate or Fabric .* upgrade first",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning", "ignore:.*jit:FutureWarning")
def test_what_would_not_follow_is_refused(wrap: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upgrade_(wrap(Net(Neck())))


def test_fabric_comes_after_the_upgrade() -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    with pytest.raises(ValueError, match=r"inside a _FabricModule, .* upgrade first"):
        upgrade_(fabric.setup(Net(Neck())))


def test_peft_comes_after_the_upgrade() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["mix"])
    with pytest.raises(ValueError, match=r"inside a PeftModel of peft, .* modules_to_save"):
        upgrade_(peft.get_peft_model(Net(Neck()), config))
    with pytest.raises(ValueError, match=r"necks\.0\.mix is a Conv2d of peft"):  # without its wrapper
        upgrade_(peft.inject_adapter_in_model(config, Net(Neck())))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_parts_are_refused() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck = Neck()
            self.neck.extra = nn.Linear(3, 3)

    quantised = torch.ao.quantization.quantize_dynamic(Deep(), {nn.Linear})
    with pytest.raises(ValueError, match="neck holds a quantised Linear; upgrade first"):
        upgrade_(quantised)

    class Packed(Tensor):
        pass

    model = Net(Neck())
    model.necks[0].mix.register_buffer("packed", torch.zeros(2).as_subclass(Packed))
    with pytest.raises(ValueError, match=r"mix\.packed of necks\.0 is a Packed, quantised or"):
        upgrade_(model)


def hook(module: nn.Module) -> None:
    """Put a ``forward`` on the instance, as accelerate does."""
    module._old_forward = module.forward
    module.forward = functools.partial(lambda module, *args: module._old_forward(*args), module)


def unhook(module: nn.Module) -> None:
    module.forward = module._old_forward
    del module._old_forward


def test_a_forward_on_the_instance_is_refused() -> None:
    model = Net(Neck(), Neck())
    hook(model.necks[1])
    with pytest.raises(ValueError, match=r"necks\.1 has a forward set on the instance"):
        upgrade_(model)
    assert not any("fusions" in name for name in model.state_dict())
    model = upgrade_(model, filter_fn=lambda site: "necks.0" in site.path)  # the other one does not matter
    assert isinstance(model.necks[0], UpgradedNeck)


def test_a_forward_around_the_sites_stays_in_effect(maps: tuple[Tensor, Tensor]) -> None:
    model = Net(Neck())
    hook(model)
    before = model(*maps)[0]
    assert not torch.equal(upgrade_(model, "carafe", init="paper")(*maps)[0], before)


def test_hooks_that_were_taken_off_leave_nothing(maps: tuple[Tensor, Tensor]) -> None:
    model = Net(Neck())
    expected = model(*maps)[0]
    hook(model.necks[0])
    unhook(model.necks[0])
    assert not torch.equal(upgrade_(model, "carafe", init="paper")(*maps)[0], expected)
    hook(model.necks[0])
    with pytest.raises(ValueError, match=r"necks\.0 has a forward set on the instance"):
        downgrade_(model)
    assert isinstance(model.necks[0], UpgradedNeck)
    unhook(model.necks[0])
    assert torch.equal(downgrade_(model)(*maps)[0], expected)


class Pair(nn.Module):
    """A host whose upgraded form calls the parts of ``block`` instead of ``block``."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return fine + nn.functional.interpolate(self.block(coarse), fine.shape[-2:])


@register_host
class UpgradedPair(Upgraded, Pair):
    @staticmethod
    def points(module: Any) -> list[FusionPoint]:
        return [FusionPoint("top", 8, module.block[0].out_channels)]

    @staticmethod
    def example(module: Any) -> tuple[Any, ...]:
        return torch.randn(1, 8, 8, 8), torch.randn(1, 8, 4, 4)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        convolution, activation = self.block
        fine, coarse = self.fusions["top"](fine, activation(convolution(coarse)))
        return fine + coarse


def test_hooks_that_would_not_run_any_more_are_refused() -> None:
    pair = Pair()
    hook(pair.block)
    with pytest.raises(ValueError, match=r"Pair\.block has a hook or a forward set on the instance"):
        upgrade_(pair)
    assert type(pair) is Pair
    pair = Pair()
    watch = pair.block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"Pair\.block has a hook"):
        upgrade_(pair)
    watch.remove()
    hook(pair.block)
    unhook(pair.block)
    hook(pair.block[0])  # is called as before
    assert isinstance(upgrade_(pair), UpgradedPair)


def test_parts_that_are_not_the_hosts_get_one_line() -> None:
    pair = Pair()
    pair.block = nn.Identity()
    with pytest.raises(
        ValueError, match=r"cannot tell where fusions fit in this Pair \(.*subscriptable\).*upgrade first"
    ):
        upgrade_(pair)
    pair.block = nn.Sequential(nn.Conv2d(8, 8, 1))
    with pytest.raises(
        RuntimeError, match=r"this UpgradedPair does not run on small random maps .*upgrade first"
    ):
        upgrade_(pair)
    assert type(pair) is Pair


def test_a_class_that_changed_after_the_upgrade_is_not_taken_back() -> None:
    model = upgrade_(Net(Neck()))
    model.necks[0].__class__ = type("Sharded", (UpgradedNeck,), {})
    assert find_sites(model)[0].host == LIBRARY + " Neck"
    with pytest.raises(ValueError, match=r"necks\.0 was made a Sharded after the upgrade"):
        downgrade_(model)


def test_traced_graphs_have_no_sites() -> None:
    with pytest.raises(ValueError, match=r"torch\.fx has taken it apart: upgrade first"):
        upgrade_(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())))


def test_downgrade_needs_an_upgrade() -> None:
    with pytest.raises(ValueError, match="not upgraded"):
        downgrade_(Neck())


def test_subclasses_of_a_host_are_left_alone() -> None:
    class Special(Neck):
        pass

    assert find_sites(Special()) == []


def test_register_host_checks_its_class() -> None:
    with pytest.raises(TypeError, match=r"must have the bases \(Upgraded, <class"):
        register_host(type("Alone", (Upgraded,), {}))
    with pytest.raises(TypeError, match="Half has points but no example"):
        register_host(type("Half", (Upgraded, nn.Bilinear), {"points": staticmethod(lambda module: [])}))
    with pytest.raises(ValueError, match="Neck is registered already, as UpgradedNeck"):
        register_host(type("Again", (Upgraded, Neck), {}))


def test_values_on_the_meta_device_are_missed() -> None:
    with torch.device("meta"):
        model = Net(Neck())
    assert len(find_sites(model)) == 1
    with pytest.raises(ValueError, match=r"necks\.0\.mix\.weight is on the meta device, .* fusions"):
        upgrade_(model)
    part = Net(Neck())
    part.add_module("head", nn.Conv2d(1, 1, 1, device="meta"))
    with pytest.raises(ValueError, match=r"head\.weight is on the meta device"):
        upgrade_(part)
    assert type(part.necks[0]) is Neck


@pytest.mark.parametrize("of_meta, assign", [(True, False), (True, True), (False, False)])
def test_fusions_that_lost_their_values_are_missing_from_the_hosts_checkpoint(
    of_meta: bool, assign: bool
) -> None:
    plain, model = Net(Neck()).state_dict(), upgrade_(Net(Neck()))
    trained = {name: x.clone() for name, x in model.state_dict().items()}
    assert not model.load_state_dict(plain, strict=False).missing_keys
    if of_meta:
        model.to("meta")
    if not assign:
        model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"Missing key.*necks\.0\.fusions\.top\.fusion"):
        model.load_state_dict(plain, assign=assign)
    model.load_state_dict(trained, assign=assign)
    assert torch.equal(
        model.get_parameter("necks.0.fusions.top.fusion.content_encoder.weight"),
        trained["necks.0.fusions.top.fusion.content_encoder.weight"],
    )
    model.load_state_dict(plain)  # they have values again


def test_half_precision_keeps_its_dtype(maps: tuple[Tensor, Tensor]) -> None:
    model = Net(Neck()).bfloat16()
    half = tuple(x.bfloat16() for x in maps)
    expected = model(*half)[0]
    upgrade_(model)
    assert torch.equal(model(*half)[0], expected)


def test_a_stop_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(Neck(), Neck())

    def stop(self: nn.Module, fine: Tensor, coarse: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(UpgradedNeck, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        upgrade_(model)
    assert [type(neck) for neck in model.necks] == [Neck, Neck]
    assert not any("fusions" in name for name in model.state_dict())
