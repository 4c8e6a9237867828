"""The public surface and the weight of the import."""

import subprocess
import sys

import freqfusion

PUBLIC = {
    "FreqFusion",
    "FusedFeatures",
    "Fusion",
    "carafe",
    "create_fusion",
    "create_model",
    "describe_fusions",
    "downgrade_",
    "find_sites",
    "from_pretrained",
    "list_fusions",
    "list_models",
    "list_released",
    "load_released",
    "local_similarity",
    "normalize_kernels",
    "push_to_hub",
    "register_fusion",
    "register_host",
    "register_model",
    "resample",
    "save_pretrained",
    "upgrade_",
    "window_similarity",
}


def test_public_names_are_frozen() -> None:
    assert set(freqfusion.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(freqfusion, name).__doc__, f"{name} has no docstring"


def test_import_is_lean() -> None:
    """Importing takes torch alone: no optional package, no GPU, no dynamo, little time beyond torch's own."""
    code = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import freqfusion
seconds = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
optional = {"torchvision", "timm", "lightning", "torchmetrics", "matplotlib", "PIL", "rich", "jinja2", "onnx",
            "transformers", "safetensors", "huggingface_hub"}
print(sorted(new & optional), torch.cuda.is_initialized(), seconds < 3)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "[] False True"


def test_names_load_on_first_use() -> None:
    """The bare import leaves torch alone, and submodules are there as if they had been imported."""
    code = """
import sys
import freqfusion
print("torch" in sys.modules)
print(freqfusion.fusion.create_fusion is freqfusion.create_fusion, freqfusion.ops.carafe is freqfusion.carafe)
print(hasattr(freqfusion, "nothing"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True", "True", "False"]
