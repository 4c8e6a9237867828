"""Building and loading the compiled kernels, and doing without them."""

import ctypes
import hashlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from freqfusion.ops import _native

HOOK = Path(__file__).parents[2] / "hatch_build.py"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The build hook's module; hatchling itself is there only while an installation runs."""
    interface = "hatchling.builders.hooks.plugin.interface"
    parts = interface.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
    monkeypatch.setattr(sys.modules[interface], "BuildHookInterface", object, raising=False)
    spec = importlib.util.spec_from_file_location("hatch_build", HOOK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A small stand-in for the real sources, which take a minute to compile."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "api.h").write_text('extern "C" int level();\n')
    (folder / "kernels.cpp").write_text(
        "#define JOIN_(a, b) a##b\n#define JOIN(a, b) JOIN_(a, b)\n"
        'extern "C" int JOIN(level_, FREQFUSION_LEVEL)() { return 7; }\n'
    )
    (folder / "library.cpp").write_text(
        '#include "api.h"\n'
        '#define EXPORT extern "C" __attribute__((visibility("default")))\n'
        'extern "C" int level_baseline();\n'
        "EXPORT int level() { return level_baseline(); }\n"
        "EXPORT const char* freqfusion_sources() { return FREQFUSION_SOURCES; }\n"
        'EXPORT const char* freqfusion_instruction_set() { return "baseline"; }\n'
    )
    return folder


@needs_compiler
def test_compiles_every_level_into_one_library(hook: Any, sources: Path) -> None:
    library = sources / hook.LIBRARY
    assert hook.compile_library(sources, library) == ""
    loaded = ctypes.CDLL(str(library))
    assert loaded.level() == 7
    loaded.freqfusion_sources.restype = ctypes.c_char_p
    content = b"".join((sources / name).read_bytes() for name in ("api.h", "kernels.cpp", "library.cpp"))
    assert loaded.freqfusion_sources().decode() == hashlib.sha256(content).hexdigest()
    assert {file.suffix for file in sources.iterdir()} == {".h", ".cpp", ".so"}  # no leftovers


@needs_compiler
def test_sources_that_do_not_compile_are_reported(hook: Any, sources: Path) -> None:
    library = sources / hook.LIBRARY
    library.write_bytes(b"the one before")
    (sources / "kernels.cpp").write_text("this is no C++\n")
    reason = hook.compile_library(sources, library)
    assert "kernels.cpp" in reason
    assert "error" in reason
    assert library.read_bytes() == b"the one before"


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("", "no C\\+\\+ compiler was found"), ("/nonexistent/c++", "/nonexistent/c\\+\\+")],
)
def test_without_a_compiler(
    hook: Any, sources: Path, compiler: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "")
    library = sources / hook.LIBRARY
    reason = hook.compile_library(sources, library)
    assert re.search(message, reason)
    assert not library.exists()


def test_an_installation_goes_on_without_a_compiler(
    hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    (tmp_path / "src" / "freqfusion" / "csrc").mkdir(parents=True)
    said: list[str] = []
    build = hook.NativeKernels()
    build.root, build.app = (
        str(tmp_path),
        SimpleNamespace(display_info=said.append, display_warning=said.append),
    )
    for version in ("standard", "editable"):
        data: dict[str, Any] = {"force_include": {}, "pure_python": True}
        build.initialize(version, data)
        build.finalize(version, data, "")
        assert data == {"force_include": {}, "pure_python": True}  # a wheel of Python alone
        assert "not compiled: no C++ compiler was found (set CXX, or install g++ or clang++)" in said[-1]


def test_reasons_why_the_library_does_not_load(tmp_path: Path) -> None:
    library, reason = _native._load(tmp_path / "freqfusion_native.so")
    assert library is None
    assert "not compiled at install, where a C++ compiler is needed" in reason
    (tmp_path / "freqfusion_native.so").write_bytes(b"no library")
    library, reason = _native._load(tmp_path / "freqfusion_native.so")
    assert library is None
    assert "does not load" in reason


@pytest.mark.skipif(bool(_native.REASON), reason=_native.REASON or "native is there")
def test_a_library_older_than_its_sources_is_not_used(tmp_path: Path) -> None:
    for file in _native.LIBRARY.parent.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / file.name)
    assert _native._load(tmp_path / _native.LIBRARY.name)[1] == ""
    with open(tmp_path / "api.h", "a") as header:
        header.write("// changed\n")
    library, reason = _native._load(tmp_path / _native.LIBRARY.name)
    assert library is None
    assert "its sources changed after it was compiled" in reason
