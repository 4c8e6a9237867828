"""Files that import an optional package cannot be searched for doctests where it is not installed."""

from importlib.util import find_spec

HOSTS = {
    "dynamic_network_architectures": "nnunet.py",
    "monai": "monai.py",
    "segmentation_models_pytorch": "smp.py",
    "torchvision": "torchvision.py",
    "transformers": "transformers",
    "ultralytics": "ultralytics.py",
}
absent = [file for package, file in HOSTS.items() if find_spec(package) is None]
collect_ignore = [f"src/freqfusion/upgrade/hosts/{file}" for file in absent]
if find_spec("ultralytics") is None:
    collect_ignore.append("src/freqfusion/upgrade/hosts/ultralytics_yaml.py")
if find_spec("mmcv") is None or find_spec("mmengine") is None:
    collect_ignore.append("src/freqfusion/upgrade/hosts/mm.py")
if find_spec("nnunetv2") is None:
    collect_ignore.append("src/freqfusion/upgrade/hosts/nnunet_trainers")
collect_ignore += [f"tests/host_cases/{file}" for file in absent]
if find_spec("triton") is None:
    collect_ignore_glob = ["src/freqfusion/ops/*triton*"]
if find_spec("torchvision") is None:
    collect_ignore += ["src/freqfusion/models/detection", "tests/models/detection"]
if find_spec("transformers") is None:
    collect_ignore += ["tests/host_cases/transformers.py", "tests/host_cases/transformers_masks.py"]
    collect_ignore.append("src/freqfusion/models/mask2former.py")
