#!/usr/bin/env python3
"""Run the tests with the lowest or the newest versions of everything that pyproject.toml names.

example:
  tools/matrix.py lowest newest
  tools/matrix.py lowest --python python3.10 --tests tests/ops tests/fusion

Each environment is fresh, takes some 7 GB in the system's temporary folder, and is removed. Prints per run what
pytest said and a row of a table: date, system, versions, outcome. The exit code is 1 if a run failed.
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

ROOT = Path(__file__).parents[1]


def lowest() -> list[str]:
    """``name==bound`` for every lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = chain(project["dependencies"], *project["optional-dependencies"].values())
    found = (re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement) for requirement in stated)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})


def run(kind: str, python: str, tests: list[str]) -> bool:
    """One environment; prints its row."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(lowest() if kind == "lowest" else []), encoding="utf-8")
        subprocess.run([python, "-m", "venv", f"{folder}/venv"], check=True)
        inside = [f"{folder}/venv/bin/python", "-m"]
        subprocess.run([*inside, "pip", "install", "-q", "-c", constraints, "-e", f"{ROOT}[dev]"], check=True)
        done = subprocess.run(
            [*inside, "pytest", *tests], cwd=ROOT, text=True, capture_output=True, check=False
        )
        said = subprocess.run(
            [*inside, "freqfusion", "doctor", "--json"], text=True, capture_output=True, check=False
        )
    report = json.loads(said.stdout)
    packages = {
        name: each["installed"] for extra in report["extras"].values() for name, each in extra.items()
    }
    cells = [
        str(datetime.date.today()),
        f"Python {report['python']}, {report['system']}",
        kind,
        ", ".join(f"{name} {version}" for name, version in sorted(packages.items())),
        done.stdout.strip().splitlines()[-1].strip("= "),
    ]
    print(done.stdout, f"| {' | '.join(cells)} |", sep="\n", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="+", choices=("lowest", "newest"))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments [this one]")
    parser.add_argument("--tests", nargs="+", default=[], help="what goes to pytest [all but the slow tests]")
    args = parser.parse_args()
    outcomes = [run(kind, args.python, args.tests) for kind in args.kinds]
    sys.exit(not all(outcomes))
