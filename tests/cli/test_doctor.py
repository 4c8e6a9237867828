import json
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from freqfusion.cli.main import main
from freqfusion.ops import _native, available_backends

CODE = "import sys; sys.modules['torch'] = None; from freqfusion.cli.main import main; sys.exit(main(['doctor']))"


def report(capsys, code: int) -> dict:
    assert main(["doctor", "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_text_and_json_say_the_same(capsys):
    found = report(capsys, 0)
    assert found["torch"] == torch.__version__
    assert found["faults"] == []
    usable = {name for name, why in available_backends().items() if not why} - {"triton"}  # interpreted here
    assert {check["backend"] for check in found["checks"]} == usable
    assert all(check["difference"] < 1e-5 for check in found["checks"])
    assert found["extras"]["core"]["torch"]["installed"] == metadata.version("torch")
    assert found["extras"]["vision"]["timm"]["needed"] == "1.0.22"
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in (torch.__version__, "native", found["compiler"], "No faults found."):
        assert words in text


def test_absent_and_old_packages(capsys, monkeypatch):
    def version(name: str) -> str:
        if name == "timm":
            raise metadata.PackageNotFoundError(name)
        return {"torchvision": "0.9.1+cpu", "torch": "2.8"}.get(name, "99")

    monkeypatch.setattr(metadata, "version", version)
    found = report(capsys, 1)
    assert found["faults"] == [f"torchvision 0.9.1+cpu is older than {bound()}"]
    assert not found["extras"]["core"]["torch"]["old"]
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert 'missing or old: timm, torchvision; python -m pip install "freqfusion[vision]"' in text
    assert "FAULT: torchvision" in text


def bound() -> str:
    needed = next(each for each in metadata.requires("freqfusion") or [] if each.startswith("torchvision"))
    return needed.partition(">=")[2].partition(";")[0].strip()


@pytest.mark.skipif(bool(_native.REASON), reason=_native.REASON)
def test_a_backend_that_computes_wrongly_or_not_at_all(capsys, monkeypatch):
    right = _native.carafe
    monkeypatch.setattr(_native, "carafe", lambda *args, **options: 1.5 * right(*args, **options))
    (fault,) = report(capsys, 1)["faults"]
    assert fault.startswith("backend native on cpu: differs from torch by ")

    def fail(*args, **options):
        raise MemoryError("no\nmemory")

    monkeypatch.setattr(_native, "carafe", fail)
    assert report(capsys, 1)["faults"] == ["backend native on cpu: MemoryError: no memory"]


def test_without_torch_it_says_so():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAULT: torch does not load: " in done.stdout
    assert done.stderr == ""
