"""nnU-Net's own commands with our trainer, on a few small volumes on a CPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from freqfusion.data import SyntheticVolumes

pytestmark = pytest.mark.nnunet
if find_spec("nnunetv2") is None:
    pytest.skip("nnunetv2 is not installed", allow_module_level=True)

EXAMPLE = Path(__file__).parents[2] / "examples" / "nnunet.sh"
OWN = """\
from freqfusion.upgrade.hosts.nnunet_trainers.nnUNetTrainerFreqFusion import nnUNetTrainerFreqFusion

class ShortTrainer(nnUNetTrainerFreqFusion):
    def __init__(self, plans, configuration, fold, dataset_json, device):  # nnU-Net wants these names
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = EPOCHS, 3, 1
        self.save_every = 1

class ShortCARAFE(ShortTrainer):
    fusion = "carafe"
    upgrade_options = {"init": "paper"}
"""
SIZE, SPACING = (12, 40, 36), (3.0, 1.0, 1.0)  # depth first
PATCHES = {"2d": (32, 32), "3d_fullres": (8, 32, 32), "3d_lowres": (8, 16, 16)}


def run(*words: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned and preprocessed data set; the plans with small networks, and a 3d_lowres of their own."""
    import SimpleITK

    folder = tmp_path_factory.mktemp("nnunet")
    os.environ |= {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f", "nnUNet_def_n_proc": "1", "DEVICE": "cpu"}
    raw = folder / "raw" / "Dataset001_Vessels"
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / name).mkdir(parents=True)
    for i in range(7):
        sample = SyntheticVolumes("train", size=SIZE)[i]
        case, place = f"case_{i:03}", "imagesTr" if i < 6 else "imagesTs"
        for array, path in (
            (sample["image"][0], raw / place / f"{case}_0000.nii.gz"),
            (sample["mask"], raw / "labelsTr" / f"{case}.nii.gz"),
        )[: 2 if i < 6 else 1]:
            volume = SimpleITK.GetImageFromArray(array.numpy())
            volume.SetSpacing(SPACING[::-1])
            SimpleITK.WriteImage(volume, str(path))
    about = {
        "channel_names": {"0": "synthetic"},
        "labels": {"background": 0, "vessel": 1, "blob": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(about))
    run("nnUNetv2_extract_fingerprint", "-d", 1, "-np", 1)
    run("nnUNetv2_plan_experiment", "-d", 1)
    path = folder / "preprocessed" / raw.name / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    known = plans["configurations"]
    known["3d_lowres"] = json.loads(json.dumps(known["3d_fullres"]))
    known["3d_lowres"] |= {"spacing": [3.0, 2.0, 2.0], "data_identifier": "nnUNetPlans_3d_lowres"}
    for name, patch in PATCHES.items():
        known[name] |= {"patch_size": patch, "batch_size": 2}
        flat = len(patch) == 2
        known[name]["architecture"]["arch_kwargs"] |= {
            "n_stages": 3,
            "features_per_stage": [8, 16, 16],
            "kernel_sizes": [[3, 3]] * 3 if flat else [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1], [2, 2], [2, 2]] if flat else [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
        }
    path.write_text(json.dumps(plans))
    run("nnUNetv2_preprocess", "-d", 1, "-c", *PATCHES, "-np", 1, 1, 1)
    return folder


@pytest.mark.parametrize(
    "configuration, trainer",
    [*((name, "ShortTrainer") for name in PATCHES), ("3d_fullres", "ShortCARAFE")],
)
def test_train_go_on_and_predict(folder, monkeypatch, configuration, trainer) -> None:
    import SimpleITK

    own = folder / f"own_{configuration}_{trainer}"
    own.mkdir()
    monkeypatch.setenv("nnUNet_extTrainer", str(own))
    results = (
        folder / "results" / "Dataset001_Vessels" / f"{trainer}__nnUNetPlans__{configuration}" / "fold_0"
    )
    for epochs in (1, 2):  # the second call goes on from the first one's checkpoint
        (own / "own.py").write_text(OWN.replace("EPOCHS", str(epochs)))
        out = folder / f"predicted_{configuration}_{trainer}_{epochs}"
        images = folder / "raw" / "Dataset001_Vessels" / "imagesTs"
        monkeypatch.setenv("TRAINER", trainer)
        run(EXAMPLE, 1, configuration, 0, images, out)
        if epochs == 1:  # a run that was stopped has no final checkpoint
            (results / "checkpoint_final.pth").rename(results / "checkpoint_latest.pth")
    saved = torch.load(results / "checkpoint_final.pth", weights_only=False)
    assert saved["current_epoch"] == 2
    gates = [value for key, value in saved["network_weights"].items() if key.endswith("lr_gate.weight")]
    fusions = [key for key in saved["network_weights"] if key.startswith("decoder.fusions.")]
    assert len({key.split(".")[2] for key in fusions}) == 2
    assert len(gates) == (0 if trainer == "ShortCARAFE" else 2)
    assert all(gate.abs().max() > 0 for gate in gates), "no gate has learned"
    assert "mean" in json.loads((results / "validation" / "summary.json").read_text())
    predicted = SimpleITK.ReadImage(str(out / "case_006.nii.gz"))
    assert predicted.GetSpacing() == pytest.approx(SPACING[::-1])
    labels = SimpleITK.GetArrayFromImage(predicted)
    assert labels.shape == SIZE
    assert set(np.unique(labels)) <= {0, 1, 2}


@torch.no_grad()
@pytest.mark.parametrize("configuration", PATCHES)
def test_the_network_starts_as_the_plain_one(folder, configuration) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from freqfusion.upgrade.hosts.nnunet_trainers.nnUNetTrainerFreqFusion import nnUNetTrainerFreqFusion

    plans = PlansManager(str(folder / "preprocessed" / "Dataset001_Vessels" / "nnUNetPlans.json"))
    networks = []
    for trainer in (nnUNetTrainer, nnUNetTrainerFreqFusion):
        torch.manual_seed(0)
        call = plans, plans.get_configuration(configuration), 1, 3
        networks.append(trainer.build_network_architecture(*call))
    plain, ours = networks
    assert set(plain.state_dict()) < set(ours.state_dict())
    x = torch.randn(2, 1, *PATCHES[configuration])
    expected, found = plain(x), ours(x)
    assert [y.shape for y in found] == [y.shape for y in expected]
    assert len(found) == 2  # deep supervision
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    plain.decoder.deep_supervision = ours.decoder.deep_supervision = False
    torch.testing.assert_close(ours(x), plain(x))
    assert ours(x).shape == (2, 3, *PATCHES[configuration])


@torch.no_grad()
def test_a_plain_checkpoint_goes_on(folder) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from freqfusion.upgrade.hosts.nnunet_trainers.nnUNetTrainerFreqFusion import nnUNetTrainerFreqFusion

    raw, preprocessed = (folder / name / "Dataset001_Vessels" for name in ("raw", "preprocessed"))
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    about = json.loads((raw / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, about, torch.device("cpu"))
    trainer.initialize()
    trainer.save_checkpoint(str(folder / "plain.pth"))
    run(sys.executable, EXAMPLE.with_name("nnunet_pretrained.py"), folder / "plain.pth", folder / "more.pth")

    call = trainer.plans_manager, trainer.configuration_manager, 1, 3
    ours = nnUNetTrainerFreqFusion.build_network_architecture(*call)
    load_pretrained_weights(ours, str(folder / "more.pth"))  # what -pretrained_weights calls
    outputs = trainer.network.decoder.seg_layers  # which it leaves out
    ours.decoder.seg_layers.load_state_dict(outputs.state_dict())
    x = torch.randn(2, 1, *PATCHES["3d_fullres"])
    for one, other in zip(ours(x), trainer.network(x), strict=True):
        torch.testing.assert_close(one, other)
