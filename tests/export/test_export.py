"""Exported files beside torch. The exports themselves compare too; here it is done by other hands."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from freqfusion import create_fusion, create_model, list_fusions, ops, upgrade_
from freqfusion.decoders.ham import NMF2D, LightHamHead
from freqfusion.export import ExportReport, export_onnx, export_program
from freqfusion.zoo import ModelSpec

SMALL = {
    "a2u": {"encode_kernel": 2},
    "carafe": {"up_kernel": 3, "compressed_channels": 8},
    "fade": {"up_kernel_size": 3, "embedding_dim": 8},
    "freqfusion": {"lowpass_kernel": 3, "compressed_channels": 8},
    "sapa": {"up_kernel_size": 3, "embedding_dim": 8},
    "sapa-g": {"up_kernel_size": 3, "embedding_dim": 8},
    "sapa_d": {"num_point": 2, "embedding_dim": 2},
    "fade_lite": {"up_kernel_size": 3},
    "lda_aqu": {"k_u": 1},
    "resfu": {"kernel_size": 1, "embedding_dim": 8},
}
"""Options that keep a graph small."""
SIZES = (((14, 18), (7, 9)), ((13, 7), (7, 4)), ((33, 40), (17, 20)))
"""Fine and coarse sizes, none of them the traced one."""
ANY_RATIO = (((13, 7), (6, 3)), ((12, 9), (3, 2)), ((5, 6), (5, 6)))
CROPPED = ("deconv", "pixel_shuffle")
"""At other ratios these switch to interpolation, which a file made for x2 does not hold."""


def shaken(module: nn.Module) -> nn.Module:
    """With weights large enough that every branch matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return module.eval()


def onnx_run(path: Path, *inputs: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feed)]


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.float() - expected.float()).abs().max().detach() / expected.detach().abs().max())


def maps(fusion: nn.Module, fine: tuple[int, int], coarse: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hr = torch.randn(1, fusion.hr_channels, *fine, generator=generator)
    return hr, torch.randn(1, fusion.lr_channels, *coarse, generator=generator)


@pytest.fixture
def onnx():
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return pytest.importorskip("onnx")


def check_onnx(onnx, name: str, path: Path, **options) -> None:
    fusion = shaken(create_fusion(name, 16, 16, **options))
    report = export_onnx(fusion, path, (12, 16), dynamic=True)
    assert [check.size for check in report.checks] == [(12, 16), (13, 19), (24, 8)]
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    assert {(entry.domain, entry.version) for entry in graph.opset_import} == {("", 20)}
    assert len(graph.functions) == 0
    assert report.inputs == tuple(node.name for node in graph.graph.input) == ("hr_feat", "lr_feat")
    for sizes in SIZES if name in CROPPED else SIZES + ANY_RATIO:
        inputs = maps(fusion, *sizes)
        with torch.no_grad():
            _, hr_feat, lr_feat = fusion(*inputs)
        results = onnx_run(path, *inputs)
        for result, expected in zip(
            results, [hr_feat, lr_feat] if fusion.refines_hr else [lr_feat], strict=True
        ):
            assert relative(result, expected) < 2e-5, sizes


VARIANTS = ("sapa-g", "dysample+", "dysample-s")  # of the same operators as sapa, dysample and dysample-s+


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in list_fusions()],
)
def test_every_method_as_onnx_at_other_sizes(onnx, name, tmp_path):
    check_onnx(onnx, name, tmp_path / "fusion.onnx", **SMALL.get(name, {}))


KINDS = {
    "onnx": {},
    "onnx float16": {"half": True},
    "torch.export": {},
    "torch.export float16": {"half": True},
    "aotinductor": {"compiled": True},
}
"""Kinds of files and what makes them."""


def export_kind(kind: str, model: nn.Module, folder: Path, dynamic: int, capsys) -> ExportReport:
    """Export and let the export compare, at sizes other than the traced one; prints the figures for the docs."""
    path = folder / ("m.onnx" if kind.startswith("onnx") else "m.pt2")
    export = export_onnx if kind.startswith("onnx") else export_program
    start = time.process_time()
    report = export(model, path, (64, 96), dynamic=dynamic, **KINDS[kind])
    errors = " ".join(
        f"{check.size} {check.max_abs_error:.1e}/{check.max_abs:.3g}" for check in report.checks
    )
    with capsys.disabled():
        print(
            f"\n{kind}: {report.nodes} operators, {errors}, {time.process_time() - start:.0f} s of CPU time"
        )
    return report


def assert_close_to_torch(report: ExportReport, checks: int, half: bool) -> None:
    assert report.path.is_file()
    assert len(report.checks) == checks
    for check in report.checks:
        assert check.max_abs_error <= (2e-2 if half else 1e-4) * check.max_abs, check


@pytest.mark.slow
@pytest.mark.parametrize("name", list_fusions())
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_as_published(onnx, kind, name, tmp_path, capsys):
    with capsys.disabled():
        print(f"\n{name} ", end="")
    torch.manual_seed(0)
    fusion = create_fusion(name, 64, 64)
    if "float16" not in kind:  # half precision is judged at the weights of a start
        shaken(fusion)
    report = export_kind(kind, fusion, tmp_path, True, capsys)
    assert_close_to_torch(report, 3, "float16" in kind)


@pytest.mark.parametrize("dynamic", [False, 2])
def test_sizes_that_a_file_takes(onnx, dynamic, tmp_path):
    path = tmp_path / "fusion.onnx"
    fusion = create_fusion("bilinear", 2, 3)
    report = export_onnx(fusion, path, (12, 16), dynamic=dynamic)
    if not dynamic:
        assert report.sizes == "12x16 alone"
        with pytest.raises(Exception, match="Got invalid dimensions"):
            onnx_run(path, *maps(fusion, (14, 16), (7, 8)))
        return
    assert report.sizes == "multiples of 2"
    assert [check.size for check in report.checks] == [(12, 16), (14, 22), (24, 8)]
    assert onnx_run(path, *maps(fusion, (28, 6), (14, 3)))[0].shape == (1, 3, 28, 6)


def test_half_precision(onnx, tmp_path):
    path = tmp_path / "fusion.onnx"
    fusion = shaken(create_fusion("carafe", 8, 8, up_kernel=3, compressed_channels=8))
    report = export_onnx(fusion, path, (12, 16), half=True)
    assert report.precision == "float16"
    inputs = [x.half() for x in maps(fusion, (12, 16), (6, 8))]
    (result,) = onnx_run(path, *inputs)
    assert result.dtype == torch.float16
    assert relative(result, fusion(*(x.float() for x in inputs)).lr_feat) < 5e-3
    assert next(fusion.parameters()).dtype == torch.float32


def test_operator_set_18_names_bilinear_sampling_as_tensorrt_knows_it(onnx, tmp_path):
    path = tmp_path / "fusion.onnx"
    fusion = shaken(create_fusion("dysample", 8, 8))
    assert export_onnx(fusion, path, (12, 16), opset=18, dynamic=True).format == "ONNX opset 18"
    graph = onnx.load(path)
    assert {(entry.domain, entry.version) for entry in graph.opset_import} == {("", 18)}
    (sampler,) = (node for node in graph.graph.node if node.op_type == "GridSample")
    assert {a.name: a.s for a in sampler.attribute}["mode"] == b"bilinear"
    with pytest.raises(ValueError, match=r"opset must be one of \(20, 18\), got 17"):
        export_onnx(fusion, path, (12, 16), opset=17)


@pytest.mark.parametrize("opset", [18, 20])
def test_offsets_that_are_not_finite_do_the_same_in_the_file(onnx, opset, tmp_path):
    fusion = shaken(create_fusion("dysample", 8, 8))
    path = tmp_path / "fusion.onnx"
    export_onnx(fusion, path, (12, 16), opset=opset, dynamic=True)
    for hr_size, lr_size in (((12, 16), (6, 8)), ((10, 14), (5, 7))):
        hr, lr = maps(fusion, hr_size, lr_size)
        lr[0, :, 1, 2], lr[0, :, 3, 4] = torch.nan, torch.inf  # the offsets there are NaN and infinite
        expected = fusion(hr, lr).lr_feat.detach()
        (result,) = onnx_run(path, hr, lr)
        assert bool(expected.isnan().any())
        assert not bool(expected.isnan().all())
        assert bool(result[..., 2:4, 4:6].isnan().all())  # whose own offsets are NaN
        # at the border torch multiplies a further pixel, NaN or not, by zero; onnxruntime does not read it
        assert not bool((result.isnan() & ~expected.isnan()).any())
        finite = ~expected.isnan()
        torch.testing.assert_close(result[finite], expected[finite], rtol=1e-4, atol=1e-4)


def test_what_float16_itself_loses_is_no_fault_of_the_file(tmp_path):
    class Cancelling(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return (image + 300) - 300

    report = export_program(Cancelling(), tmp_path / "x.pt2", (8, 8), half=True)
    assert report.checks[0].max_abs_error > 0.02 * report.checks[0].max_abs


@pytest.mark.parametrize("name, half", [("freqfusion", False), ("carafe", True)])
def test_torch_export_at_other_sizes(name, half, tmp_path):
    path = tmp_path / "fusion.pt2"
    fusion = shaken(create_fusion(name, 16, 16, **SMALL[name]))
    report = export_program(fusion, path, (12, 16), dynamic=True, half=half)
    assert report.outputs == (("fused_hr", "fused_lr") if fusion.refines_hr else ("fused_lr",))
    program = torch.export.load(path).module()
    for sizes in SIZES + ANY_RATIO:
        inputs = maps(fusion, *sizes)
        with torch.no_grad():
            _, hr_feat, lr_feat = fusion(*inputs)
        results = program(*(x.half() if half else x for x in inputs))
        expected = [hr_feat, lr_feat] if fusion.refines_hr else [lr_feat]
        for result, one in zip(results, expected, strict=True):
            assert relative(result, one) < (2e-2 if half else 2e-5), sizes


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aotinductor_at_other_sizes(tmp_path):
    path = tmp_path / "fusion.pt2"
    fusion = shaken(create_fusion("dysample", 8, 8))
    report = export_program(fusion, path, (12, 16), dynamic=True, compiled=True)
    assert report.format == "AOTInductor"
    program = torch._inductor.aoti_load_package(str(path))
    for sizes in SIZES + ANY_RATIO:
        inputs = maps(fusion, *sizes)
        (result,) = program(*inputs)
        assert relative(result, fusion(*inputs).lr_feat) < 2e-5, sizes


class Two(nn.Module):
    """Takes multiples of 4 alone, and returns a dict in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=4, padding=1)

    def forward(self, image: Tensor) -> list[dict[str, Tensor | None]]:
        if image.shape[-2] % 4:
            raise RuntimeError("give multiples of 4")
        return [{"a": self.conv(image), "image": image.mean(1), "none": None}]


def test_networks_that_take_multiples_alone(tmp_path):
    path = tmp_path / "two.pt2"
    with pytest.raises(
        ValueError, match=r"Two does not take .*\(1, 3, 9, 15\) \(give multiples of 4\).*--dynamic"
    ):
        export_program(Two(), path, (8, 12), dynamic=True)
    with pytest.raises(ValueError, match=r"multiples of 4, got 10x12"):
        export_program(Two(), path, (10, 12), dynamic=4)
    assert not path.exists()
    report = export_program(Two(), path, (8, 12), dynamic=4)
    assert report.outputs == ("output_0_a", "output_0_image")
    assert str(report).splitlines()[0].endswith("multiples of 4")


class Wrong(nn.Module):
    """Computes something else when it is exported."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return 100 * image, image + self.shift if torch.compiler.is_exporting() else image + 0


def test_a_wrong_file_is_not_written(tmp_path):
    path = tmp_path / "wrong.pt2"
    path.write_bytes(b"old")
    for shift in (1e-2, float("nan")):
        with pytest.raises(RuntimeError, match=r"'output_1' differs from torch by .* at 8x8"):
            export_program(Wrong(shift), path, (8, 8))
    assert path.read_bytes() == b"old"
    export_program(Wrong(1e-6), path, (8, 8))
    assert list(tmp_path.iterdir()) == [path]


class Branching(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image if image.sum() > 0 else -image


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match=r"torch.export cannot trace this Branching \(.*--module backbone"):
        export_program(Branching(), tmp_path / "x.pt2", (8, 8))
    with pytest.raises(ValueError, match=r"must end in \.pt2, got .*x\.onnx"):
        export_program(nn.Identity(), tmp_path / "x.onnx", (8, 8))
    with pytest.raises(ValueError, match="an even dynamic"):
        export_program(create_fusion("nearest", 2, 2), tmp_path / "x.pt2", (9, 9), dynamic=3)


def test_random_bases_of_the_ham_head_are_the_ones_of_evaluation(tmp_path):
    factorisation = NMF2D(8, 4).train()
    path = tmp_path / "model.pt2"
    export_program(factorisation, path, (6, 7), inputs=lambda *size: (torch.rand(1, 8, *size),))
    assert factorisation.training
    program = torch.export.load(path).module()
    x = torch.rand(1, 8, 6, 7)
    assert torch.equal(program(x)[0], program(x)[0])
    assert relative(program(x)[0], factorisation.eval()(x)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["segnext_t", "unet", "detector"])
def test_networks(onnx, network, kind, tmp_path, capsys):
    torch.manual_seed(0)
    if network == "segnext_t":
        model = create_model("segnext_t", 19)
    elif network == "unet":
        smp = pytest.importorskip("segmentation_models_pytorch")
        model = upgrade_(smp.Unet("resnet18", encoder_weights=None, classes=3), init="paper")
    else:
        detection = pytest.importorskip("torchvision.models.detection")
        whole = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        model = upgrade_(whole, init="paper").backbone
    with capsys.disabled():
        print(f"\n{network} ", end="")
    dynamic = kind != "aotinductor"  # compiling a network for any size takes a quarter of an hour and more
    report = export_kind(kind, model, tmp_path, dynamic, capsys)
    assert_close_to_torch(report, 3 if dynamic else 1, "float16" in kind)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_with_what_to_use_instead(tmp_path: Path) -> None:
    fine, coarse = torch.rand(1, 16, 8, 8), torch.rand(1, 16, 4, 4)
    image = torch.rand(1, 3, 64, 64)
    head = LightHamHead([8, 16], 3, channels=32, ham_channels=32, fusion="bilinear")
    cases = [(create_fusion(name, 16, 16), (fine, coarse)) for name in list_fusions()]
    cases += [(create_model("fpn_small", 2, fusion), (image,)) for fusion in ("freqfusion", "bilinear")]
    cases += [(create_model("segnext_t", 2, fusion), (image,)) for fusion in ("freqfusion", "bilinear")]
    cases += [(nn.Sequential(create_model("fpn_small", 2)), (image,))]
    cases += [(head, ([torch.rand(1, 8, 8, 8), torch.rand(1, 16, 4, 4)],))]
    for model, example in cases:
        model.eval()
        for build in (
            lambda model=model, example=example: torch.jit.trace(model, example),
            lambda model=model: torch.jit.script(model),
            lambda model=model, example=example: torch.onnx.export(
                model, example, str(tmp_path / "model.onnx"), dynamo=False
            ),
        ):
            with pytest.raises(RuntimeError, match=r"freqfusion\.export") as error:
                build()
            assert "\n" not in str(error.value)
    for function, example in (
        (lambda x: ops.local_similarity(x), (fine,)),
        (lambda x, offsets: ops.resample(x, offsets), (fine, torch.rand(1, 2, 16, 16))),
        (lambda x, kernels: ops.carafe(x, kernels, 3), (fine, torch.rand(1, 9, 16, 16))),
    ):
        with pytest.raises(RuntimeError, match=r"freqfusion\.export"):
            torch.jit.trace(function, example)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("dynamic", [0, pytest.param(14, marks=pytest.mark.slow)])
def test_a_plain_transformer(onnx, tmp_path, dynamic):
    """At another size than its positions', of whole patches or not."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    tiny = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    options = {"fusion": "bilinear", "channels": 8, "backbone_options": tiny}
    model = create_model("fpn_vit_small_patch14_dinov2", 3, **options).eval()
    size = (28, 56) if dynamic else (30, 41)
    export_onnx(model, tmp_path / "m.onnx", size, dynamic=dynamic)
    image = torch.randn(1, 3, *((42, 70) if dynamic else size))
    with torch.no_grad():
        assert relative(onnx_run(tmp_path / "m.onnx", image)[0], model(image)) < 1e-4


def test_files_say_how_the_model_is_made(onnx, tmp_path):
    model = create_model("fpn_small", 3, "bilinear", channels=8).eval()
    export_onnx(model, tmp_path / "m.onnx", (32, 40))
    export_program(model, tmp_path / "m.pt2", (32, 40))
    (entry,) = onnx.load(tmp_path / "m.onnx").metadata_props
    held = {"freqfusion.spec": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=held)
    assert entry.key == "freqfusion.spec"
    for text in (entry.value, held["freqfusion.spec"]):
        assert ModelSpec.from_json(json.loads(text)) == model.spec
