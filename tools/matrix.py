#!/usr/bin/env python3
"""Run the tests with the lowest or the newest versions of everything that pyproject.toml names.

example:
  tools/matrix.py lowest newest
  tools/matrix.py lowest --python python3.10 --keep /tmp/python3.10 --tests tests/ops tests/fusion

Each environment takes some 7 GB and is removed, unless --keep names a folder for it; what lies there from before is
not installed again. Prints what pytest says and per run a row of a table: date, system, versions, outcome. The exit
code is 1 if a run failed.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    sys.exit("tools/matrix.py runs on Python 3.11 or newer; --python names the one that is tested")

ROOT = Path(__file__).resolve().parents[1]


def lowest() -> list[str]:
    """``name==bound`` for every lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = chain(project["dependencies"], *project["optional-dependencies"].values())
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement) for requirement in stated)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})


def environment(kind: str, python: str, folder: Path) -> list[str]:
    """How to run modules in the environment ``folder / kind``, made first unless it is there."""
    place = folder / kind
    inside = [str(place / "bin" / "python"), "-m"]
    if not (place / "installed").exists():
        constraints = folder / f"{kind}.txt"
        constraints.write_text("\n".join(lowest() if kind == "lowest" else []), encoding="utf-8")
        subprocess.run([python, "-m", "venv", "--clear", "--upgrade-deps", place], check=True)
        subprocess.run([*inside, "pip", "install", "-q", "-c", constraints, "-e", f"{ROOT}[dev]"], check=True)
        (place / "installed").touch()
    return inside


def run(kind: str, python: str, folder: Path, tests: list[str]) -> bool:
    """The tests in one environment; prints its row."""
    inside = environment(kind, python, folder)
    last = ""
    with subprocess.Popen([*inside, "pytest", *tests], cwd=ROOT, text=True, stdout=subprocess.PIPE) as tested:
        for last in tested.stdout or []:
            print(last, end="", flush=True)
    said = subprocess.run([*inside, "freqfusion", "doctor", "--json"], text=True, stdout=subprocess.PIPE)
    report = json.loads(said.stdout)
    packages = {
        name: each["installed"] for extra in report["extras"].values() for name, each in extra.items()
    }
    cells = [
        str(datetime.date.today()),
        f"Python {report['python']}, {report['system']}",
        kind,
        ", ".join(f"{name} {version}" for name, version in sorted(packages.items())),
        last.strip("= \n"),
        "; ".join(report["faults"]) or "no faults",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    return tested.returncode == said.returncode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="+", choices=("lowest", "newest"))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments [this one]")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="where environments stay, one Python each"
    )
    parser.add_argument("--tests", nargs="+", default=[], help="what goes to pytest [all but the slow tests]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = [run(kind, args.python, folder, args.tests) for kind in args.kinds]
    sys.exit(not all(outcomes))
