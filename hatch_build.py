"""Build hook: compiles the CPU kernels (``src/freqfusion/csrc``) with the system's C++ compiler.

The library is an accelerator, not a requirement: where no compiler is found or compiling fails, the hook
prints why, the installation goes on, and the package computes with torch.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "freqfusion_native.so"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
X86_LEVELS = {
    "baseline": (),
    "v3": ("-march=x86-64-v3",),
    "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}


def find_compiler() -> list[str] | None:
    """``$CXX`` if set, otherwise the first compiler on the path, as the words of its command."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def compile_library(sources: Path, library: Path) -> str:
    """Compile ``sources`` to ``library``, once an instruction set; the reason if that cannot be done, else ""."""
    if sys.platform == "win32":
        return "Windows is not supported yet"
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
    levels = X86_LEVELS if x86 else {"baseline": ()}
    files = sorted(file for file in sources.iterdir() if file.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    try:
        with tempfile.TemporaryDirectory() as folder:
            objects = {level: str(Path(folder) / f"{level}.o") for level in (*levels, "library")}
            kernels, entry = str(sources / "kernels.cpp"), str(sources / "library.cpp")
            commands = [
                [
                    *compiler,
                    *FLAGS,
                    *flags,
                    f"-DFREQFUSION_LEVEL={level}",
                    "-c",
                    kernels,
                    "-o",
                    objects[level],
                ]
                for level, flags in levels.items()
            ]
            macros = [f'-DFREQFUSION_SOURCES="{digest}"', *(["-DFREQFUSION_X86_LEVELS"] if x86 else [])]
            commands.append([*compiler, *FLAGS, *macros, "-c", entry, "-o", objects["library"]])
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, commands))
            built = str(Path(folder) / LIBRARY)
            _run([*compiler, "-shared", "-pthread", *objects.values(), "-o", built])
            # a process may have the old library open: replace the file, never write into it
            library.parent.mkdir(parents=True, exist_ok=True)
            beside = library.with_suffix(f".{os.getpid()}")
            shutil.copyfile(built, beside)
            os.replace(beside, library)
    except OSError as error:
        return f"{error}"
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(error.cmd)} failed:\n{error.stderr}"
    return ""


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class NativeKernels(BuildHookInterface):
    """Puts the library into wheels, and beside the sources for editable installations."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        sources = Path(self.root) / "src" / "freqfusion" / "csrc"
        editable = version == "editable"
        self.folder = None if editable else tempfile.TemporaryDirectory()
        library = (sources if self.folder is None else Path(self.folder.name)) / LIBRARY
        self.app.display_info("freqfusion: compiling the CPU kernels")
        reason = compile_library(sources, library)
        if reason:
            self.app.display_warning(
                f"freqfusion: the CPU kernels were not compiled: {reason}\n"
                "freqfusion: everything works without them, but slower"
            )
            return
        if not editable:
            build_data["force_include"][str(library)] = f"freqfusion/csrc/{LIBRARY}"
        build_data["pure_python"] = False
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.folder is not None:
            self.folder.cleanup()
